"""Runs benchmarks through lm-evaluation-harness on local files, mode by mode. Alone knows the harness's task objects.

A task is a file of `tasks/`: besides what the harness reads, its metadata names the domain that is right for it
(`domain`), the field that a user would send and so the router reads (`route_text`), the fields of its records
(`record`), and whether it may be asked in a chat template (`chat`).
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import EvaluationInvalid, TrainingError
from training.evaluating.benchmark_data import choose_records, read_records
from training.evaluating.finished import Finished, Progress
from training.evaluating.mixes import Mixes
from training.evaluating.modes import Mode
from training.evaluating.report import Outcomes
from training.evaluating.subject import Mix, Subject

try:
    import datasets
    from lm_eval.api.instance import Instance
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise TrainingError(f"benchmarks need lm_eval: pip install -c constraints.txt -e '.[eval]' ({error})") from error

from training.evaluating.language_model import MixedLM

TASKS_FOLDER = Path(__file__).with_name("tasks")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A task with its documents."""

    name: str
    task: Any  # the harness's
    domain: str
    route_text: str  # the document's field that the router reads
    may_chat: bool
    runs_code: bool


class Harness:
    """The project's own tasks; the harness's are not read."""

    def __init__(self) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of defaults that the task files settle
        self._manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False)

    @property
    def names(self) -> list[str]:
        """Every task."""
        return sorted(self._manager.all_subtasks)

    def runs_code(self, name: str) -> bool:
        """Whether the task runs what the model wrote. Raises EvaluationInvalid if there is no such task."""
        return bool(self._config(name).get("unsafe_code"))

    def load(self, names: Sequence[str], data: Path, *, limit: int | None, seed: int) -> list[Benchmark]:
        """The named tasks with documents from their files in `data`. Raises EvaluationInvalid by name."""
        return [self._load(name, data, limit, seed) for name in names]

    def _load(self, name: str, data: Path, limit: int | None, seed: int) -> Benchmark:
        config = self._config(name)
        metadata, file = config["metadata"], config["dataset_kwargs"]["data_files"]["test"]
        records = choose_records(read_records(data / file, metadata["record"]), limit, seed=seed)

        def documents(**_: Any) -> dict[str, Any]:
            return {"test": datasets.Dataset.from_list(records)}

        chosen = {"group": "chosen", "task": [{"task": name, "custom_dataset": documents}]}
        return Benchmark(
            name=name,
            task=self._manager.load([chosen])["tasks"][name],
            domain=metadata["domain"],
            route_text=metadata["route_text"],
            may_chat=metadata.get("chat", True),
            runs_code=self.runs_code(name),
        )

    def _config(self, name: str) -> Mapping[str, Any]:
        if name not in self._manager.all_subtasks:
            raise EvaluationInvalid(f"there is no task {name!r}; the tasks are {self.names}")
        config: Mapping[str, Any] = self._manager.task_index[name].cfg
        return config


def run_benchmark(
    benchmark: Benchmark,
    mode: Mode,
    subject: Subject,
    *,
    finished: Finished,
    max_tokens: int,
    chat_template: bool,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Outcomes:
    """Each document's value of each metric in one mode, in the documents' order."""
    mixes = Mixes(subject, finished)

    def mixes_of(requests: Sequence[Instance]) -> Sequence[Mix]:
        texts = [request.doc[benchmark.route_text] for request in requests]
        labels = [benchmark.domain] * len(requests)
        return mixes.of_mode(mode, labels=labels, texts=texts, on_progress=_named("routes", on_progress))

    model = MixedLM(
        subject, mixes_of, finished=finished, max_tokens=max_tokens, on_progress=_named(benchmark.name, on_progress)
    )
    return score(benchmark, model, chat_template=chat_template)


def score(benchmark: Benchmark, model: Any, *, chat_template: bool = False) -> Outcomes:
    """Asks any model of the harness; each document's value of each metric, in the documents' order.

    A metric that is read in several ways is named with the way: `exact_match,strict-match`.
    """
    results = evaluate(
        lm=model,
        task_dict={"tasks": {benchmark.name: benchmark.task}},
        bootstrap_iters=0,  # intervals are our own
        log_samples=True,
        apply_chat_template=chat_template and benchmark.may_chat,
        confirm_run_unsafe_code=benchmark.runs_code,
    )
    outcomes: dict[str, dict[int, float]] = defaultdict(dict)
    for sample in results["samples"][benchmark.name]:
        for metric in sample["metrics"]:
            name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            outcomes[name][sample["doc_id"]] = float(sample[metric])
    return {name: [values[index] for index in sorted(values)] for name, values in outcomes.items()}


def _named(name: str, on_progress: Callable[[str, int, int], None]) -> Progress:
    return lambda done, total: on_progress(name, done, total)
