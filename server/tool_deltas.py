"""Shows the calls in an answer as OpenAI's API has them, as pieces of a stream or whole. Knows JSON, no tokens."""

import uuid
from collections.abc import Sequence

from server.answers import Json
from server.tool_format import ArgumentsCame, CallBegun, CallReader, Piece, Said


class CallDeltas:
    """The deltas of one choice: text, or the beginning of a call with its id and name, or a piece of its arguments."""

    def __init__(self) -> None:
        self._reader = CallReader()
        self.num_calls = 0

    def push(self, text: str) -> list[Json]:
        """What is certain after this text."""
        return [self._delta(piece) for piece in self._reader.push(text)]

    def finish(self) -> list[Json]:
        """What was held back."""
        return [self._delta(piece) for piece in self._reader.finish()]

    @property
    def are_whole(self) -> bool:
        """After `finish`: whether there are calls, and the answer ended within none."""
        return self.num_calls > 0 and not self._reader.is_cut

    def _delta(self, piece: Piece) -> Json:
        match piece:
            case Said(text):
                return {"content": text}
            case CallBegun(name):
                self.num_calls += 1
                call_id = f"call_{uuid.uuid4().hex}"
                function = {"name": name, "arguments": ""}
                return _of_call({"index": self.num_calls - 1, "id": call_id, "type": "function", "function": function})
            case ArgumentsCame(text):
                return _of_call({"index": self.num_calls - 1, "function": {"arguments": text}})


def whole_message(deltas: Sequence[Json]) -> Json:
    """Content and calls of a message, out of all its deltas. Without text the content is null."""
    content = "".join(delta.get("content", "") for delta in deltas)
    calls: list[Json] = []
    for call in (call for delta in deltas for call in delta.get("tool_calls", ())):
        if "id" in call:
            calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
        else:
            calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    return {"content": content or None} | ({"tool_calls": calls} if calls else {})


def _of_call(call: Json) -> Json:
    return {"tool_calls": [call]}
