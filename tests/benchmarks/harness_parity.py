"""Compares lm-evaluation-harness in process with the same over HTTP: each choice's log-likelihood, and the scores.

    python -m tests.benchmarks.harness_parity [--base FOLDER] [--limit 20]

The server runs in the same process on a copy of the base, in float32, and is asked as `local-completions` asks it, with
the server's own tokenizer. One JSON line.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from engine.model.base import load_base
from router.policy import RoutingPolicy
from server.compose import compose_app_for
from server.config import load_settings
from stack_store.registry import StackRegistry
from tests.servers import serve_app
from training.evaluating.finished import Finished
from training.evaluating.harness import Benchmark, Harness, score
from training.evaluating.language_model import MixedLM
from training.evaluating.subject import open_subject

SAMPLES = Path(__file__).parents[1] / "data" / "benchmarks"
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "medmcqa")
SERVED = "parity"


class Noted:
    """A model of the harness whose log-likelihoods are kept."""

    rank, world_size = 0, 1

    def __init__(self, model: Any) -> None:
        self._model = model
        self.log_likelihoods: list[tuple[float, bool]] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The model's own."""
        answers: list[tuple[float, bool]] = self._model.loglikelihood(requests)
        self.log_likelihoods += answers
        return answers


@dataclass(frozen=True, slots=True)
class Parity:
    """How far the two are apart."""

    choices: int
    max_difference: float  # nats, of a whole continuation
    same_greedy: bool
    same_scores: bool


def compare(benchmarks: Sequence[Benchmark], here: Any, there: Any) -> Parity:
    """Every choice of every document, and every metric of every document."""
    ours, theirs = Noted(here), Noted(there)
    scores = [(score(benchmark, ours), score(benchmark, theirs)) for benchmark in benchmarks]
    pairs = list(zip(ours.log_likelihoods, theirs.log_likelihoods, strict=True))
    return Parity(
        choices=len(pairs),
        max_difference=max(abs(a[0] - b[0]) for a, b in pairs),
        same_greedy=all(a[1] == b[1] for a, b in pairs),
        same_scores=all(a == b for a, b in scores),
    )


def served_model(url: str, model: str, max_length: int) -> LocalCompletionsAPI:
    """As the harness's command line makes it, with the tokenizer behind the URL."""
    return LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model=model,
        tokenizer_backend="remote",
        batch_size=4,
        max_length=max_length,
        max_retries=1,
    )


def main() -> None:
    """Prints one line."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--base", default=None, help="default: the embedded base")
    arguments.add_argument("--limit", type=int, default=20, help="documents of each task, if it has so many")
    arguments.add_argument("--data", type=Path, default=SAMPLES)
    given = arguments.parse_args()
    base, served = (load_base(given.base, dtype="float32", device="cpu") for _ in range(2))
    benchmarks = Harness().load(TASKS, given.data, limit=given.limit, seed=42)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = StackRegistry.create(folder / "store", base_fingerprint=base.fingerprint, geometry=base.geometry)
        registry.close()
        subject = open_subject(base, folder / "store", RoutingPolicy())
        settings = load_settings(flags={"server": {"served_model_name": SERVED}, "store": {"path": folder / "store"}})
        with serve_app(compose_app_for(served, settings)) as url, Finished(folder / "finished.sqlite") as finished:
            here = MixedLM(subject, lambda requests: [{}] * len(requests), finished=finished, max_tokens=2048)
            found = compare(benchmarks, here, served_model(url, f"{SERVED}:base", 2048))
    print(
        json.dumps(
            {
                "base": base.fingerprint, "tasks": TASKS, "documents": sum(len(b.task.eval_docs) for b in benchmarks),
                "choices": found.choices, "max_difference_nats": found.max_difference,
                "same_greedy": found.same_greedy, "same_scores": found.same_scores,
                "device": "cpu", "dtype": "float32", "torch": torch.__version__,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
