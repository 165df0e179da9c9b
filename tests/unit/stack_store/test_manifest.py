"""A manifest comes back as it was written, and a wrong one is refused by key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stack_store.errors import DomainNameInvalid, ManifestInvalid
from stack_store.manifest import (
    DomainEntry,
    Manifest,
    RouterEntry,
    StackEntry,
    read_manifest,
    require_domain_name,
    router_file,
    stack_file,
    write_manifest,
)
from tests.fakes import tiny_geometry


def _stack(domain: str, round: int, digit: str) -> StackEntry:
    return StackEntry(digest=digit * 64, file=stack_file(domain, round, digit * 64), bytes=10, round=round)


def _manifest() -> Manifest:
    return Manifest(
        format_version=1,
        base_fingerprint="tiny-base",
        geometry=tiny_geometry(),
        domains=(
            DomainEntry("math", (_stack("math", 1, "a"), _stack("math", 2, "b"))),
            DomainEntry("chat", (_stack("chat", 1, "c"),)),
        ),
        router=RouterEntry(digest="d" * 64, file=router_file("d" * 64), bytes=20),
        generation=7,
    )


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest.json", _manifest())
    assert read_manifest(tmp_path / "manifest.json") == _manifest()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_version_is_that_of_the_stacks_in_their_order() -> None:
    first, second = _stack("math", 1, "a"), _stack("math", 2, "b")
    version = DomainEntry("math", (first, second)).version
    assert version == DomainEntry("maths", (first, second)).version
    assert version != DomainEntry("math", (second, first)).version
    assert version != DomainEntry("math", (first,)).version
    assert len(version) == 16


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown key": (lambda value: value.update(colour="red"), "the manifest has the unknown colour"),
    "missing key": (lambda value: value.pop("router"), "the manifest lacks router"),
    "later format": (lambda value: value.update(format_version=2, new=1), "format_version is 2, this build knows 1"),
    "empty fingerprint": (lambda value: value.update(base_fingerprint=""), "the manifest has the base_fingerprint ''"),
    "negative generation": (lambda value: value.update(generation=-1), "the manifest has the generation -1"),
    "generation of truth": (lambda value: value.update(generation=True), "the manifest has the generation True"),
    "bad geometry": (lambda value: value["geometry"].pop("shapes"), "geometry is"),
    "domains by name": (lambda value: value.update(domains={}), "the manifest has the domains {}"),
    "domain is a text": (lambda value: value.update(domains=["math"]), "a domain is 'math', must be an object"),
    "repeated domain": (lambda value: value["domains"].append(value["domains"][0]), "a domain appears twice in"),
    "reserved name": (lambda value: value["domains"][0].update(name="base"), "domain name 'base' is reserved"),
    "no stacks": (lambda value: value["domains"][0].update(stacks=[]), r"a domain has the stacks \[\]"),
    "rounds out of order": (lambda value: value["domains"][0]["stacks"].reverse(), "round 1 of domain 'math' has the"),
    "unknown stack key": (
        lambda value: value["domains"][0]["stacks"][1].update(x=1),
        "round 2 of domain 'math' has the unknown x",
    ),
    "short digest": (lambda value: value["domains"][0]["stacks"][0].update(digest="aa"), "has the digest 'aa'"),
    "file outside": (lambda value: value["domains"][0]["stacks"][0].update(file="../x"), "has the file '../x'"),
    "router outside": (lambda value: value["router"].update(file="/etc/passwd"), "has the file '/etc/passwd'"),
    "router of no bytes": (lambda value: value["router"].update(bytes=0), "the router has the bytes 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_manifest_is_refused_by_key(tmp_path: Path, fault: str) -> None:
    edit, message = FAULTS[fault]
    path = tmp_path / "manifest.json"
    write_manifest(path, _manifest())
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    with pytest.raises(ManifestInvalid, match=rf"manifest.json: .*{message}"):
        read_manifest(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_a_manifest_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ManifestInvalid, match=r"manifest.json: "):
        read_manifest(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    "name", ["", "Math", "-math", "ma th", "../math", "math\n", "a" * 65, "base", "all", "auto", "é"]
)
def test_a_name_that_no_domain_may_bear_is_refused(name: str) -> None:
    with pytest.raises(DomainNameInvalid, match="domain name "):
        require_domain_name(name)


@pytest.mark.parametrize("name", ["math", "0", "a-b_c", "a" * 64, "baseline"])
def test_an_ordinary_name_is_accepted(name: str) -> None:
    require_domain_name(name)
