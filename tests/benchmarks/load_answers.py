"""Puts a streamed answer together and compares it with its reference. Knows OpenAI's chunks, not how they come."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """A request and the answer of the idle server."""

    request: dict[str, Any]
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    mix: dict[str, float]


class StreamedAnswer:
    """A stream so far."""

    def __init__(self) -> None:
        self.text = ""
        self.error: dict[str, Any] | None = None
        self._finish_reasons: list[str] = []
        self._usage: dict[str, int] | None = None
        self._mix: dict[str, float] | None = None
        self._num_done = 0
        self._id: str | None = None
        self._faults: list[str] = []

    def take(self, event: str) -> None:
        """Reads one event."""
        if self._num_done:
            self._faults.append(f"an event behind the end: {event}")
        if event == "[DONE]":
            self._num_done += 1
            return
        body = json.loads(event)
        if "error" in body:
            self.error = body["error"]
            return
        if self._id not in (None, body["id"]):
            self._faults.append(f"an event of another answer: {event}")
        self._id = body["id"]
        self._usage = body.get("usage") or self._usage
        self._mix = body["brainstacks"]["mix"] if "brainstacks" in body else self._mix
        for choice in body["choices"]:
            if self._finish_reasons:
                self._faults.append(f"text behind the finish reason: {event}")
            self.text += choice["delta"].get("content") or ""
            if choice["finish_reason"] is not None:
                self._finish_reasons.append(choice["finish_reason"])

    def straying(self, case: Case) -> str | None:
        """What a stream that was left, and may have asked for more tokens, said otherwise than the reference."""
        can_go_on = case.finish_reason == "length"
        known = case.text.rstrip("\ufffd") if can_go_on else case.text  # a character that was cut may be whole here
        is_right = known.startswith(self.text) or (can_go_on and self.text.startswith(known))
        if self.error is None and not self._faults and is_right:
            return None
        return f"left with {self.text!r} for {case.text!r}, error {self.error!r}, faults {self._faults!r}"

    def difference(self, case: Case) -> str | None:
        """From the reference, in words; None if there is none."""
        usage = self._usage or {}
        facts = {
            "error": (self.error, None),
            "faults": (self._faults, []),
            "text": (self.text, case.text),
            "finish reasons": (self._finish_reasons, [case.finish_reason]),
            "ends": (self._num_done, 1),
            "completion tokens": (usage.get("completion_tokens"), case.completion_tokens),
            "prompt tokens": (usage.get("prompt_tokens"), case.prompt_tokens),
            "mix": (self._mix, case.mix),
        }
        wrong = [f"{name} {had!r} for {wanted!r}" for name, (had, wanted) in facts.items() if had != wanted]
        return "; ".join(wrong) or None
