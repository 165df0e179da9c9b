"""Which frozen stacks are active beside the one that trains. Knows stacks, not how they were made.

The setting `training.context`: `all` is the paper's (section 3.4: every earlier domain at weight 1), `isolated` has
the domain's own earlier rounds only, which is what serving adds when the router chooses this domain alone, and
`sampled` adds each earlier domain with probability one half, drawn anew at each step.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from engine.model.moe_lora import ServingStack, StackPack

Rounds = Sequence[ServingStack]


class Context:
    """The frozen stacks beside a round: the domain's own earlier rounds and, by setting, earlier domains."""

    def __init__(
        self, setting: Literal["all", "isolated", "sampled"], *, own: Rounds, earlier: Mapping[str, Rounds]
    ) -> None:
        self._sampled = setting == "sampled"
        self._own, self._earlier = own, earlier
        self._always = pack_of(earlier if setting == "all" else (), earlier, own)

    def for_step(self, seed: int) -> StackPack | None:
        """What is active at the training step of this seed."""
        if not self._sampled:
            return self._always
        draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
        return pack_of([name for name in self._earlier if draw.random() < 0.5], self._earlier, self._own)

    def for_validation(self) -> StackPack | None:
        """What is active while the stack is judged: what is there at every step."""
        return self._always


def pack_of(names: Iterable[str], domains: Mapping[str, Rounds], own: Rounds = ()) -> StackPack | None:
    """The rounds of the named domains, and these, side by side; None if that is nothing."""
    stacks = [*(stack for name in names for stack in domains[name]), *own]
    return StackPack(stacks) if stacks else None
