"""Valid requests with something wrong put into them: what random bodies never reach. Knows the fields that matter.

A mutation replaces, removes, wraps or adds a value somewhere in a body, or spoils the bytes of the whole; most bodies
get one or two, so that what is behind the first check is reached, too.
"""

import copy
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.fuzz.judge import Judge
from tests.fuzz.target import ADMIN_KEY, API_KEY, SERVED, Target

Json = Any

USER = {"role": "user", "content": "the quick brown fox"}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["c", "f"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,3}$"}, "maxItems": 2},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "weather", "parameters": WEATHER}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "x"}'}}
STACK = {"path": "chat-1.safetensors"}
UPLOADED = "of no known format"

# What has broken servers: bounds of number types, text that is not text, other types, depth, names of attributes.
NASTY: tuple[Json, ...] = (
    *(None, True, False, 0, -1, 1, 2, 128, 129, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -0.0, 1e-320, 0.5),
    *(float("nan"), float("inf"), -float("inf")),
    *("", " ", "\x00", "\ud800", "\u202e\ufeff", "é" * 300, "a" * 9000, "🦊", "<|im_end|>", "{{7*7}}", "{% raw %}"),
    *(
        "null",
        "1",
        "__class__",
        "../../etc/passwd",
        "/etc/passwd",
        "math",
        "tiny:math",
        "tiny:base",
        "auto",
        "\n\r\x1b[",
    ),
    *([], {}, [[]], [None], [0], [-1], [2**40], ["a", "a"], {"": None}, {"a": {"b": [1]}}, [USER], [{}]),
    *({"type": "object"}, {"$ref": "#"}, {"type": "string", "pattern": "(a+)+$"}, {"anyOf": []}, {"enum": []}),
    *({"type": "array", "minItems": 10**9, "items": {}}, {"type": "integer", "multipleOf": 0}, {"const": "\ud800"}),
    *({"type": "function", "function": {"name": "f"}}, {"mix": {"math": 1e-300}}, {"mode": "all"}, {"50256": 100}),
)
NAMES = (
    *(
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "n",
        "best_of",
        "seed",
        "stop",
    ),
    *("temperature", "top_p", "top_k", "logprobs", "top_logprobs", "logit_bias", "echo", "stream", "stream_options"),
    *("response_format", "tools", "tool_choice", "parallel_tool_calls", "brainstacks", "ignore_eos", "suffix", "user"),
    *("presence_penalty", "repetition_penalty", "functions", "content", "tool_calls", "tool_call_id", "strict", "name"),
    *("schema", "parameters", "mix", "mode", "expect", "dry_run", "stacks", "path", "sha256", "url", "unknown\ud800"),
)


@dataclass(frozen=True, slots=True)
class Call:
    """A valid request."""

    method: str
    template: str
    path: str
    body: Json = None
    query: str = ""
    if_match: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """An answer that should not be, and what it answers."""

    call: Call
    sent: bytes
    fault: str

    def __str__(self) -> str:
        return f"{self.call.method} {self.call.path}{self.call.query} {self.fault}\n  sent {self.sent[:600]!r}"


def valid_calls(digests: Sequence[str]) -> list[Call]:
    """One of each kind that is worth spoiling."""
    chats: list[Json] = [
        {"model": SERVED, "messages": [USER], "max_tokens": 3},
        {"messages": [{"role": "system", "content": "be brief"}, USER], "max_completion_tokens": 3, "stream": True,
         "stream_options": {"include_usage": True}, "n": 2, "seed": 7, "temperature": 0.7, "top_p": 0.9},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "hello"}]}, USER], "max_tokens": 4,
         "logprobs": True, "top_logprobs": 3, "stop": ["fox", "dog"], "logit_bias": {"5": -100, "6": 3.5}},
        {"messages": [USER], "max_tokens": 24, "response_format": {"type": "json_object"}, "seed": 1},
        {"messages": [USER], "max_tokens": 30, "stream": True, "response_format": {
            "type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": WEATHER}}},
        {"messages": [USER], "max_tokens": 30, "tools": [TOOL], "tool_choice": "required",
         "parallel_tool_calls": False},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}], "max_tokens": 8,
         "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}, "stream": True},
        {"messages": [USER], "max_tokens": 2, "brainstacks": {"mix": {"math": 0.9, "chat": 0.2}}, "top_k": 4,
         "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "min_tokens": 1,
         "ignore_eos": True},
        {"messages": [USER], "max_tokens": 2, "brainstacks": {"mode": "auto", "expect": ["math"]}},
    ]  # fmt: skip
    texts: list[Json] = [
        {"prompt": "hello world", "max_tokens": 3, "logprobs": 2, "echo": True},
        {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 0, "logprobs": 1, "echo": True, "model": f"{SERVED}:base"},
        {
            "prompt": ["hello", "the dog"],
            "max_tokens": 3,
            "stream": True,
            "n": 2,
            "best_of": 2,
            "stop": "x",
            "seed": -5,
        },
        {"prompt": [5, 6, 7], "max_tokens": 2, "logit_bias": {"9": 100}, "add_special_tokens": False, "suffix": ""},
    ]
    stacks = [STACK, {"sha256": digests[0]}]
    domain, templated = "/admin/domains/{name}", "/admin/domains/{name}/{action}"
    return [
        *(Call("POST", "/v1/chat/completions", "/v1/chat/completions", body) for body in chats),
        *(Call("POST", "/v1/completions", "/v1/completions", body) for body in texts),
        Call("POST", "/v1/route", "/v1/route", {"messages": [USER]}),
        Call("POST", "/v1/route", "/v1/route", {"prompt": "hello", "model": SERVED}),
        Call("POST", "/tokenize", "/tokenize", {"messages": [USER], "tools": [TOOL], "add_generation_prompt": False}),
        Call("POST", "/tokenize", "/tokenize", {"prompt": "hello", "add_special_tokens": False}),
        Call("POST", "/detokenize", "/detokenize", {"tokens": [1, 5, 300]}),
        *(Call("PUT", domain, "/admin/domains/chat", {"stacks": [each], "dry_run": True}, "", "*") for each in stacks),
        Call("PUT", domain, "/admin/domains/chat", {"stacks": [STACK]}),
        Call("DELETE", domain, "/admin/domains/reasoning", None, "", "*"),
        Call("PUT", domain, "/admin/domains/reasoning", {"stacks": [{"path": "reasoning-1.safetensors"}]}, "", "*"),
        Call("PUT", "/admin/router", "/admin/router", {"path": "router.safetensors"}),
        Call("POST", templated, "/admin/domains/math/pin", None, "?tier=device"),
        Call("POST", templated, "/admin/domains/math/unpin"),
        Call("POST", templated, "/admin/domains/chat/prefetch", None, "?tier=device"),
        Call("POST", f"{domain}/verify", "/admin/domains/math/verify"),
        Call("PUT", "/admin/blobs/{sha256}", f"/admin/blobs/{hashlib.sha256(UPLOADED.encode()).hexdigest()}", UPLOADED),
        Call("GET", domain, "/admin/domains/math"),
        Call("GET", "/v1/models/{model}", f"/v1/models/{SERVED}:math"),
    ]  # fmt: skip


class Mutator:
    """Spoils requests, always the same way with one seed."""

    def __init__(self, target: Target, *, seed: int) -> None:
        self._draw = random.Random(seed)
        self._calls = valid_calls(target.digests)
        self._judge = Judge(target.document)
        self._http = target.client()

    def close(self) -> None:
        self._http.close()

    def findings_of_valid(self) -> Iterator[Finding]:
        """Before anything is spoilt: these calls are worth spoiling only while they are answered."""
        for call in self._calls:
            sent = self._encode(call.body)
            response = self._send(call, sent, call.path + call.query, call.if_match)
            yield from (Finding(call, sent, fault) for fault in self._faults(call, response))
            if response.status_code >= 400:
                yield Finding(call, sent, f"refused though valid: {response.text[:200]}")

    def findings_of_next(self) -> Iterator[Finding]:
        """One spoilt request."""
        call = self._draw.choice(self._calls)
        body = copy.deepcopy(call.body)
        if body is not None:
            for _ in range(self._draw.choice((0, 1, 1, 1, 2, 3))):
                body = self._spoil(body)
        sent = self._encode(body)
        if self._draw.random() < 0.03:
            sent = self._spoil_bytes(sent)
        path = call.path + call.query
        if self._draw.random() < (0.5 if body is None else 0.05):
            path = self._spoil_path(call)
        if_match = call.if_match
        if if_match is not None and self._draw.random() < 0.5:
            if_match = self._draw.choice(("0", '"999999"', "W/", "-1", "1e3", "9" * 500, "²", '"', "*, 1", ""))
        response = self._send(call, sent, path, if_match)
        yield from (Finding(call, sent, f"{path} {fault}") for fault in self._faults(call, response))

    def _send(self, call: Call, sent: bytes, path: str, if_match: str | None) -> httpx.Response:
        key = ADMIN_KEY if call.path.startswith("/admin") else API_KEY
        headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]
        if if_match is not None:
            headers.append((b"if-match", if_match.encode("latin-1", "replace")))
        return self._http.request(call.method, path, content=sent, headers=headers)

    def _faults(self, call: Call, response: httpx.Response) -> Iterator[str]:
        return self._judge.faults(response, method=call.method, path=call.template)

    def _spoil(self, body: Json) -> Json:
        holders = list(_holders(body))
        if not holders:
            return self._nasty()
        holder = self._draw.choice(holders)
        acts: list[Callable[[Json], None]] = [
            self._replace,
            self._replace,
            self._replace,
            self._remove,
            self._add,
            self._wrap,
        ]
        self._draw.choice(acts)(holder)
        return body

    def _key(self, holder: Json) -> Any:
        return self._draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder))) if holder else None

    def _replace(self, holder: Json) -> None:
        if (key := self._key(holder)) is not None:
            holder[key] = self._nasty()

    def _remove(self, holder: Json) -> None:
        if (key := self._key(holder)) is not None:
            del holder[key]

    def _add(self, holder: Json) -> None:
        if isinstance(holder, dict):
            holder[self._draw.choice(NAMES)] = self._nasty()
        else:
            holder.extend(holder[:1] * self._draw.choice((1, 5, 200)) or [self._nasty()])

    def _wrap(self, holder: Json) -> None:
        if (key := self._key(holder)) is not None:
            value = holder[key]
            holder[key] = self._draw.choice(([value], {"value": value}, [value, value], str(value)))

    def _nasty(self) -> Json:
        if self._draw.random() < 0.02:
            deep: Json = 0
            for _ in range(self._draw.choice((50, 500))):
                deep = [deep] if self._draw.random() < 0.5 else {"a": deep}
            return deep
        return copy.deepcopy(self._draw.choice(NASTY))

    def _encode(self, body: Json) -> bytes:
        if isinstance(body, str):
            return body.encode(errors="surrogatepass")
        return json.dumps(body, ensure_ascii=self._draw.random() < 0.5).encode(errors="surrogatepass")

    def _spoil_bytes(self, sent: bytes) -> bytes:
        place = self._draw.randrange(len(sent) + 1)
        return self._draw.choice(
            (sent[:place], sent[:place] + b"\xff" + sent[place:], b"[" * 20000, b"", b"\xef\xbb\xbf" + sent, sent * 2)
        )

    def _spoil_path(self, call: Call) -> str:
        name = self._draw.choice(
            (
                "%00",
                "%2e%2e",
                "a%2Fb",
                "%ff",
                "%ED%A0%80",
                "x" * 3000,
                "%20",
                "MATH",
                "math%0a",
                "0" * 64,
                "*",
                "é",
                "?",
            )
        )
        query = self._draw.choice(("", "?tier=disk", "?tier=device&tier=host", "?tier=%00", "?x=%ff"))
        head, _, _ = call.path.rpartition("/") if "{" in call.template else (call.path, "", "")
        return f"{head}/{name}{query}" if "{" in call.template else f"{call.path}{query}"


def _holders(value: Json) -> Iterator[Json]:
    """Every object and list within."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)


def run_mutated(target: Target, *, seed: int, cases: int, seconds: float) -> tuple[int, list[str]]:
    """Cases sent, at most so many and so long, and the findings, each kind once."""
    mutator = Mutator(target, seed=seed)
    found: dict[str, str] = {}
    num_cases, ends = 0, time.monotonic() + seconds

    def keep(findings: Iterator[Finding]) -> None:
        for finding in findings:
            kind = f"{finding.call.method} {finding.call.template} {finding.fault.rpartition(': ')[2][:60]}"
            found.setdefault(kind, str(finding))

    target.restore()
    keep(mutator.findings_of_valid())
    while num_cases < cases and time.monotonic() < ends:
        keep(mutator.findings_of_next())
        num_cases += 1
    mutator.close()
    return num_cases, list(found.values())
