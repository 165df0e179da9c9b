"""Turns an outcome into what the router learns. Knows names and numbers, no network.

A target is a number in [0, 1] per domain: 1.0 for a member of the best combination, 0.5 for a soft domain that helps,
0 for the others; four fifths of that, and one fifth of the label (Brainstacks paper, section 3.6).
"""

from collections.abc import Sequence

from training.discovery.combinations import DomainName, Outcome

SOFT_TARGET = 0.5
LABEL_SHARE = 0.2


def discovered_row(outcome: Outcome, domains: Sequence[DomainName]) -> tuple[float, ...]:
    """(D,): what was discovered alone, in the order of the domains."""
    return tuple(SOFT_TARGET if name in outcome.soft else 1.0 if name in outcome.best else 0.0 for name in domains)


def target_row(outcome: Outcome, *, label: DomainName, domains: Sequence[DomainName]) -> tuple[float, ...]:
    """(D,): what was discovered, blended with the label, in the order of the domains. Raises ValueError for a label
    that is none of them."""
    if label not in domains:
        raise ValueError(f"label {label!r} is none of the domains {list(domains)}")
    return tuple(
        (1 - LABEL_SHARE) * found + LABEL_SHARE * (name == label)
        for name, found in zip(domains, discovered_row(outcome, domains), strict=True)
    )


def positive_row(outcome: Outcome, domains: Sequence[DomainName]) -> tuple[bool, ...]:
    """(D,): which domains help, in the order of the domains. The label has no say in it."""
    return tuple(name in outcome.positive for name in domains)
