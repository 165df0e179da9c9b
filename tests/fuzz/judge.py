"""Judges answers by the server's own document: status, headers, shape, every event of a stream. Knows no request."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from jsonschema import Draft202012Validator

MAX_SHOWN = 300
ERROR = {"$ref": "#/components/schemas/Error"}


class Judge:
    """What is wrong with an answer."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self._validators: dict[str, Draft202012Validator] = {}

    def faults(self, response: httpx.Response, *, method: str, path: str) -> Iterator[str]:
        """Of an answer to an operation, by its path's template. 5xx is a fault wherever it is documented."""
        status = response.status_code
        if status >= 500:
            yield f"{status}: {response.text[:MAX_SHOWN]}"
        documented = self._document["paths"][path][method.lower()]["responses"].get(str(status))
        if documented is None:
            yield f"undocumented status {status}"
            return
        if "$ref" in documented:
            documented = self._document["components"]["responses"][documented["$ref"].rpartition("/")[2]]
        for name, header in documented.get("headers", {}).items():
            if header.get("required") and name not in response.headers:
                yield f"{status} without the header {name}"
        kind = response.headers.get("content-type", "").partition(";")[0]
        if kind not in documented["content"]:
            yield f"{status} with undocumented content type {kind!r}"
            return
        schema = documented["content"][kind]["schema"]
        if kind == "application/json":
            yield from self._faults_of_text(response.text, schema)
        elif kind == "text/event-stream":
            yield from self._faults_of_events(response.text, schema)

    def _faults_of_events(self, text: str, schema: Mapping[str, Any]) -> Iterator[str]:
        """`data:` lines only, each a chunk; [DONE] is last, or an error is, of a request that failed on the way.

        An error that would have been 5xx before the first chunk is a fault here too.
        """
        lines = [line for line in text.split("\n") if line]
        if stray := [line for line in lines if not line.startswith("data: ")]:
            yield f"stray line in a stream: {stray[0][:MAX_SHOWN]}"
        events = [line.removeprefix("data: ") for line in lines]
        last = events.pop() if events else ""
        for event in events:
            yield from self._faults_of_text(event, schema)
        if last == "[DONE]":
            return
        if any(self._faults_of_text(last, ERROR)):
            yield f"stream ends neither with [DONE] nor with an error: {text[-MAX_SHOWN:]}"
        elif json.loads(last)["error"]["type"] == "server_error":
            yield f"stream ends with an error of the server: {last[:MAX_SHOWN]}"

    def _faults_of_text(self, text: str, schema: Mapping[str, Any]) -> Iterator[str]:
        try:
            value = json.loads(text, parse_constant=_refuse)
        except ValueError as error:
            yield f"{error}: {text[:MAX_SHOWN]}"
            return
        yield from self._faults_of(value, schema)

    def _faults_of(self, value: Any, schema: Mapping[str, Any]) -> Iterator[str]:
        key = json.dumps(schema)
        if key not in self._validators:
            whole = {**schema, "components": self._document["components"]}
            self._validators[key] = Draft202012Validator(whole)
        for error in self._validators[key].iter_errors(value):
            yield f"{error.json_path}: {error.message[:MAX_SHOWN]}"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
