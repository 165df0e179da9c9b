"""Keeps an answer inside a grammar: compiles one for the base's vocabulary, and says which tokens may come next.

Knows llguidance, tokens and bytes; not what a grammar is for. Grammars are compiled in threads of their own, the first
set of allowed tokens with them, so that the engine's thread only advances what is ready. Letters: V vocabulary of the
logits.
"""

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from hashlib import sha256
from typing import Any

import numpy as np
from cachetools import LRUCache
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from engine.errors import GrammarBusy, GrammarTooComplex, GrammarUnsupported

logger = logging.getLogger(__name__)

MAX_KEPT = 64
MAX_PENDING = 64
NUM_THREADS = 2
MAX_SHOWN_CHARACTERS = 500  # of what the library says about a grammar
NUM_TRIED = 3  # tokens
WORD_BITS = 32


class GrammarState:
    """Where one answer stands in its grammar; touched by the engine's thread alone once it is started."""

    def __init__(self, matcher: LLMatcher, num_words: int) -> None:
        self._matcher = matcher
        self._words = np.zeros(num_words, dtype=np.uint32)
        self.error: GrammarTooComplex | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing can follow but its end."""
        return self.error is None and self._matcher.is_stopped()

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]:
        """(V,) whether each token may come next. All of them once there is an `error`."""
        if self.error is None:
            self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
            self._note_error()
        if self.error is not None:
            return np.ones(vocabulary, dtype=np.bool_)
        bits = np.unpackbits(self._words.view(np.uint8), count=vocabulary, bitorder="little")
        return bits.view(np.bool_)

    def take(self, token_id: int) -> None:
        """Goes on by a token that was allowed."""
        if self.error is None and not self._matcher.consume_token(token_id):
            self._note_error()

    def _note_error(self) -> None:
        if self._matcher.is_error():
            self.error = GrammarTooComplex(f"the grammar cannot be followed any further: {_said(self._matcher)}")


class Grammar:
    """A compiled grammar, from which any number of answers start, in any thread."""

    def __init__(self, matcher: LLMatcher, *, vocabulary: int) -> None:
        """Takes the matcher over. Raises GrammarUnsupported, with the reason, if it has not become one."""
        self._num_words = -(-vocabulary // WORD_BITS)
        self._matcher = matcher
        # What this finds out about the vocabulary is shared by all copies: no answer's first token waits for it.
        GrammarState(matcher, self._num_words).allowed(vocabulary)
        if matcher.is_error():
            raise GrammarUnsupported(_said(matcher))
        self._try_out(vocabulary)

    def _try_out(self, vocabulary: int) -> None:
        """What can never be followed fails here, and not in an answer."""
        state = self.start()
        for _ in range(NUM_TRIED):
            if state.is_complete:
                return
            state.take(int(state.allowed(vocabulary).argmax()))
            if state.error is not None:
                raise GrammarUnsupported(str(state.error))

    def start(self) -> GrammarState:
        """An answer that has no token yet."""
        return GrammarState(self._matcher.deep_copy(), self._num_words)


class GrammarCompiler:
    """Compiles grammars and keeps the latest by their digest. Safe to call from any thread."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, eos_token_ids: frozenset[int]) -> None:
        """Reads the vocabulary: a second or several, for which Python's lock is held. So not while requests run."""
        # A tokenizer may have tokens for which the model has no logits: they are never chosen.
        self._vocabulary = vocabulary = max(vocabulary, max(tokenizer.get_vocab().values()) + 1)
        self._tokens = _read_vocabulary(tokenizer, vocabulary, eos_token_ids)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._kept: LRUCache[str, Future[Grammar]] = LRUCache(MAX_KEPT)
        self._num_pending = 0

    def compile(self, text: str) -> "Future[Grammar]":
        """The grammar that `text` writes in llguidance's form of Lark; compiled once however many ask for it.

        Raises GrammarBusy if too many are being compiled. The future raises GrammarUnsupported, with the reason.
        """
        digest = sha256(text.encode()).hexdigest()
        with self._lock:
            if (kept := self._kept.get(digest)) is not None:
                return kept
            if self._num_pending >= MAX_PENDING:
                raise GrammarBusy(f"{self._num_pending} schemas are being compiled already")
            self._num_pending += 1
            future = self._threads.submit(self._compile, text)
            self._kept[digest] = future
        future.add_done_callback(lambda done: self._settle(digest, done))
        return future

    def close(self) -> None:
        """Starts nothing more. What is being compiled is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _settle(self, digest: str, done: "Future[Grammar]") -> None:
        with self._lock:
            self._num_pending -= 1
            if (done.cancelled() or done.exception() is not None) and self._kept.get(digest) is done:
                del self._kept[digest]

    def _compile(self, text: str) -> Grammar:
        if self._tokens is None:
            raise GrammarUnsupported("this base's tokenizer is of a kind that grammars are not supported for")
        began = time.monotonic()
        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(text), log_level=0, limits=_limits())
        grammar = Grammar(matcher, vocabulary=self._vocabulary)
        logger.info("grammar compiled characters=%d seconds=%.3f", len(text), time.monotonic() - began)
        return grammar


def _read_vocabulary(tokenizer: Any, vocabulary: int, eos_token_ids: frozenset[int]) -> LLTokenizer | None:
    """The tokens' bytes, None if the library cannot tell them."""
    backend = tokenizer.backend_tokenizer
    if backend.padding is not None or backend.truncation is not None:
        backend = copy(backend)  # which takes as long as the rest
        backend.no_padding()
        backend.no_truncation()
    try:
        return LLTokenizer(backend.to_str(), n_vocab=vocabulary, eos_token=sorted(eos_token_ids))
    except ValueError as error:
        logger.warning("no grammars for this base reason=%r", str(error))
        return None


def _limits() -> LLParserLimits:
    """Bounds on memory, and on the time of one step, which everybody's rows wait for."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_items_in_row=3_000,
        max_lexer_states=50_000,
        max_grammar_size=50_000,
        verbose_errors=False,
    )


def _said(matcher: LLMatcher) -> str:
    """The library's own words, in one line, without its notes on where in its source it was."""
    return " ".join(matcher.get_error().split())[:MAX_SHOWN_CHARACTERS]
