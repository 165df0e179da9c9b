"""Turns tokens into text as they come. Knows stop strings and unfinished characters, not why tokens come.

A token's text depends on its neighbours (a leading space, a character of several tokens), so text is the difference
between decoding a short window with and without the newest tokens. The window begins in the prompt. Text is held back
while its last character is incomplete, and while its end could become part of a stop string.
"""

from collections.abc import Sequence
from typing import Any

from engine.types import TokenLogprob, TokensEvent

CONTEXT_TOKENS = 6  # of the prompt: enough for a character of several tokens and the word before it
INCOMPLETE = "\ufffd"


class Detokenizer:
    """The text of one sequence."""

    def __init__(
        self, tokenizer: Any, *, prompt_ids: Sequence[int], stop: Sequence[str], include_stop: bool, min_tokens: int = 0
    ) -> None:
        self._decode = tokenizer.backend_tokenizer.decode
        self._window = list(prompt_ids[-CONTEXT_TOKENS:])  # decoded together
        self._num_shown = len(self._window)  # of the window's tokens: those whose text has been taken
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens  # stop strings count only beyond these, as in vLLM
        self._num_tokens = 0
        self._text = ""  # decoded, not yet released
        self._held_ids: list[int] = []
        self._held_logprobs: list[TokenLogprob] = []
        self.stopped = False

    def push(self, token_id: int, logprob: TokenLogprob | None) -> TokensEvent | None:
        """Takes one token; returns what may be shown now, if anything. Sets `stopped` at a complete stop string."""
        self._num_tokens += 1
        self._window.append(token_id)
        self._held_ids.append(token_id)
        if logprob is not None:
            self._held_logprobs.append(logprob)
        piece = self._take_text(complete_only=True)
        self._text += piece
        end = self._stop_end() if self._num_tokens > self._min_tokens else None
        if end is not None:
            self.stopped = True
            return self._release(end)
        return self._release(len(self._text) - self._unsafe_length()) if piece else None

    def finish(self) -> TokensEvent | None:
        """Releases everything held back: the sequence ended for another reason than a stop string."""
        self._text += self._take_text(complete_only=False)
        return self._release(len(self._text)) or (self._event("") if self._held_ids else None)

    def _take_text(self, *, complete_only: bool) -> str:
        """The text of the window's tokens that were not shown yet; none while its last character is incomplete."""
        # A character that the prompt leaves unfinished belongs to the answer, which finishes it.
        shown = self._decode(self._window[: self._num_shown], skip_special_tokens=True)
        before = shown.rstrip(INCOMPLETE)
        whole = self._decode(self._window, skip_special_tokens=True)
        if complete_only and (len(whole) <= len(before) or whole.endswith(INCOMPLETE)):
            return ""
        if shown == before:  # else the tokens shown now begin within a character, and would be no context
            self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return whole[len(before) :]

    def _stop_end(self) -> int | None:
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

    def _release(self, length: int) -> TokensEvent | None:
        text, self._text = self._text[:length], self._text[length:]
        return self._event(text) if text or self.stopped else None

    def _event(self, text: str) -> TokensEvent:
        """An event with every token taken so far: the newest one's text may still be held back in part."""
        event = TokensEvent(text, tuple(self._held_ids), tuple(self._held_logprobs))
        self._held_ids, self._held_logprobs = [], []
        return event
