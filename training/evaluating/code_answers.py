"""Turns a generated text into a program and runs its tests. Knows how HumanEval and MBPP pose a problem, no models.

The task files name `humaneval` and `mbpp` as what scores their records.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from training.evaluating.sandbox import run_program

METRIC = "pass@1"
FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
MARKED = re.compile(r"\[BEGIN\]\n?|\[DONE\].*", re.DOTALL)


def humaneval(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the function that the text completes, or gives whole in a code block, passes the problem's check."""
    return _score(f"{humaneval_code(doc, results[0])}\n{doc['test']}\ncheck({doc['entry_point']})\n")


def mbpp(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the code in the text passes the problem's assertions."""
    return _score("\n".join([mbpp_code(results[0]), doc["test_setup"], *doc["tests"], ""]))


def humaneval_code(doc: Mapping[str, Any], text: str) -> str:
    """The problem's head with the text below it; a code block that defines the function stands for itself."""
    block = FENCED.search(text)
    if block and f"def {doc['entry_point']}" in block[1]:
        return f"{doc['question']}    pass\n\n{block[1]}"  # the head's imports and helpers are still needed
    return f"{doc['question']}{block[1] if block else text}"


def mbpp_code(text: str) -> str:
    """The first code block of the text, or all of it up to `[DONE]`."""
    block = FENCED.search(text)
    return block[1] if block else MARKED.sub("", text)


def _score(program: str) -> dict[str, float]:
    return {METRIC: float(run_program(program).passed)}
