"""Stands in for the hub's datasets that the recipes name: few rows, in the real layout of files, columns and splits.

A recipe keeps the first row; if it has a `where`, that leaves out every fourth. One function a dataset, so it is long.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SUBJECTS = ("river", "copper", "lantern", "window", "garden", "bridge", "mirror", "ladder", "basket", "candle")


@dataclass(frozen=True, slots=True)
class HubDataset:
    """One split of one dataset."""

    name: str
    row: Callable[[int], Row]
    config: str | None = None
    split: str = "train"
    num_rows: int = 24  # a recipe that reads a tenth of a split finds ten times as many


def write_datasets(folder: Path) -> None:
    """Every dataset as a folder of its name, in JSONL; one that has configurations gets the card that lists them."""
    for dataset in HUB:
        place = folder / dataset.name
        path = place / (dataset.config or "data") / f"{dataset.split}-00000-of-00001.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps(dataset.row(i)) for i in range(dataset.num_rows)))
        if dataset.config is not None:
            files = f"[{{split: {dataset.split}, path: {dataset.config}/{dataset.split}-*}}]"
            card = f"---\nconfigs:\n- {{config_name: {dataset.config}, data_files: {files}}}\n---\n"
            (place / "README.md").write_text(card)


def _subject(i: int) -> str:
    return f"{SUBJECTS[i % len(SUBJECTS)]} {i}"


def _unwanted(i: int) -> bool:
    return i % 4 == 3


def _alpaca(i: int) -> Row:
    question, answer = f"Describe the {_subject(i)}.", "" if _unwanted(i) else f"It is an old {_subject(i)}."
    return {"instruction": question, "input": "In one line." * (i % 2), "output": answer, "text": "### Instruction"}


def _python(i: int) -> Row:
    answer = "" if _unwanted(i) else f"def area_{i}(side):\n    return side * {i}"
    return {"instruction": f"Write a function area_{i}.", "input": "", "output": answer, "prompt": "Below is an"}


def _flashcard(i: int) -> Row:
    question = "" if _unwanted(i) else f"What treatment helps disease {i}?"
    answer = f"Drug {i} treats the symptoms of the disease."
    return {"instruction": "Answer this question truthfully", "input": question, "output": answer}


def _gsm8k(i: int) -> Row:
    return {
        "question": f"Ann has {i} apples and buys 2. How many?",
        "answer": f"{i} + 2 = <<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}",
    }


def _nemotron(category: str, question: str, answer: str) -> Callable[[int], Row]:
    def row(i: int) -> Row:
        said = None if _unwanted(i) else answer.format(i=i)
        turns = [
            ("system", ""),
            ("user", question.format(i=i)),
            ("assistant", said),
            ("user", "And?"),
            ("assistant", "No."),
        ]
        return {
            "uuid": f"{i}",
            "license": "CC BY 4.0",
            "generator": "Qwen3",
            "version": "2",
            "category": category,
            "reasoning": "on",
            "messages": [{"role": role, "content": content} for role, content in turns],
        }

    return row


def _ultrafeedback(i: int) -> Row:
    question, answer = (
        f"Tell me about the {_subject(i)}.",
        "No." if _unwanted(i) else f"The {_subject(i)} is well known.",
    )
    turns = [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}]
    scores = {"score_chosen": 8.0, "score_rejected": 7.0}
    return {"prompt": question, "prompt_id": f"{i}", "chosen": turns, "rejected": turns, "messages": turns, **scores}


def _daring_anteater(i: int) -> Row:
    turns = [("User", f"Name a colour for the {_subject(i)}."), ("Assistant", f"Blue, like the {_subject(i)}.")]
    turns = turns[::-1] if _unwanted(i) else turns
    conversation = [{"from": who, "value": text, "label": None} for who, text in turns]
    return {"system": "", "mask": "User", "dataset": "synthetic_conv", "conversations": conversation}


def _open_code_reasoning(i: int) -> Row:
    return {
        "id": f"{i}",
        "input": f"Read n from standard input and print n + {i}.",
        "output": f"<think>\nAdd {i}.\n</think>\n\n```python\nprint(int(input()) + {i})\n```",
        "source": "codeforces",
        "license": "cc-by-4.0",
        "dataset": "taco",
        "split": "train",
        "difficulty": "EASY",
        "solution": "" if _unwanted(i) else f"print(int(input()) + {i})",
    }


def _open_thoughts(i: int) -> Row:
    is_code = i % 2 == 0  # the recipe's two domains share this dataset: row 0 is code's, row 1 reasoning's
    problem = f"Write a program that prints {i}." if is_code else f"Riddle {i}: what has keys and no locks?"
    return {
        "problem": problem,
        "deepseek_reasoning": f"\nOkay, let me see. Wait, maybe {i}.\n",
        "deepseek_solution": f"\n```python\nprint({i})\n```" if is_code else f"\nA piano, number {i}.",
        "ground_truth_solution": None,
        "domain": "code" if is_code else "puzzle",
        "source": "apps",
        "test_cases": None,
        "starter_code": None,
    }


def _open_math_reasoning(mode: str) -> Callable[[int], Row]:
    def row(i: int) -> Row:
        trace = f"<think>\nOkay, wait. Let me add {i} in {mode}."
        answer = "" if _unwanted(i) else f"\n</think>\n\nThe sum of {i} and {i} is \\boxed{{{2 * i}}}."
        return {
            "expected_answer": f"{2 * i}",
            "problem_type": "has_answer_extracted",
            "problem_source": "aops_c6_high_school_olympiads",
            "generation_model": "DeepSeek-R1",
            "pass_rate_72b_tir": "0.9",
            "problem": f"Compute the sum of {i} and {i} ({mode}).",
            "generated_solution": trace + answer,
            "inference_mode": mode,
            "used_in_kaggle": True,
        }

    return row


def _numina(i: int) -> Row:
    problem, solution = f"Solve the equation x + {i} = 9.", "x" if _unwanted(i) else f"Hence x = {9 - i}."
    turns = [{"content": problem, "role": "user"}, {"content": solution, "role": "assistant"}]
    return {"source": "olympiads", "problem": problem, "solution": solution, "messages": turns}


def _medqa(i: int) -> Row:
    options = {"A": f"Drug {i}", "B": "Surgery", "C": "Rest", "D": "Insulin"}
    return {
        "question": f"Patient {i} has a chronic disease. Best treatment?",
        "answer": f"Drug {i}",
        "options": options,
        "meta_info": "step1",
        "answer_idx": "A",
        "metamap_phrases": ["patient"],
    }


def _medical_o1(i: int) -> Row:
    response = "Rest." if _unwanted(i) else f"The diagnosis is syndrome {i}."
    return {"Question": f"What is the diagnosis of patient {i}?", "Complex_CoT": "Okay, so.", "Response": response}


def _pubmed_qa(i: int) -> Row:
    context = {
        "contexts": [f"Trial {i} of a drug.", "Patients were cured."],
        "labels": ["METHODS", "RESULTS"],
        "meshes": ["Humans"],
        "reasoning_required_pred": ["y"],
        "reasoning_free_pred": ["y"],
    }
    question, answer = f"Does drug {i} cure the disease?", f"Drug {i} cures it."
    return {"pubid": i, "question": question, "context": context, "long_answer": answer, "final_decision": "yes"}


def _sky_t1(i: int) -> Row:
    thought = f"<|begin_of_thought|>\n\nOkay, let me double-check {i}.\n\n<|end_of_thought|>\n\n"
    solution = f"<|begin_of_solution|>\n\nIt is {i}.\n\n<|end_of_solution|>"
    answer = solution if _unwanted(i) else thought + solution
    turns = [{"from": "user", "value": f"Puzzle {i}: which number is it?"}, {"from": "assistant", "value": answer}]
    return {"system": "Your role as an assistant", "conversations": turns}


NEMOTRON, OPEN_MATH = "nvidia/Nemotron-Post-Training-Dataset-v2", "nvidia/OpenMathReasoning"
HUB = (
    HubDataset("tatsu-lab/alpaca", _alpaca),
    HubDataset("iamtarun/python_code_instructions_18k_alpaca", _python),
    HubDataset("medalpaca/medical_meadow_medical_flashcards", _flashcard),
    HubDataset("openai/gsm8k", _gsm8k, config="main"),
    HubDataset(
        NEMOTRON, _nemotron("chat", "Suggest a poem {i}.", "A poem about rain, {i}."), split="chat", num_rows=240
    ),
    HubDataset(
        NEMOTRON,
        _nemotron("code", "Print number {i} in python.", "<think>\nHm.\n</think>\n\nprint({i})  # python"),
        split="code",
        num_rows=120,
    ),
    HubDataset(
        NEMOTRON,
        _nemotron("math", "Calculate {i} + {i}.", "<think>\nHm.\n</think>\n\n{i} + {i} = \\boxed{{2 * {i}}}"),
        split="math",
        num_rows=120,
    ),
    HubDataset(
        NEMOTRON,
        _nemotron("stem", "Which molecule is number {i}?", "<think>\nOkay, wait.\n</think>\n\nWater, {i}."),
        split="stem",
        num_rows=120,
    ),
    HubDataset("HuggingFaceH4/ultrafeedback_binarized", _ultrafeedback, split="train_sft"),
    HubDataset("nvidia/Daring-Anteater", _daring_anteater),
    HubDataset("nvidia/OpenCodeReasoning", _open_code_reasoning, config="split_0", split="split_0", num_rows=240),
    HubDataset("open-thoughts/OpenThoughts-114k", _open_thoughts, config="metadata", num_rows=48),
    HubDataset(OPEN_MATH, _open_math_reasoning("cot"), split="cot", num_rows=240),
    HubDataset(OPEN_MATH, _open_math_reasoning("tir"), split="tir", num_rows=240),
    HubDataset("AI-MO/NuminaMath-CoT", _numina),
    HubDataset("GBaker/MedQA-USMLE-4-options", _medqa),
    HubDataset("FreedomIntelligence/medical-o1-reasoning-SFT", _medical_o1, config="en"),
    HubDataset("qiaojin/PubMedQA", _pubmed_qa, config="pqa_labeled"),
    HubDataset("NovaSky-AI/Sky-T1_data_17k", _sky_t1),
)
