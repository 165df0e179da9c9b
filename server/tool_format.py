"""How a call of a tool is written in an answer, and read back from it as it comes. Knows text, no tokens.

A call is written as Qwen's and Hermes' chat templates have it:

    <tool_call>
    {"name": "f", "arguments": {"x": 1}}
    </tool_call>

Its frame is fixed to the character, and its JSON has no line break, so the arguments end where CALL_END begins. An
answer is text and then calls, or calls, or JSON alone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CALL_MARK = "<tool_call>"
CALL_BEGIN = CALL_MARK + '\n{"name": "'
NAME_END = '", "arguments": '
CALL_END = "}\n</tool_call>"
JSON_BEGINS = tuple('{["')  # with what can hold the mark of a call


def write_call(name: str, arguments: Mapping[str, Any] | str) -> str:
    """A call as the model writes it; arguments that are a text stand as they are."""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{CALL_BEGIN}{name}{NAME_END}{written}{CALL_END}"


@dataclass(frozen=True, slots=True)
class Said:
    """Text outside of calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The name of the next call is known."""

    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsCame:
    """A piece of the arguments of the call that was begun last."""

    text: str


Piece = Said | CallBegun | ArgumentsCame


class CallReader:
    """Takes an answer's text piece by piece. Holds back what may turn out to belong to a call's frame, and no more."""

    def __init__(self) -> None:
        self._held = ""
        self._ends_with = CALL_BEGIN  # what ends the part of the answer that is being read
        self._opening = ""  # the first character that was said
        self.is_cut = False  # whether the answer ended within a call; known after `finish`

    def push(self, text: str) -> list[Piece]:
        """What is certain now, in the order in which it was written."""
        self._held += text
        pieces: list[Piece] = []
        while self._ends_with in self._held:
            part, _, self._held = self._held.partition(self._ends_with)
            pieces += self._part(part.rstrip() if self._ends_with == CALL_BEGIN else part)
            self._ends_with = {CALL_BEGIN: NAME_END, NAME_END: CALL_END, CALL_END: CALL_BEGIN}[self._ends_with]
        if self._ends_with != NAME_END:  # a name is told when it is whole
            certain = len(self._held) - _overlap(self._held, self._ends_with)
            if self._ends_with == CALL_BEGIN:  # space before a call belongs to neither
                certain = len(self._held[:certain].rstrip())
            pieces += self._part(self._held[:certain])
            self._held = self._held[certain:]
        return [piece for piece in pieces if piece not in (Said(""), ArgumentsCame(""))]

    def finish(self) -> list[Piece]:
        """What was held back: the answer ended here. A frame that was cut is nobody's text."""
        rest, self._held = self._held, ""
        if self._ends_with != CALL_BEGIN:
            self.is_cut = self._ends_with == NAME_END or "\n" not in rest  # a line break is the frame's: all came
            return []
        if rest.lstrip().startswith(CALL_MARK) and not self._opening.startswith(JSON_BEGINS):
            self.is_cut = True
            return []
        return [piece for piece in self._part(rest) if piece != Said("")]

    def _part(self, text: str) -> list[Piece]:
        if self._ends_with == NAME_END:
            return [CallBegun(text)]
        if self._ends_with == CALL_END:
            return [ArgumentsCame(text)]
        if not self._opening:
            text = text.lstrip()
            self._opening = text[:1]
        return [Said(text)]


def _overlap(text: str, end: str) -> int:
    """How many characters at the end of the text may be the beginning of `end`."""
    return next((n for n in range(min(len(end) - 1, len(text)), 0, -1) if end.startswith(text[-n:])), 0)
