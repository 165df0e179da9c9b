"""Keeps the keys and values of finished sequences, so that a prompt that begins like one of them starts behind it.

Keys and values depend on the tokens before them and on the mix, so both must be the same. What is kept takes room that
nobody else wants: it is given up, the least recently used first, when a sequence needs it. A match is copied into the
new sequence's own span, so nothing is shared and nothing needs counting. Knows positions, not tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.kv_cache import KvCache, KvSpan

MIN_TOKENS = 16  # less is not worth a copy

MixKey = tuple[tuple[str, str, float], ...]  # name, version and weight of each domain, sorted


@dataclass(frozen=True, slots=True, eq=False)
class KeptPrefix:
    """Tokens whose keys and values under one mix lie in a span, in order."""

    mix: MixKey
    token_ids: NDArray[np.int64]
    span: KvSpan


@dataclass(frozen=True, slots=True)
class Reuse:
    """The first `num_tokens` positions from `source` on may be copied."""

    source: int
    num_tokens: int


class PrefixCache:
    """What is kept in one cache. All room is reserved through it."""

    def __init__(self, kv_cache: KvCache) -> None:
        self._kv_cache = kv_cache
        self._kept: list[KeptPrefix] = []  # the least recently used first

    @property
    def num_positions(self) -> int:
        """Positions that are kept and could be given up."""
        return sum(kept.span.length for kept in self._kept)

    def reserve(self, length: int) -> KvSpan | None:
        """A span of `length` positions; gives up what is kept until there is room. None if there is none even then."""
        span = self._kv_cache.reserve(length)
        while span is None and self._kept:
            self._kv_cache.release(self._kept.pop(0).span)
            span = self._kv_cache.reserve(length)
        return span

    def keep(self, mix: MixKey, token_ids: Sequence[int], span: KvSpan) -> None:
        """Takes over a span that begins with the keys and values of those tokens."""
        if len(token_ids) < MIN_TOKENS:
            self._kv_cache.release(span)
            return
        tokens = np.array(token_ids)
        for kept in [kept for kept in self._kept if kept.mix == mix]:
            if len(kept.token_ids) <= len(tokens) and _num_common(kept.token_ids, tokens) == len(kept.token_ids):
                self._kept.remove(kept)  # the longer one serves whom it served
                self._kv_cache.release(kept.span)
        self._kept.append(KeptPrefix(mix, tokens, self._kv_cache.shrink(span, len(tokens))))

    def find(self, mix: MixKey, prompt_ids: Sequence[int]) -> Reuse | None:
        """The longest beginning of a prompt that is kept. At least one token is left to compute: it is sampled from."""
        tokens = np.array(prompt_ids[:-1])
        best, best_length = None, MIN_TOKENS - 1
        for kept in self._kept:
            if kept.mix == mix and (length := _num_common(kept.token_ids, tokens)) > best_length:
                best, best_length = kept, length
        if best is None:
            return None
        self._kept.remove(best)
        self._kept.append(best)
        return Reuse(best.span.start, best_length)

    def clear(self) -> None:
        """Gives everything up."""
        while self._kept:
            self._kv_cache.release(self._kept.pop().span)


def _num_common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """How many tokens two sequences have in common from the start."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length
