"""Reads and writes mixes as people type them: `math=0.9 chat=0.2`. Knows texts and numbers, not which domains exist."""

from collections.abc import Mapping, Sequence


def parse_mix(entries: Sequence[str]) -> dict[str, float]:
    """Each entry is DOMAIN=WEIGHT with a weight in [0, 1]. ValueError, naming the entry, for what is not."""
    mix = {}
    for entry in entries:
        domain, _, text = entry.partition("=")
        try:
            weight = float(text)
        except ValueError:
            raise ValueError(f"a mix is DOMAIN=WEIGHT, got {entry!r}") from None
        if not domain or not 0 <= weight <= 1:  # NaN is not in it either
            raise ValueError(f"a mix is DOMAIN=WEIGHT with a weight from 0 to 1, got {entry!r}")
        mix[domain] = weight
    return mix


def show_weights(weights: Mapping[str, float]) -> str:
    """`math=0.93 chat=0.20`, the heaviest first."""
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    return " ".join(f"{domain}={weight:.2f}" for domain, weight in ordered)
