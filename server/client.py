"""Talks to a running server for the command line. Knows its HTTP contract; nothing of torch, models or stores."""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx

from server.errors import RequestFailed

CHUNK_BYTES = 1024 * 1024
TIMEOUT = httpx.Timeout(600.0, connect=5.0)
ADMIN_TIMEOUT = httpx.Timeout(600.0, connect=5.0, read=None)  # an answer may wait for downloads, or for all bytes
DATA = b"data: "
DONE = b"data: [DONE]"
MAX_SHOWN = 100  # characters of an answer that is none

Json = dict[str, Any]


class ServerClient:
    """One server, seen from a terminal."""

    def __init__(self, url: str, *, api_key: str | None = None, admin_key: str | None = None) -> None:
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT)
        self._api = bearer(api_key)
        self._admin = bearer(admin_key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    @property
    def is_admin(self) -> bool:
        """Whether there is a key to try."""
        return bool(self._admin)

    def stream_chat(self, messages: Sequence[Mapping[str, str]], **fields: Any) -> Generator[Json, None, None]:
        """The chunks of a streamed answer; closing it breaks the answer off."""
        body = {"messages": list(messages), "stream": True, **fields}
        request = request_of(self._http, "POST", "/v1/chat/completions", json=body, headers=self._api)
        with self._reaching(), closing(self._http.send(request, stream=True)) as response:
            if not response.is_success:
                response.read()
            require_stream(response)
            events = EventReader()
            for piece in response.iter_bytes():
                yield from events.read(piece)
            events.require_end()

    def route(self, text: str) -> Json:
        """Scores and mix of a text."""
        return self._call("POST", "/v1/route", self._api, json={"prompt": text})

    def models(self) -> list[str]:
        """Every model that may be asked for; the first one routes."""
        return [model["id"] for model in self._call("GET", "/v1/models", self._api)["data"]]

    def domains(self) -> Json:
        """Every registered domain."""
        return self._ask_admin("GET", "/admin/domains")

    def domain(self, name: str) -> Json:
        """One registered domain."""
        return self._ask_admin("GET", _domain_path(name))

    def upload(self, path: Path, on_bytes: Callable[[int], None]) -> str:
        """Sends a file; its digest. `on_bytes` hears how many bytes were sent each time."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            self._ask_admin("PUT", f"/admin/blobs/{digest}", content=_chunks(file.read, on_bytes))
        return digest

    def register(self, name: str, stacks: Sequence[Mapping[str, str]], *, dry_run: bool) -> Json:
        """Registers stacks as a domain's rounds: `sha256` of each, and `url` of those that were not uploaded."""
        body = {"stacks": list(stacks), "dry_run": dry_run}
        return self._ask_admin("PUT", _domain_path(name), json=body)

    def remove(self, name: str) -> Json:
        """Deletes a domain."""
        return self._ask_admin("DELETE", _domain_path(name))

    def verify(self, name: str) -> Json:
        """Has all bytes of a domain's files read again: of each its digest, and its fault if it has one."""
        return self._ask_admin("POST", f"{_domain_path(name)}/verify")

    def change_residency(self, name: str, action: str, *, tier: str) -> Json:
        """`pin`, `unpin` or `prefetch`."""
        return self._ask_admin("POST", f"{_domain_path(name)}/{action}", params={"tier": tier})

    def cache(self) -> Json:
        """What is resident, leased, pinned and loading."""
        return self._ask_admin("GET", "/admin/cache")

    def set_router(self, source: Mapping[str, str]) -> Json:
        """Makes a router file live: `sha256`, and `url` if it was not uploaded."""
        return self._ask_admin("PUT", "/admin/router", json=dict(source))

    def _ask_admin(self, method: str, path: str, **parts: Any) -> Json:
        return self._call(method, path, self._admin, timeout=ADMIN_TIMEOUT, **parts)

    def _call(self, method: str, path: str, headers: Mapping[str, str], **parts: Any) -> Json:
        request = request_of(self._http, method, path, headers=headers, **parts)
        with self._reaching():
            response = self._http.send(request)
        if not response.is_success:
            raise RequestFailed(_message(response))
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise RequestFailed(f"{response.url} answered with no JSON object: {response.text[:MAX_SHOWN]!r}")
        return answer

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPError as error:
            raise RequestFailed(f"{self._http.base_url}: {error}") from error


def bearer(key: str | None) -> dict[str, str]:
    """The header of a key. RequestFailed for a key that no header may hold."""
    if not key:
        return {}
    if not key.isascii():
        raise RequestFailed("a key has characters that are not ASCII, so that it cannot be sent")
    return {"authorization": f"Bearer {key}"}


def request_of(http: httpx.Client | httpx.AsyncClient, method: str, path: str, **parts: Any) -> httpx.Request:
    """RequestFailed for what cannot be written as a request, such as a number that JSON does not have."""
    try:
        return http.build_request(method, path, **parts)
    except (httpx.InvalidURL, ValueError) as error:
        raise RequestFailed(f"{http.base_url} cannot be asked: {error}") from error


def require_stream(response: httpx.Response) -> None:
    """RequestFailed for what is no event stream. The body of an error has to be read before."""
    if not response.is_success:
        raise RequestFailed(_message(response))
    kind = response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        raise RequestFailed(f"{response.url} answered with content type {kind!r}, not with an event stream")


class EventReader:
    """The chunks of one stream, as its bytes come."""

    def __init__(self) -> None:
        self._rest = b""  # of a line whose end has not come
        self._is_done = False

    def read(self, piece: bytes) -> Iterator[Json]:
        """What ends in this piece. RequestFailed for an error of the server, or for what is no chunk."""
        # Not httpx's lines: they end at U+2028, U+2029 and U+0085 too, which JSON may have unescaped.
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line == DONE:
                self._is_done = True
            elif line.startswith(DATA):
                yield _chunk_of(line.removeprefix(DATA))

    def require_end(self) -> None:
        """RequestFailed for a stream that was over without [DONE]."""
        if not self._is_done and self._rest.rstrip() != DONE:
            raise RequestFailed("the stream broke off: it did not end with [DONE]")


def _chunk_of(payload: bytes) -> Json:
    try:
        chunk = json.loads(payload)
    except ValueError:
        chunk = None
    match chunk:
        case {"error": {"message": str(said)}}:
            raise RequestFailed(said)
        case {"choices": list()}:
            return chunk
    shown = payload.decode(errors="replace")[:MAX_SHOWN]
    raise RequestFailed(f"an event of the stream is no chunk: {shown!r}")


def _domain_path(name: str) -> str:
    return f"/admin/domains/{quote(name, safe='')}"


def _chunks(read: Callable[[int], bytes], on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    while chunk := read(CHUNK_BYTES):
        yield chunk
        on_bytes(len(chunk))


def _message(response: httpx.Response) -> str:
    """The server's own words, if the answer is one of its errors."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase} from {response.url}"
