"""Which object URLs are taken for plain ones under a root, and what a message shows of the others."""

import pytest

from stack_store.errors import ObjectRefused, ObjectStorageInvalid
from stack_store.object_url import check_root, check_url, shown_url

ROOTS = ["s3://hospital-stacks/published/", "file:///mnt/models/", "memory://x/", "https://stacks.example:8443/a/"]


@pytest.mark.parametrize(
    ("url", "root", "relative"),
    [
        ("s3://hospital-stacks/published/law.safetensors", ROOTS[0], "law.safetensors"),
        ("s3://hospital-stacks/published/2026/a b@c=d,e.safetensors", ROOTS[0], "2026/a b@c=d,e.safetensors"),
        ("s3://hospital-stacks/published/..law/...", ROOTS[0], "..law/..."),
        ("s3://hospital-stacks/published/Gesetz-ü.safetensors", ROOTS[0], "Gesetz-ü.safetensors"),
        ("file:///mnt/models/law.safetensors", ROOTS[1], "law.safetensors"),
        ("memory://x/law", ROOTS[2], "law"),
        ("https://stacks.example:8443/a/law", ROOTS[3], "law"),
    ],
)
def test_a_plain_url_under_a_root_is_taken(url: str, root: str, relative: str) -> None:
    checked = check_url(url, ROOTS)
    assert (checked.text, checked.root, checked.relative) == (url, root, relative)


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("s3://hospital-stacks/unpublished/law", "is not under a root"),
        ("s3://hospital-stacks/published", "is not under a root"),
        ("s3://hospital-stacks/publishedd/law", "is not under a root"),
        ("s3://hospital-stacks-evil/published/law", "is not under a root"),
        ("s3://hospital-stacks.evil/published/law", "is not under a root"),
        ("s3a://hospital-stacks/published/law", "is not under a root"),
        ("S3://hospital-stacks/published/law", "with the scheme in lower case"),
        ("gs://hospital-stacks/published/law", "is not under a root"),
        ("http://stacks.example:8443/a/law", "is not under a root"),
        ("https://stacks.example/a/law", "is not under a root"),
        ("https://169.254.169.254/latest/meta-data", "is not under a root"),
        ("s3://hospital-stacks/published/../secret/law", "contains '..'"),
        ("s3://hospital-stacks/published/a/../../secret", "contains '..'"),
        ("s3://hospital-stacks/published/..", "contains '..'"),
        ("file:///mnt/models/../../etc/passwd", "contains '..'"),
        ("file:///mnt/models/..\\..\\etc/passwd", "contains a backslash"),
        ("s3://hospital-stacks/published/%2e%2e/secret", "contains '%'"),
        ("s3://hospital-stacks/published/./law", "an empty part or a '.'"),
        ("s3://hospital-stacks/published//law", "an empty part or a '.'"),
        ("s3://hospital-stacks/published/", "an empty part or a '.'"),
        ("s3://hospital-stacks//published/law", "an empty part or a '.'"),
        ("s3:///hospital-stacks/published/law", "names no bucket"),
        ("s3://../published/law", "names no bucket"),
        ("s3:hospital-stacks/published/law", "must be SCHEME://PLACE/NAME"),
        ("hospital-stacks/published/law", "must be SCHEME://PLACE/NAME"),
        ("/mnt/models/law", "must be SCHEME://PLACE/NAME"),
        ("", "must be SCHEME://PLACE/NAME"),
        ("file://mnt/models/law", "names a host"),
        ("file://localhost/mnt/models/law", "names a host"),
        ("file:////mnt/models/law", "an empty part"),
        ("local:///mnt/models/law", "names no bucket"),
        ("s3://user:password@hospital-stacks/published/law", "contains credentials"),
        ("https://stacks.example:8443@evil.example/a/law", "contains credentials"),
        ("s3://hospital-stacks/published/law?versionId=1", "has a query"),
        ("s3://hospital-stacks/published/law#a", "has a fragment"),
        ("simplecache::s3://hospital-stacks/published/law", "chains file systems"),
        ("s3://hospital-stacks/published/law::file:///etc/passwd", "chains file systems"),
        ("zip://a::s3://hospital-stacks/published/law", "chains file systems"),
        ("s3://hospital-stacks/published/law\n", "can't be printed"),
        ("s3://hospital-stacks/published/law\0.txt", "can't be printed"),
        ("s3://hospital-stacks/published/\ud800", "can't be printed"),
        (" s3://hospital-stacks/published/law", "must be SCHEME://PLACE/NAME"),
        ("s3://hospital-stacks/published/\u202egnp.exe", "can't be printed"),
    ],
)
def test_a_hostile_url_is_refused_with_its_fault(url: str, fault: str) -> None:
    with pytest.raises(ObjectRefused) as refused:
        check_url(url, ROOTS)
    assert fault in str(refused.value)
    assert repr(shown_url(url)) in str(refused.value)


def test_without_roots_nothing_is_taken() -> None:
    with pytest.raises(ObjectRefused, match="is not under a root"):
        check_url("s3://hospital-stacks/published/law", [])


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://other/a@b", "s3://other/a@b"),
        ("https://stacks.example:8443/law", "https://stacks.example:8443/law"),
        ("s3://KEY:SECRET@bucket/law", "s3://***@bucket/law"),
        ("s3://KEY:SEC/RET@bucket/law", "s3://***@bucket/law"),
        ("https://SECRET@host/law", "https://***@host/law"),
        ("s3://KEY:SECRET/law", "s3://***/law"),
        ("https://host/law?X-Amz-Signature=SECRET", "https://host/law?***"),
        ("https://host/law#SECRET", "https://host/law#***"),
        ("simplecache::s3://KEY:SECRET@bucket/law", "simplecache::s3://***@bucket/law"),
        ("zip:///a::s3://KEY:SECRET@bucket/law", "zip://***@bucket/law"),
        ("KEY:SECRET@bucket", "***@bucket"),
    ],
)
def test_messages_keep_secrets(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_a_long_url_is_cut_in_messages() -> None:
    assert len(shown_url("s3://a/" + "b" * 5000)) == 300


@pytest.mark.parametrize(
    ("root", "checked"),
    [
        ("s3://a", "s3://a/"),
        ("s3://a/b/", "s3://a/b/"),
        ("file:///mnt", "file:///mnt/"),
        ("memory://x/", "memory://x/"),
    ],
)
def test_a_root_ends_in_a_slash(root: str, checked: str) -> None:
    assert check_root(root) == checked


@pytest.mark.parametrize(
    "root",
    [
        "",
        "/mnt",
        "s3://",
        "s3:///",
        "file:///",
        "file://",
        "file://mnt",
        "s3://u:p@a",
        "s3://a/../b",
        "s3://a//",
        "s3:a",
    ],
)
def test_a_root_that_is_no_plain_place_is_refused(root: str) -> None:
    with pytest.raises(ObjectStorageInvalid, match="root "):
        check_root(root)
