"""The words that the engine and its callers share. Knows no queues, no HTTP."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from engine.grammar import Grammar
from engine.slots import ResidentDomain

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence picks its tokens. Raises ValueError that names the field and the value."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False  # whether the stop string stays in the text
    repetition_penalty: float = 1.0  # over prompt and output, as in the CTRL paper, section 4.1
    presence_penalty: float = 0.0  # over the output only, as in OpenAI's API
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    logprobs: int | None = None  # None is off; else how many alternatives beside the chosen token
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None  # the text stays inside it, and ends with it, whatever min_tokens and ignore_eos say

    def __post_init__(self) -> None:
        _check_range("max_tokens", self.max_tokens, 0, math.inf)
        _check_range("min_tokens", self.min_tokens, 0, max(self.max_tokens, 0))
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("top_k", self.top_k, 0, math.inf)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None:
                _check_range(name, count, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        if "" in self.stop:
            raise ValueError("stop must not hold an empty string")
        for token_id, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. The caller holds the leases of the mix until the last event."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    mix: tuple[tuple[ResidentDomain, float], ...] = ()  # empty: the base alone


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural-log probability under the model's own distribution, before temperature and penalties."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log probability), most likely first


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """The prompt is in the cache. Logprobs, if asked for, have one entry a prompt token; the first is None."""

    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    cached_tokens: int = 0  # of the prompt, those whose keys and values were there already


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """New text and the tokens taken since the last event. Text that may change still comes with a later event."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The last event of a sequence that ended by itself, by its limit, or by its caller's wish."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seconds: Mapping[str, float]  # queue, prefill, decode


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """The last event of a sequence that the engine could not go on with."""

    error: Exception


@dataclass(frozen=True, slots=True)
class StatesEvent:
    """The last event of a text that was only read: hidden states (T, H) behind a layer, and behind the final norm."""

    mid: Tensor
    last: Tensor


Event = PromptEvent | TokensEvent | FinishedEvent | FailedEvent | StatesEvent


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """What the engine was doing after its latest step."""

    running: int
    waiting: int
    kv_used_ratio: float
    steps: int
    preempted: int  # how often a sequence gave its blocks up for an older one
