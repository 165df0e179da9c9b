"""Tells people what an import did. Knows numbers and names, no formats."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from router.checkpoint import RouterCheckpoint
from server.reference_import.conversion import ConvertedStack

Converted = Mapping[str, tuple[ConvertedStack, ...]]  # domain -> rounds in order


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What was imported, or would be."""

    base_fingerprint: str
    stacks: Converted
    router: RouterCheckpoint | None
    generation: int | None  # of the store; None after a dry run

    def lines(self) -> Iterator[str]:
        """For people: one line per domain, what was dropped, the router, the outcome."""
        yield f"base     {self.base_fingerprint}"
        for name, rounds in self.stacks.items():
            yield f"domain   {name}: {', '.join(f'round {i} {r.digest[:12]}' for i, r in enumerate(rounds, start=1))}"
        stacks = [stack for rounds in self.stacks.values() for stack in rounds]
        num_vision = sum(stack.num_vision_tensors for stack in stacks)
        yield f"dropped  {num_vision} vision tensors, {sum(stack.num_noise_tensors for stack in stacks)} noise tensors"
        if self.router is not None:
            policy, features = self.router.policy, self.router.settings
            yield (
                f"router   {', '.join(self.router.network.domains)}: floor {policy.floor:g} of {policy.floor_domain}, "
                f"threshold {policy.threshold:g}, mid layer {features.mid_layer}, {features.max_tokens} tokens"
            )
        yield "dry run: nothing was changed" if self.generation is None else f"store is at generation {self.generation}"
