"""What the published files do not say and the one who imports them must. Knows numbers, not files."""

from dataclasses import dataclass

from router.features import FeatureSettings
from server.errors import ReferenceRefused

PAPER_RANK = 16
PAPER_SCALE = 4.0  # alpha / sqrt(R) with alpha 16 and R 16 (rsLoRA, as in section 3.1 of the paper)


@dataclass(frozen=True, slots=True)
class StackSettings:
    """How the weights of a stack are computed. Without a scale, it is the paper's."""

    top_k: int = 2
    scale: float | None = None

    def scale_of(self, file: str, rank: int) -> float:
        """The scale of a stack of that rank. ReferenceRefused if none was given and the rank is not the paper's."""
        if self.scale is not None:
            return self.scale
        if rank != PAPER_RANK:
            raise ReferenceRefused(
                f"{file} has rank {rank}, and the scale {PAPER_SCALE} is that of rank {PAPER_RANK}: "
                "name the one that it was trained with (--scale)"
            )
        return PAPER_SCALE


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Where the router lies in the published folder, and what it reads. Without a mid layer, it is the middle one."""

    file: str = "meta_router.pt"
    mid_layer: int | None = None
    mid_weight: float = 0.45
    last_weight: float = 0.55
    max_tokens: int = 256

    def features(self, num_layers: int) -> FeatureSettings:
        """For a base of that many layers, whose hidden states are one more, the embeddings being number 0.

        Raises ReferenceRefused, naming the value, for a layer that the base lacks or a number that cannot be used.
        """
        mid_layer = (num_layers + 1) // 2 if self.mid_layer is None else self.mid_layer
        if mid_layer > num_layers:
            raise ReferenceRefused(f"mid_layer is {mid_layer}, the base has {num_layers} layers")
        try:
            return FeatureSettings(mid_layer, self.mid_weight, self.last_weight, self.max_tokens)
        except ValueError as error:
            raise ReferenceRefused(f"the router's features: {error}") from error
