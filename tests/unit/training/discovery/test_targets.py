"""A target is four fifths of what was discovered and one fifth of the label."""

import pytest

from training.discovery.combinations import Outcome
from training.discovery.targets import discovered_row, positive_row, target_row

DOMAINS = ("chat", "math", "medical", "reasoning")


def outcome(best: set[str], soft: set[str]) -> Outcome:
    return Outcome(frozenset(best), frozenset(soft), {})


def test_members_count_one_and_soft_domains_a_half_in_the_best_combination_or_beside_it() -> None:
    assert discovered_row(outcome({"chat", "math"}, set()), DOMAINS) == (1.0, 1.0, 0.0, 0.0)
    assert discovered_row(outcome({"math"}, {"reasoning"}), DOMAINS) == (0.0, 1.0, 0.0, 0.5)
    assert discovered_row(outcome({"math", "reasoning"}, {"reasoning"}), DOMAINS) == (0.0, 1.0, 0.0, 0.5)


def test_the_label_adds_a_fifth() -> None:
    found = outcome({"chat", "math"}, {"reasoning"})
    assert target_row(found, label="medical", domains=DOMAINS) == pytest.approx((0.8, 0.8, 0.2, 0.4))
    assert target_row(found, label="math", domains=DOMAINS) == pytest.approx((0.8, 1.0, 0.0, 0.4))
    assert target_row(outcome(set(), set()), label="chat", domains=DOMAINS) == pytest.approx((0.2, 0.0, 0.0, 0.0))


def test_positive_domains_are_those_that_help_whatever_the_label() -> None:
    assert positive_row(outcome({"math"}, {"reasoning"}), DOMAINS) == (False, True, False, True)
    assert positive_row(outcome(set(), set()), DOMAINS) == (False, False, False, False)


def test_a_label_that_is_no_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="'law'"):
        target_row(outcome(set(), set()), label="law", domains=DOMAINS)
