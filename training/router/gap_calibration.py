"""Calibrates the gap signal of a trained router. Knows which prompts are inside and outside, not how scores come.

Inside are the prompts of the recipe's domains: those that validate the router choose the threshold, and those of the
records that the recipe holds out, which chose nothing, check it. Outside is a file that the recipe names: one half of
its prompts stands beside the former, the other beside the latter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from router.network import MetaRouter
from training.data.preparation import PreparedData
from training.recipe import Recipe
from training.router.features import FeatureReader
from training.router.gap import gap_threshold, measure_gap, read_out_of_domain
from training.router.metrics import predict_logits
from training.router.prompts import split_by_prompt
from training.router.reports import GapReport
from training.router.watch import OnPrompt


@dataclass(frozen=True, slots=True, eq=False)
class GapPrompts:
    """Texts on both sides of the domains; the validation prompts are not among them, their features are known."""

    held_out: Sequence[str]
    outside: Sequence[str]
    other_outside: Sequence[str]


def gap_prompts(recipe: Recipe, data: PreparedData) -> GapPrompts | None:
    """None if the recipe names no prompts outside of its domains. Raises DataUnusable for a file that is unsound."""
    name = recipe.settings.router.out_of_domain
    if name is None:
        return None
    outside = read_out_of_domain(recipe.folder / name)
    one_half, other_half = split_by_prompt(outside, validation_share=0.5, seed=recipe.settings.seed)
    return GapPrompts(
        held_out=[record.prompt for records in data.domains.values() for record in records.held_out],
        outside=[outside[row] for row in one_half],
        other_outside=[outside[row] for row in other_half],
    )


def calibrate_gap(
    recipe: Recipe,
    network: MetaRouter,
    *,
    validation: Sequence[Tensor],
    prompts: GapPrompts | None,
    reader: FeatureReader,
    on_prompt: OnPrompt,
) -> GapReport:
    """The threshold and what it does; without prompts to calibrate with it is the policy's own."""
    section = recipe.settings.router
    if prompts is None:
        return GapReport(section.threshold, section.gap_false_alarms, calibration=None, check=None)

    def highest(texts: Sequence[str]) -> list[float]:
        return _highest_scores(network, reader.read(texts, on_prompt))

    known = _highest_scores(network, validation)
    threshold = gap_threshold(known, max_false_alarms=section.gap_false_alarms)
    return GapReport(
        threshold=threshold,
        allowed_false_alarms=section.gap_false_alarms,
        calibration=measure_gap(known, highest(prompts.outside), threshold=threshold),
        check=measure_gap(highest(prompts.held_out), highest(prompts.other_outside), threshold=threshold),
    )


def _highest_scores(network: MetaRouter, features: Sequence[Tensor]) -> list[float]:
    """The highest raw score of each prompt."""
    scores: list[float] = predict_logits(network, features).sigmoid().amax(dim=1).tolist()
    return scores
