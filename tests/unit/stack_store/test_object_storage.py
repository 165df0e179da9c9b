"""Objects in memory and in files: what is found, what is refused, and settings that no driver takes."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from stack_store.errors import (
    ObjectDenied,
    ObjectNotFound,
    ObjectRefused,
    ObjectStorageInvalid,
    ObjectUnavailable,
    StoreError,
)
from stack_store.object_storage import ObjectStorage


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """Empty again afterwards: it is one for the process."""
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/x", recursive=True)


def read(storage: ObjectStorage, url: str, start: int, end: int) -> bytes:
    with storage.open(storage.check(url)) as found:
        return found.read(start, end)


def test_pieces_of_an_object_are_read(memory: MemoryFileSystem) -> None:
    memory.pipe("/x/law", b"0123456789")
    storage = ObjectStorage(["memory://x"], {})
    with storage.open(storage.check("memory://x/law")) as found:
        assert (found.num_bytes, found.read(0, 3), found.read(3, 10)) == (10, b"012", b"3456789")


def test_pieces_of_a_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "law").write_bytes(b"0123456789")
    assert read(ObjectStorage([f"file://{tmp_path}"], {}), f"file://{tmp_path}/law", 3, 6) == b"345"


def test_what_is_absent_is_not_found(memory: MemoryFileSystem, tmp_path: Path) -> None:
    memory.pipe("/x/folder/law", b"law")
    storage = ObjectStorage(["memory://x", f"file://{tmp_path}"], {})
    for url in ("memory://x/nothing", "memory://x/folder", f"file://{tmp_path}/nothing"):
        with pytest.raises(ObjectNotFound) as error:
            read(storage, url, 0, 1)
        assert url in str(error.value)


def test_links_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    (root / "inner").mkdir(parents=True)
    secret.write_text("secret")
    (root / "link").symlink_to(secret)
    (root / "folder").symlink_to(tmp_path)
    storage = ObjectStorage([f"file://{root}"], {})
    for name in ("link", "folder/secret", "inner"):
        with pytest.raises(ObjectRefused) as error:
            read(storage, f"file://{root}/{name}", 0, 1)
        assert f"file://{root}/{name}" in str(error.value)


@dataclass
class WholeFiles:
    """An HTTP server that knows no ranges, as Python's own: it answers with 20 MB whatever piece is asked for."""

    port: int
    num_sent: int = 0

    num_bytes = 20_000_000


@pytest.fixture
def whole_files() -> Iterator[WholeFiles]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(WholeFiles.num_bytes))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            with suppress(OSError):  # who asked has gone
                while served.num_sent < WholeFiles.num_bytes:
                    served.num_sent += self.wfile.write(bytes(10_000))

        def log_message(self, *_: object) -> None:
            """Nothing to the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = WholeFiles(server.server_port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_without_ranges_is_not_read_to_the_end(whole_files: WholeFiles) -> None:
    root = f"http://127.0.0.1:{whole_files.port}"
    storage = ObjectStorage([root], {})
    with storage.open(storage.check(f"{root}/law")) as found:
        assert found.read(0, 1000) == bytes(1000)
        with pytest.raises(ObjectUnavailable, match=f"object '{root}/law' can't be read: ValueError"):
            found.read(1000, 2000)
    assert whole_files.num_sent < WholeFiles.num_bytes


def test_a_server_that_is_down_is_not_taken_for_one_that_lacks_the_object() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        root = f"http://127.0.0.1:{listener.getsockname()[1]}"
    storage = ObjectStorage([root], {})
    with pytest.raises(ObjectUnavailable, match=f"object '{root}/law' can't be read: ClientConnectorError"):
        read(storage, f"{root}/law", 0, 1)


class OddDriver(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Finds ten bytes wherever it is asked, and then does what the name of the object says."""

    protocol = "odd"

    def __init__(self, **options: Any) -> None:
        if options.get("colour"):
            raise ValueError("SECRET")
        super().__init__(**options)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": None if path.endswith("endless") else 10}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        if path.endswith("denied"):
            raise PermissionError("SECRET")
        if path.endswith("broken"):
            raise ZeroDivisionError("SECRET")
        return b"" if path.endswith("empty") else b"0123456789"


@pytest.fixture
def odd() -> ObjectStorage:
    fsspec.register_implementation("odd", OddDriver, clobber=True)
    return ObjectStorage(["odd://x"], {"odd": {"taste": "SECRET"}})


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("denied", ObjectDenied, "the storage denies access to 'odd://x/denied'"),
        ("broken", ObjectUnavailable, "object 'odd://x/broken' can't be read: ZeroDivisionError"),
        ("whole", ObjectUnavailable, "2 bytes were asked for, 10 came"),
        ("empty", ObjectUnavailable, "2 bytes were asked for, 0 came"),
        ("endless", ObjectUnavailable, "object 'odd://x/endless' has no known length"),
    ],
)
def test_faults_of_a_driver_are_told_without_its_words(
    odd: ObjectStorage, name: str, error: type[StoreError], said: str
) -> None:
    with pytest.raises(error) as raised:
        read(odd, f"odd://x/{name}", 0, 2)
    assert said in str(raised.value)
    assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize(
    ("roots", "options", "said"),
    [
        (["nosuch://x"], {}, "root with scheme 'nosuch': fsspec knows no such scheme"),
        (["local://mnt"], {}, "root with scheme 'local': local files are named by file:///"),
        (["memory://x"], {"s3": {"anon": True}}, "options of 's3': no root has a scheme"),
        (["file:///mnt"], {"file": {"auto_mkdir": True}}, "options of 'file': no root has a scheme"),
        (["odd://x"], {"odd": {"colour": "SECRET"}}, "options of 'odd' are refused: ValueError"),
    ],
)
def test_settings_that_no_driver_takes_are_named(
    odd: ObjectStorage, roots: list[str], options: dict[str, dict[str, Any]], said: str
) -> None:
    with pytest.raises(ObjectStorageInvalid) as error:
        ObjectStorage(roots, options)
    assert said in str(error.value)
    assert "SECRET" not in str(error.value)
