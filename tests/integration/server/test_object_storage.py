"""Stacks and routers from object storage, over a running server and an S3 server: by URL, resumed, refused."""

import hashlib
import json
import logging
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import fsspec
import httpx
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import save
from typer.testing import CliRunner

from server.cli import app
from tests.fakes import tiny_header, write_random_stack
from tests.proxies import BreakingProxy
from tests.servers import LiveServer, ScriptedRouter, run_live_server

KEY = "k"
BUCKET = "hospital-stacks"
ROOT = f"s3://{BUCKET}/published/"
SECRET = "wJalrXUtnFEMI-very-secret"
CHUNK_BYTES = 64 * 1024
NEVER_MENDED = 10**6


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    """Of an S3 server with one bucket, empty at first."""
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    port = s3.get_host_and_port()[1]
    bucket_client(port).create_bucket(Bucket=BUCKET)
    yield port
    s3.stop()


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver finds them where it always looks, and nothing else of this machine."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def bucket_client(port: int) -> Any:
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys)


@dataclass(frozen=True)
class Published:
    """An object of the bucket."""

    url: str
    sha256: str
    content: bytes

    @property
    def source(self) -> dict[str, str]:
        return {"url": self.url, "sha256": self.sha256}


def publish(port: int, name: str, content: bytes) -> Published:
    bucket_client(port).put_object(Bucket=BUCKET, Key=f"published/{name}", Body=content)
    return Published(f"{ROOT}{name}", hashlib.sha256(content).hexdigest(), content)


def law_stack(folder: Path, *, seed: int = 9) -> bytes:
    write_random_stack(folder / "law.safetensors", tiny_header(domain="law"), seed=seed)
    return (folder / "law.safetensors").read_bytes()


@pytest.fixture
def law(s3_port: int, tmp_path: Path) -> Published:
    """A stack of a domain that no server has yet."""
    return publish(s3_port, "law.safetensors", law_stack(tmp_path))


@contextmanager
def serving(
    folder: Path, port: int, *, max_upload_bytes: int = 10**8, num_retries: int = 2
) -> Iterator[tuple[LiveServer, httpx.Client]]:
    """A server that may fetch from the bucket at that port; the driver does not try again by itself."""
    options = {"endpoint_url": f"http://127.0.0.1:{port}", "config_kwargs": {"retries": {"max_attempts": 0}}}
    store = {"object_roots": [ROOT], "object_options": {"s3": options}}
    with running(folder, store, max_upload_bytes=max_upload_bytes, num_retries=num_retries) as both:
        yield both


@contextmanager
def running(
    folder: Path, store: Mapping[str, object], *, max_upload_bytes: int = 10**8, num_retries: int = 2
) -> Iterator[tuple[LiveServer, httpx.Client]]:
    settings = {"server": {"admin_key": KEY, "max_upload_bytes": max_upload_bytes}, "store": store}
    with (
        run_live_server(
            folder, settings=settings, download_chunk_bytes=CHUNK_BYTES, num_download_retries=num_retries
        ) as server,
        server.client(KEY) as client,
    ):
        yield server, client


def put_law(client: httpx.Client, *sources: Mapping[str, str], **fields: object) -> httpx.Response:
    return client.put("/admin/domains/law", json={"stacks": list(sources), **fields})


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def num_downloaded(server: LiveServer) -> float:
    return server.metric("brainstacks_object_download_bytes_total")


def left_among_uploads(server: LiveServer) -> dict[str, int]:
    """Bytes by name."""
    return {path.name: path.stat().st_size for path in (server.registry.path / "uploads").iterdir()}


def test_a_domain_registered_by_url_answers(s3_port: int, tmp_path: Path, law: Published) -> None:
    with serving(tmp_path, s3_port) as (server, client):
        response = put_law(client, law.source)
        assert response.status_code == 201, response.text
        assert [stack["digest"] for stack in response.json()["stacks"]] == [law.sha256]
        assert server.chat(model="tiny:law").json()["brainstacks"]["mix"] == {"law": 1.0}
        assert left_among_uploads(server) == {}
        assert num_downloaded(server) == len(law.content)


def test_the_same_digest_is_downloaded_once(s3_port: int, tmp_path: Path, law: Published) -> None:
    with serving(tmp_path, s3_port) as (server, client):
        assert put_law(client, law.source, dry_run=True).status_code == 200
        assert left_among_uploads(server) == {law.sha256: len(law.content)}
        bucket_client(s3_port).delete_object(Bucket=BUCKET, Key="published/law.safetensors")
        assert put_law(client, law.source).status_code == 201  # among the uploads
        again = put_law(client, law.source)  # in the store
        assert (again.status_code, again.json()["changed"]) == (200, False)
        assert num_downloaded(server) == len(law.content)


def damage(path: Path) -> None:
    """Its last weight is another, so that it is a sound stack, but not the one that it was."""
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")


def test_a_damaged_copy_does_not_pass_for_the_file_of_its_digest(s3_port: int, tmp_path: Path, law: Published) -> None:
    with serving(tmp_path, s3_port) as (server, client):
        assert put_law(client, law.source).status_code == 201
        stored = server.registry.stack_path(server.registry.domain("law").stacks[0])
        damage(stored)
        assert refusal(put_law(client, {"sha256": law.sha256})) == (404, "upload_not_found")
        again = put_law(client, law.source)
        assert (again.status_code, again.json()["changed"]) == (200, False)
        assert stored.read_bytes() == law.content


def test_a_damaged_upload_is_downloaded_again(s3_port: int, tmp_path: Path, law: Published) -> None:
    with serving(tmp_path, s3_port) as (server, client):
        assert put_law(client, law.source, dry_run=True).status_code == 200
        damage(server.registry.path / "uploads" / law.sha256)
        response = put_law(client, law.source)
        assert [stack["digest"] for stack in response.json()["stacks"]] == [law.sha256]
        assert num_downloaded(server) == 2 * len(law.content)


def test_a_damaged_upload_is_forgotten(s3_port: int, tmp_path: Path, law: Published) -> None:
    with serving(tmp_path, s3_port) as (server, client):
        assert client.put(f"/admin/blobs/{law.sha256}", content=law.content).status_code == 200
        damage(server.registry.path / "uploads" / law.sha256)
        assert refusal(put_law(client, {"sha256": law.sha256})) == (404, "upload_not_found")
        assert left_among_uploads(server) == {}


def test_a_router_is_set_by_url_and_stays(s3_port: int, tmp_path: Path) -> None:
    file = publish(s3_port, "router.safetensors", big_file(num_bytes=1000))
    with serving(tmp_path, s3_port) as (server, client):
        server.routers[file.content[-8:].hex()] = ScriptedRouter(("code",))
        first = client.put("/admin/router", json=file.source)
        assert first.json()["router"]["digest"] == file.sha256
        assert server.chat("code=0.9").json()["brainstacks"]["scores"] == {"code": 0.9}
        assert client.put("/admin/router", json=file.source).json() == first.json()
        assert num_downloaded(server) == len(file.content)
        assert left_among_uploads(server) == {}


def big_file(*, num_bytes: int) -> bytes:
    """A sound safetensors file of about so many random bytes; the stand-in router takes any."""
    numbers = random.Random(num_bytes).randbytes(num_bytes)
    return save({"numbers": torch.frombuffer(bytearray(numbers), dtype=torch.uint8)})


def test_broken_connections_are_mended_within_the_call(s3_port: int, tmp_path: Path) -> None:
    file = publish(s3_port, "big.safetensors", big_file(num_bytes=500_000))
    with (
        BreakingProxy(s3_port, breaks=[150_000, 100_000]) as proxy,
        serving(tmp_path, proxy.port) as (server, client),
    ):
        server.routers[file.content[-8:].hex()] = ScriptedRouter()
        response = client.put("/admin/router", json=file.source)
        assert response.status_code == 200, response.text
        assert num_downloaded(server) == len(file.content)


def test_an_outage_that_the_driver_gives_up_on_is_outlasted(
    s3_port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver reads again by itself, up to five times if it got to connect and once if it did not.

    So eight refusals are more than one of its calls outlasts, and nine breaks the most that come of them.
    """
    file = publish(s3_port, "big.safetensors", big_file(num_bytes=500_000))
    with (
        BreakingProxy(s3_port, breaks=[300_000], num_refused=8) as proxy,
        serving(tmp_path, proxy.port, num_retries=9) as (server, client),
    ):
        server.routers[file.content[-8:].hex()] = ScriptedRouter()
        response = client.put("/admin/router", json=file.source)
        assert response.status_code == 200, response.text
        assert num_downloaded(server) == len(file.content)
        assert server.metric("brainstacks_object_download_failures_total") == 0
    assert "download broke off bytes=" in caplog.text


def test_after_a_break_and_a_restart_the_rest_is_downloaded(s3_port: int, tmp_path: Path) -> None:
    file = publish(s3_port, "big.safetensors", big_file(num_bytes=500_000))
    with BreakingProxy(s3_port, breaks=[300_000], num_refused=NEVER_MENDED) as proxy:
        with serving(tmp_path, proxy.port) as (server, client):
            assert refusal(client.put("/admin/router", json=file.source)) == (502, "object_unavailable")
            kept = left_among_uploads(server)
            assert list(kept) == [f"{file.sha256}.part"]
            num_kept = kept[f"{file.sha256}.part"]
            assert 3 * CHUNK_BYTES <= num_kept <= 300_000
            assert server.metric("brainstacks_object_download_failures_total") == 1
        proxy.mend()
        num_passed = proxy.num_passed
        with serving(tmp_path, proxy.port) as (server, client):
            server.routers[file.content[-8:].hex()] = ScriptedRouter()
            assert client.put("/admin/router", json=file.source).status_code == 200
            assert num_downloaded(server) == len(file.content) - num_kept
            assert proxy.num_passed - num_passed < len(file.content) - num_kept + CHUNK_BYTES
            assert left_among_uploads(server) == {}


def test_a_wrong_digest_is_refused_and_nothing_is_kept(s3_port: int, tmp_path: Path, law: Published) -> None:
    with serving(tmp_path, s3_port) as (server, client):
        response = put_law(client, {"url": law.url, "sha256": "0" * 64})
        assert refusal(response) == (400, "digest_mismatch")
        assert law.url in response.json()["error"]["message"]
        assert left_among_uploads(server) == {}


def test_a_too_large_object_is_refused_unread(s3_port: int, tmp_path: Path, law: Published) -> None:
    with serving(tmp_path, s3_port, max_upload_bytes=len(law.content) - 1) as (server, client):
        response = put_law(client, law.source)
        assert refusal(response) == (413, "upload_too_large")
        assert f"has {len(law.content)} bytes" in response.json()["error"]["message"]
        assert (num_downloaded(server), left_among_uploads(server)) == (0, {})


def test_an_object_that_is_no_stack_is_refused_as_an_upload_would_be(s3_port: int, tmp_path: Path) -> None:
    junk = publish(s3_port, "junk.safetensors", b"\x80\x04\x95junk")
    with serving(tmp_path, s3_port) as (_, client):
        assert refusal(put_law(client, junk.source)) == (400, "stack_invalid")


def test_only_urls_under_a_root_are_read(s3_port: int, tmp_path: Path, law: Published) -> None:
    bucket_client(s3_port).put_object(Bucket=BUCKET, Key="private/law.safetensors", Body=law.content)
    with serving(tmp_path, s3_port) as (server, client):
        for url in (
            f"s3://{BUCKET}/private/law.safetensors",
            f"{ROOT}../private/law.safetensors",
            "s3://other-bucket/published/law.safetensors",
            f"file://{tmp_path}/law.safetensors",
            f"simplecache::{law.url}",
        ):
            response = put_law(client, law.source, {"url": url, "sha256": law.sha256})
            assert refusal(response) == (400, "object_refused")
            assert url in response.json()["error"]["message"]
        assert num_downloaded(server) == 0  # the good one beside it neither


def test_a_refused_url_is_named_without_its_secrets(s3_port: int, tmp_path: Path) -> None:
    with serving(tmp_path, s3_port) as (_, client):
        for url in (f"s3://AKID:{SECRET}@{BUCKET}/published/a", f"{ROOT}a?X-Amz-Signature={SECRET}"):
            response = put_law(client, {"url": url, "sha256": "0" * 64})
            assert refusal(response) == (400, "object_refused")
            assert SECRET not in response.text


def test_an_absent_object_is_not_found(s3_port: int, tmp_path: Path, law: Published) -> None:
    with serving(tmp_path, s3_port) as (server, client):
        for url in (f"{ROOT}absent.safetensors", ROOT.removesuffix("/published/") + "/published/folder"):
            response = put_law(client, {"url": url, "sha256": "0" * 64})
            assert refusal(response) == (404, "object_not_found")
            assert url in response.json()["error"]["message"]
        assert left_among_uploads(server) == {}


def test_an_absent_bucket_is_not_found(s3_port: int, tmp_path: Path) -> None:
    options = {"s3": {"endpoint_url": f"http://127.0.0.1:{s3_port}"}}
    with running(tmp_path, {"object_roots": ["s3://no-such-bucket"], "object_options": options}) as (_, client):
        response = put_law(client, {"url": "s3://no-such-bucket/a", "sha256": "0" * 64})
        assert refusal(response) == (404, "object_not_found")


def test_a_storage_that_is_down_is_told_without_secrets(
    s3_port: int, tmp_path: Path, law: Published, caplog: pytest.LogCaptureFixture
) -> None:
    with BreakingProxy(s3_port, breaks=[0]) as proxy:
        port = proxy.port
    with caplog.at_level(logging.INFO), serving(tmp_path, port) as (server, client):  # nobody listens there any more
        response = put_law(client, law.source)
        assert refusal(response) == (502, "object_unavailable")
        assert law.url in response.json()["error"]["message"]
        assert server.metric("brainstacks_object_download_failures_total") == 1
        assert left_among_uploads(server) == {}
    assert "download broke off" in caplog.text
    assert "Traceback" not in caplog.text
    assert SECRET not in caplog.text + response.text


def test_urls_are_off_by_default(tmp_path: Path, law: Published) -> None:
    with running(tmp_path, {}) as (_, client):
        for response in (put_law(client, law.source), client.put("/admin/router", json=law.source)):
            assert refusal(response) == (403, "object_storage_disabled")
            assert response.json()["error"]["param"] == "url"


@pytest.mark.parametrize(
    "source",
    [
        {"url": f"{ROOT}law"},
        {"url": f"{ROOT}law", "sha256": "short"},
        {"url": f"{ROOT}law", "sha256": "0" * 64, "path": "law"},
        {"url": "", "sha256": "0" * 64},
        {"url": 5, "sha256": "0" * 64},
        {"url": f"{ROOT}{'x' * 3000}", "sha256": "0" * 64},
    ],
)
def test_a_url_without_its_digest_is_refused(s3_port: int, tmp_path: Path, source: dict[str, Any]) -> None:
    with serving(tmp_path, s3_port) as (_, client):
        assert refusal(put_law(client, source)) == (400, "invalid_value")


def test_a_folder_is_a_root_too(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    content = law_stack(root)
    sha256 = hashlib.sha256(content).hexdigest()
    (root / "link.safetensors").symlink_to(tmp_path / "store" / "manifest.json")
    with running(tmp_path, {"object_roots": [f"file://{root}"]}) as (_, client):
        link = {"url": f"file://{root}/link.safetensors", "sha256": sha256}
        assert refusal(put_law(client, link)) == (400, "object_refused")
        absent = {"url": f"file://{root}/absent.safetensors", "sha256": sha256}
        assert refusal(put_law(client, absent)) == (404, "object_not_found")
        assert put_law(client, {"url": f"file://{root}/law.safetensors", "sha256": sha256}).status_code == 201


def test_memory_is_a_root_too(tmp_path: Path) -> None:
    content = law_stack(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.pipe("/published/law", content)
    source = {"url": "memory://published/law", "sha256": hashlib.sha256(content).hexdigest()}
    with running(tmp_path, {"object_roots": ["memory://published"]}) as (_, client):
        assert put_law(client, source).status_code == 201
    memory.rm("/published", recursive=True)


def test_the_command_line_registers_by_url(s3_port: int, tmp_path: Path, law: Published) -> None:
    with serving(tmp_path, s3_port) as (server, _):
        options = ["--url", server.url, "--admin-key", KEY]
        result = CliRunner().invoke(app, ["stacks", "register", "law", f"{law.url}@{law.sha256}", *options])
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["stacks"][0]["digest"] == law.sha256
        absent = CliRunner().invoke(app, ["stacks", "register", "law", f"{ROOT}absent@{'0' * 64}", *options])
        assert absent.exit_code == 1
        assert f"there is no object '{ROOT}absent'" in absent.stderr


def test_a_missing_driver_names_what_to_install() -> None:
    """In a process of its own, because fsspec remembers the drivers that it found."""
    code = (
        "import sys\n"
        "sys.modules['s3fs'] = None\n"
        "from stack_store.errors import ObjectStorageInvalid\n"
        "from stack_store.object_storage import ObjectStorage\n"
        "try:\n"
        "    ObjectStorage(['s3://bucket'], {})\n"
        "except ObjectStorageInvalid as error:\n"
        "    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said == "root with scheme 's3': its driver is not installed: pip install -c constraints.txt -e '.[s3]'\n"


@pytest.mark.parametrize("library", ["botocore.auth", "aiobotocore.credentials", "s3fs", "fsspec"])
def test_libraries_that_sign_requests_do_not_log_how(library: str) -> None:
    """In a process of its own, because logging is configured for the whole of it."""
    code = (
        "import logging\n"
        "from server.logs import configure_logging\n"
        "configure_logging('debug')\n"
        "assert logging.getLogger('server').isEnabledFor(logging.DEBUG)\n"
        f"assert not logging.getLogger({library!r}).isEnabledFor(logging.INFO)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
