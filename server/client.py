"""Talks to a running server for the command line. Knows its HTTP contract; nothing of torch, models or stores."""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from server.errors import RequestFailed

CHUNK_BYTES = 1024 * 1024
TIMEOUT = httpx.Timeout(600.0, connect=5.0)

Json = dict[str, Any]


class ServerClient:
    """One server, seen from a terminal."""

    def __init__(self, url: str, *, api_key: str | None = None, admin_key: str | None = None) -> None:
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT)
        self._api = _bearer(api_key)
        self._admin = _bearer(admin_key)

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
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body, headers=self._api) as response:
                if response.is_error:
                    response.read()
                    raise RequestFailed(_message(response))
                yield from _events(response.iter_lines())
        except httpx.HTTPError as error:
            raise RequestFailed(f"{self._http.base_url}: {error}") from error

    def route(self, text: str) -> Json:
        """Scores and mix of a text."""
        return self._call("POST", "/v1/route", self._api, json={"prompt": text})

    def models(self) -> list[str]:
        """Every model that may be asked for; the first one routes."""
        return [model["id"] for model in self._call("GET", "/v1/models", self._api)["data"]]

    def domains(self) -> Json:
        """Every registered domain."""
        return self._call("GET", "/admin/domains", self._admin)

    def domain(self, name: str) -> Json:
        """One registered domain."""
        return self._call("GET", f"/admin/domains/{name}", self._admin)

    def upload(self, path: Path, on_bytes: Callable[[int], None]) -> str:
        """Sends a file; its digest. `on_bytes` hears how many bytes were sent each time."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            self._call("PUT", f"/admin/blobs/{digest}", self._admin, content=_chunks(file.read, on_bytes))
        return digest

    def register(self, name: str, stacks: Sequence[Mapping[str, str]], *, dry_run: bool) -> Json:
        """Registers stacks as a domain's rounds: `sha256` of each, and `url` of those that were not uploaded."""
        body = {"stacks": list(stacks), "dry_run": dry_run}
        return self._call("PUT", f"/admin/domains/{name}", self._admin, json=body)

    def remove(self, name: str) -> Json:
        """Deletes a domain."""
        return self._call("DELETE", f"/admin/domains/{name}", self._admin)

    def verify(self, name: str) -> Json:
        """Has all bytes of a domain's files read again: of each its digest, and its fault if it has one."""
        return self._call("POST", f"/admin/domains/{name}/verify", self._admin)

    def change_residency(self, name: str, action: str, *, tier: str) -> Json:
        """`pin`, `unpin` or `prefetch`."""
        return self._call("POST", f"/admin/domains/{name}/{action}", self._admin, params={"tier": tier})

    def cache(self) -> Json:
        """What is resident, leased, pinned and loading."""
        return self._call("GET", "/admin/cache", self._admin)

    def set_router(self, source: Mapping[str, str]) -> Json:
        """Makes a router file live: `sha256`, and `url` if it was not uploaded."""
        return self._call("PUT", "/admin/router", self._admin, json=dict(source))

    def _call(self, method: str, path: str, headers: Mapping[str, str], **kwargs: Any) -> Json:
        try:
            response = self._http.request(method, path, headers=headers, **kwargs)
        except httpx.HTTPError as error:
            raise RequestFailed(f"{self._http.base_url}: {error}") from error
        if response.is_error:
            raise RequestFailed(_message(response))
        answer: Json = response.json()
        return answer


def _bearer(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def _chunks(read: Callable[[int], bytes], on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    while chunk := read(CHUNK_BYTES):
        yield chunk
        on_bytes(len(chunk))


def _events(lines: Iterator[str]) -> Iterator[Json]:
    for line in lines:
        payload = line.removeprefix("data: ")
        if payload == line or payload == "[DONE]":
            continue
        chunk: Json = json.loads(payload)
        if "error" in chunk:
            raise RequestFailed(chunk["error"]["message"])
        yield chunk


def _message(response: httpx.Response) -> str:
    """The server's own words, if the answer is one of its errors."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase} from {response.url}"
