"""Facts about generated code: right answers pass, wrong ones do not, in each form that a model writes them in."""

import json
from pathlib import Path
from typing import Any

import pytest

from training.evaluating.code_answers import humaneval, humaneval_code, mbpp, mbpp_code

SAMPLES = Path(__file__).parents[3] / "data" / "benchmarks"


def samples(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("doc", samples("humaneval"), ids=lambda doc: doc["source"])
def test_the_right_body_passes_and_an_empty_one_does_not(doc: dict[str, Any]) -> None:
    assert humaneval(doc, [doc["answer"]]) == {"pass@1": 1.0}
    assert humaneval(doc, ["    pass\n"]) == {"pass@1": 0.0}


@pytest.mark.parametrize("doc", samples("mbpp_test"), ids=lambda doc: doc["source"])
def test_the_right_code_passes_and_none_does_not(doc: dict[str, Any]) -> None:
    assert mbpp(doc, [doc["answer"]]) == {"pass@1": 1.0}
    assert mbpp(doc, [""]) == {"pass@1": 0.0}


def test_code_is_found_in_every_form() -> None:
    doc = samples("humaneval")[0]
    whole = f"{doc['question']}{doc['answer']}"
    forms = [
        f"Here it is:\n\n```python\n{whole}\n```\nIt works.",
        f"```python\n{doc['answer']}\n```",
        f"```py\n{whole}",  # cut off before the block ended
    ]
    for form in forms:
        assert humaneval(doc, [form]) == {"pass@1": 1.0}, form
    assert humaneval_code(doc, "    return 1\n") == f"{doc['question']}    return 1\n"
    problem = samples("mbpp_test")[0]
    for form in (f"```python\n{problem['answer']}\n```", f"[BEGIN]\n{problem['answer']}\n[DONE]\nand more"):
        assert mbpp(problem, [form]) == {"pass@1": 1.0}, form
    assert mbpp_code("x = 1\n[DONE]\ny") == "x = 1\n"


def test_an_answer_that_ends_the_process_fails() -> None:
    assert mbpp(samples("mbpp_test")[0], ["import os\nos._exit(0)"]) == {"pass@1": 0.0}
