"""Chooses the threshold of the gap signal and measures it. Knows highest scores, not which router made them.

A prompt is a capability gap if its highest raw score is below the threshold. What is wanted is that few prompts inside
the domains are flagged and most outside are.
"""

from collections.abc import Sequence
from pathlib import Path

from training.data.records import normalise_text
from training.data.rows import BadRow, read_file
from training.errors import DataUnusable
from training.router.reports import GapMeasure
from training.router.roc import largest_threshold, roc_curve, share_below

PROMPT_COLUMN = "prompt"
LEAST_PROMPTS = 2  # one to calibrate with, one to check with


def gap_threshold(in_domain: Sequence[float], *, max_false_alarms: float) -> float:
    """The largest threshold that flags at most this share of prompts whose highest scores are given."""
    return largest_threshold(in_domain, max_share=max_false_alarms)


def measure_gap(in_domain: Sequence[float], out_of_domain: Sequence[float], *, threshold: float) -> GapMeasure:
    """What the threshold flags of prompts inside and outside, by their highest scores."""
    return GapMeasure(
        num_in_domain=len(in_domain),
        num_out_of_domain=len(out_of_domain),
        false_alarms=share_below(in_domain, threshold),
        caught=share_below(out_of_domain, threshold),
        curve=roc_curve(out_of_domain, in_domain),
    )


def read_out_of_domain(path: Path) -> list[str]:
    """The field `prompt` of every line of a JSONL file. Raises DataUnusable that names file, line and fault."""
    prompts = []
    for row in read_file(path, str(path)).rows:
        if isinstance(row, BadRow):
            raise DataUnusable(f"{row.place}: {row.reason}")
        prompt = row.columns.get(PROMPT_COLUMN)
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataUnusable(f"{row.place}: field {PROMPT_COLUMN!r} must be a text with words, got {prompt!r}")
        prompts.append(prompt)
    num_different = len({normalise_text(prompt) for prompt in prompts})
    if num_different < LEAST_PROMPTS:
        raise DataUnusable(f"{path}: {num_different} different prompts, needs at least {LEAST_PROMPTS}")
    return prompts
