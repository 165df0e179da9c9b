"""One request on its way through the engine. Knows its tokens, its span and its times, not the batch it runs in."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.detokenizer import Detokenizer
from engine.kv_cache import KvSpan
from engine.sampling import RowSampler
from engine.types import Event, FinishedEvent, FinishReason, GenerationRequest, TokenLogprob


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's state; touched by the engine's thread alone."""

    request: GenerationRequest
    on_event: Callable[[Event], None]
    sampler: RowSampler
    detokenizer: Detokenizer
    token_ids: list[int]  # prompt, then output
    num_computed: int = 0  # tokens whose keys and values are in the cache
    num_reused: int = 0  # of them, those that another sequence computed
    span: KvSpan | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    first_token_at: float | None = None

    @property
    def num_pending(self) -> int:
        """Tokens that still have to pass through the model before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output(self) -> int:
        """Tokens produced so far."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_positions(self) -> int:
        """Cache positions that the sequence may come to need: the last token is never fed back."""
        return len(self.request.prompt_ids) + max(self.request.sampling.max_tokens - 1, 0)

    def finished(self, reason: FinishReason) -> FinishedEvent:
        """The sequence's last event, with the seconds of each phase."""
        now = time.monotonic()
        started = self.started_at if self.started_at is not None else now
        first = self.first_token_at if self.first_token_at is not None else now
        seconds = {"queue": started - self.submitted_at, "prefill": first - started, "decode": now - first}
        return FinishedEvent(reason, len(self.request.prompt_ids), self.num_output, seconds)


def new_sequence(
    request: GenerationRequest, on_event: Callable[[Event], None], *, tokenizer: Any, eos_token_ids: frozenset[int]
) -> Sequence:
    """A sequence that has computed nothing yet."""
    sampling = request.sampling
    return Sequence(
        request=request,
        on_event=on_event,
        sampler=RowSampler(sampling, frozenset(request.prompt_ids), eos_token_ids),
        detokenizer=Detokenizer(
            tokenizer,
            prompt_ids=request.prompt_ids,
            stop=sampling.stop,
            include_stop=sampling.include_stop,
            min_tokens=sampling.min_tokens,
        ),
        token_ids=list(request.prompt_ids),
    )
