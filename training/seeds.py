"""Derives every seed of a run from the recipe's one. Knows only numbers and names."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**63 that is a function of the parts: the same in every process, unlike `hash`."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
