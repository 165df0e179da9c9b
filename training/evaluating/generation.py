"""Continues texts greedily under one mix, by transformers' own `generate` and its cache. Knows no harness.

Letters: N rows, L the longest prompt.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from engine.model.base import Base
from engine.model.inject import injected
from engine.model.moe_lora import ServingDeltas, ServingStack
from training.context import pack_of

Mix = Mapping[str, float]
BATCH_TOKENS = 8192  # prompts and new tokens of a batch


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to be continued under a mix, up to a stop string."""

    token_ids: tuple[int, ...]
    mix: Mix
    max_new_tokens: int
    stops: tuple[str, ...]

    @property
    def group(self) -> str:
        """The same for prompts that may share a batch."""
        return repr((sorted(self.mix.items()), self.max_new_tokens, self.stops))


class GreedyTexts:
    """Generates with these frozen domains."""

    def __init__(self, base: Base, domains: Mapping[str, Sequence[ServingStack]]) -> None:
        self._base, self._domains = base, domains

    def texts(self, prompts: Sequence[Prompt], wanted: Sequence[int]) -> Iterator[Mapping[int, str]]:
        """What follows the wanted prompts, by their index, batch by batch; each text up to its own end."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index in sorted(wanted, key=lambda index: -len(prompts[index].token_ids)):
            groups[prompts[index].group].append(index)
        for group in groups.values():
            longest = prompts[group[0]]
            num_rows = max(1, BATCH_TOKENS // (len(longest.token_ids) + longest.max_new_tokens))
            for start in range(0, len(group), num_rows):
                batch = group[start : start + num_rows]
                yield dict(zip(batch, self._continue([prompts[index] for index in batch]), strict=True))

    def _continue(self, prompts: Sequence[Prompt]) -> list[str]:
        """N prompts of one group -> N texts."""
        mix, stops = prompts[0].mix, prompts[0].stops
        ids, mask = self._pad_left([prompt.token_ids for prompt in prompts])
        stopping = _StopStrings(self._base.tokenizer, prompt_length=ids.shape[1], stops=stops)
        generate: Any = self._base.model.generate
        with torch.no_grad(), injected(self._base.sites, self._deltas(mix)):
            output: Tensor = generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._config(prompts[0].max_new_tokens),
                stopping_criteria=StoppingCriteriaList([stopping]),
            )
        return [self._cut(row.tolist(), stops) for row in output[:, ids.shape[1] :]]

    def _deltas(self, mix: Mix) -> ServingDeltas:
        """Deltas that weigh every token alike, so that they fit a prompt and a single new token."""
        names = [name for name in self._domains if mix.get(name)]
        pack = pack_of(names, self._domains)
        deltas = ServingDeltas()
        if pack is not None:
            deltas.current = pack.step(torch.tensor([[mix[name] for name in names for _ in self._domains[name]]]))
        return deltas

    def _config(self, max_new_tokens: int) -> GenerationConfig:
        """Greedy, whatever the base's own file of defaults says."""
        return GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            eos_token_id=sorted(self._base.eos_token_ids),
            pad_token_id=min(self._base.eos_token_ids),
        )

    def _pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(N, L) ids and (N, L) mask: on the left, so that every row's next token comes at the same place."""
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self._base.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _cut(self, token_ids: list[int], stops: Sequence[str]) -> str:
        ends = [place for place, token_id in enumerate(token_ids) if token_id in self._base.eos_token_ids]
        text = _decode(self._base.tokenizer, token_ids[: min(ends, default=len(token_ids))])
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class _StopStrings(StoppingCriteria):
    """A row is done once its new text contains a stop string."""

    def __init__(self, tokenizer: Any, *, prompt_length: int, stops: Sequence[str]) -> None:
        self._tokenizer, self._prompt_length, self._stops = tokenizer, prompt_length, stops

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = [_decode(self._tokenizer, row) for row in input_ids[:, self._prompt_length :].tolist()]
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
