"""Turns tokens into text as they come. Knows stop strings and unfinished characters, not why tokens come.

Text is held back while it could still become part of a stop string, and while its last character is incomplete.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream

from engine.types import TokenLogprob, TokensEvent


@dataclass(frozen=True, slots=True)
class _Held:
    token_id: int
    logprob: TokenLogprob | None


class Detokenizer:
    """The text of one sequence."""

    def __init__(self, tokenizer: Any, *, stop: Sequence[str], include_stop: bool) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._text = ""  # decoded, not yet released
        self._held: list[_Held] = []
        self._all_ids: list[int] = []
        self._decoded_length = 0
        self.stopped = False

    def push(self, token_id: int, logprob: TokenLogprob | None) -> TokensEvent | None:
        """Takes one token; returns what may be shown now, if anything. Sets `stopped` at a complete stop string."""
        self._held.append(_Held(token_id, logprob))
        self._all_ids.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id)
        if piece:
            self._text += piece
            self._decoded_length += len(piece)
        found = self._find_stop()
        if found is not None:
            self.stopped = True
            return self._release(found)
        return self._release(len(self._text) - self._unsafe_length()) if piece else None

    def finish(self) -> TokensEvent | None:
        """Releases everything held back: the sequence ended for another reason than a stop string."""
        # The stream never gives an incomplete character; decoding everything shows it as a replacement character.
        whole = self._tokenizer.decode(self._all_ids, skip_special_tokens=True)
        self._text += whole[self._decoded_length :]
        return self._release(len(self._text), last=True)

    def _find_stop(self) -> int | None:
        """Where the text ends because of the stop string that completes first, or None."""
        hits = [(self._text.find(stop), stop) for stop in self._stop if stop in self._text]
        if not hits:
            return None
        start, stop = min(hits, key=lambda hit: hit[0] + len(hit[1]))
        return start + len(stop) if self._include_stop else start

    def _unsafe_length(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, length: int, *, last: bool = False) -> TokensEvent | None:
        text, self._text = self._text[:length], self._text[length:]
        if not (text or self.stopped or (last and self._held)):
            return None
        # Tokens go out with the text they complete; while text is held back, so is the newest token.
        held, self._held = self._held, []
        logprobs = tuple(item.logprob for item in held if item.logprob is not None)
        return TokensEvent(text, tuple(item.token_id for item in held), logprobs)
