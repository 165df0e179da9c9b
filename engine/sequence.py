"""One request on its way through the engine. Knows its tokens, its blocks and its times, not the batch it runs in."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from engine.block_table import BLOCK_TOKENS, BlockTable
from engine.detokenizer import Detokenizer
from engine.kv_cache import BlockKey, block_key, root_key
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
    root_key: BlockKey
    read_layer: int | None = None
    num_computed: int = 0  # tokens whose keys and values are in the cache
    num_reused: int = 0  # of the prompt's, those that were there when the sequence first started
    table: BlockTable = field(default_factory=BlockTable)
    block_keys: list[BlockKey] = field(default_factory=list)  # of the first full blocks, made as they are wanted
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    states: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # chunk by chunk, of what is only read
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
    def is_read_only(self) -> bool:
        """Whether nothing is generated: hidden states are all that is wanted."""
        return self.read_layer is not None

    @property
    def is_at_its_end(self) -> bool:
        """Whether the model has read all but its last token, and the next one will be sampled."""
        return self.num_pending == 1 and not self.is_read_only

    @property
    def states_layer(self) -> int | None:
        """Behind which layer, and the norm, the hidden states of its next tokens are wanted; then none may be skipped.

        Prompt logprobs want what is behind the norm only.
        """
        wants_prompt_logprobs = self.request.sampling.prompt_logprobs is not None and self.num_output == 0
        return 0 if wants_prompt_logprobs else self.read_layer

    def keys(self, num: int) -> list[BlockKey]:
        """The keys of the first `num` blocks, all of whose tokens are known."""
        for number in range(len(self.block_keys), num):
            tokens = self.token_ids[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS]
            self.block_keys.append(block_key(self.block_keys[-1] if number else self.root_key, tokens))
        return self.block_keys[:num]

    def start(self, table: BlockTable, num_known: int) -> None:
        """The sequence runs from now on; the cache holds its first `num_known` tokens."""
        self.table, self.num_computed = table, num_known
        if self.started_at is None:
            self.num_reused, self.started_at = num_known, time.monotonic()

    def start_over(self) -> None:
        """The cache holds nothing of the sequence any more; its tokens stay, and what was told of them."""
        self.table, self.num_computed = BlockTable(), 0
        self.states.clear()
        if self.states_layer is not None:
            self.prompt_logprobs.clear()

    def finished(self, reason: FinishReason) -> FinishedEvent:
        """The sequence's last event, with the seconds of each phase."""
        now = time.monotonic()
        started = self.started_at if self.started_at is not None else now
        first = self.first_token_at if self.first_token_at is not None else now
        seconds = {"queue": started - self.submitted_at, "prefill": first - started, "decode": now - first}
        return FinishedEvent(reason, len(self.request.prompt_ids), self.num_output, seconds)


def new_sequence(
    request: GenerationRequest,
    on_event: Callable[[Event], None],
    *,
    tokenizer: Any,
    eos_token_ids: frozenset[int],
    read_layer: int | None = None,
) -> Sequence:
    """A sequence that has computed nothing yet; with `read_layer`, one that is only read."""
    sampling = request.sampling
    mix = sorted((domain.name, domain.version, weight) for domain, weight in request.mix)
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
        root_key=root_key(tuple(mix)),
        read_layer=read_layer,
    )
