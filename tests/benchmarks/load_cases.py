"""What the clients of the load test ask: questions with known answers, and requests that must be refused.

A case is asked again and again, each time with the same answer: greedy or seeded, in float32, whoever else is there.
"""

import json
from dataclasses import dataclass
from random import Random
from typing import Any

SUBJECTS = (
    "a pump and a valve", "iron deficiency", "a list that is sorted twice", "half of 48", "why the sky is blue",
    "a letter to a neighbour", "prime numbers below 30", "a cough that does not end", "Grüße aus Köln", "日本の首都",
    "recursion in Python", "a train that leaves at noon",
)  # fmt: skip
MIXES: tuple[dict[str, Any], ...] = (
    {},
    {"brainstacks": {"mode": "base"}},
    {"brainstacks": {"mix": {"math": 1.0}}},
    {"brainstacks": {"mix": {"chat": 0.2, "code": 0.7}}},
    {"brainstacks": {"mix": {"medical": 0.35, "reasoning": 0.9, "math": 0.1}}},
    {"brainstacks": {"mode": "all"}},
)
MAX_TOKENS = (1, 4, 8, 16, 24)


@dataclass(frozen=True, slots=True)
class BadRequest:
    """Something that no server should answer, and what it must say instead."""

    name: str
    content: bytes
    status: int


def good_requests(count: int, *, seed: int, tokens: tuple[int, ...] = MAX_TOKENS) -> list[dict[str, Any]]:
    """So many chats that differ in question, mix, length and sampling; every fourth is sampled with a seed."""
    random = Random(seed)
    requests = []
    for number in range(count):
        text = f"Tell me about {SUBJECTS[number % len(SUBJECTS)]}."
        drawn = {"temperature": 0.9, "top_p": 0.9, "seed": number} if number % 4 == 3 else {"temperature": 0}
        requests.append(
            {
                "messages": [{"role": "user", "content": text}],
                "max_tokens": random.choice(tokens),
                **MIXES[number % len(MIXES)],
                **drawn,
            }
        )
    return requests


def bad_requests(model: str) -> list[BadRequest]:
    """One of each kind."""
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": True}

    def bad(name: str, status: int = 400, **fields: Any) -> BadRequest:
        return BadRequest(name, json.dumps(chat | fields).encode(), status)

    return [
        BadRequest("malformed JSON", b'{"messages": [{"role": "user"', 400),
        BadRequest("not an object", b"[1, 2, 3]", 400),
        BadRequest("no UTF-8", b'{"messages": "\xff\xfe"}', 400),
        bad("unknown model", 404, model="gpt-nobody"),
        bad("unknown domain as model", 404, model=f"{model}:astrology"),
        bad("unknown domain in mix", 404, brainstacks={"mix": {"astrology": 1.0}}),
        bad("weight above one", brainstacks={"mix": {"math": 7.0}}),
        bad("negative weight", brainstacks={"mix": {"math": -0.5}}),
        bad("mix and mode", brainstacks={"mix": {"math": 1.0}, "mode": "base"}),
        bad("text as temperature", temperature="hot"),
        bad("text as max_tokens", max_tokens="many"),
        bad("messages that are none", messages="Hello"),
        bad("no messages", messages=[]),
        bad("unknown role", messages=[{"role": "wizard", "content": "Hello"}]),
        bad("too long prompt", messages=[{"role": "user", "content": "word " * 4000}]),
        bad("too many tokens", max_tokens=10**6),
    ]
