"""Evaluates a store: held-out loss, then benchmarks, and the report of both. Knows the order of things."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from engine.model.base import Base
from stack_store.atomic import replace_file
from training.errors import EvaluationInvalid
from training.evaluating.finished import Finished
from training.evaluating.held_out import RecordLosses, held_out_examples, measure_held_out
from training.evaluating.plan import Plan
from training.evaluating.report import REPORT_NAME, EvaluationReport, TaskName, TaskReport, summarise_held_out
from training.evaluating.subject import open_subject
from training.evaluating.table import as_markdown
from training.journal import JOURNAL_FOLDER
from training.recipe import Recipe
from training.reports import write_report
from training.router.store_router import routing_policy

FINISHED_FILE = "evaluation.sqlite"
OnProgress = Callable[[str, int, int], None]  # what is being done, how far, of how much


def evaluate_store(
    recipe: Recipe, base: Base, store: Path, output: Path, plan: Plan, on_progress: OnProgress = lambda *_: None
) -> EvaluationReport:
    """Measures what the plan asks for and writes the report into `output`. What is finished is not measured again.

    Raises EvaluationInvalid for what cannot be measured, as far as can be known before anything long is begun.
    """
    started = time.perf_counter()
    subject = open_subject(base, store, routing_policy(recipe))
    if "routed" in plan.modes and subject.router is None:
        raise EvaluationInvalid(
            f"mode 'routed' needs a router, which store {store} lacks; train one, or name the modes"
        )
    seed, max_tokens = recipe.settings.seed, recipe.settings.training.max_pass_tokens
    held_out = held_out_examples(recipe, base.tokenizer, limit=plan.limit) if plan.held_out else None
    benchmarks = None
    if plan.data is not None:
        # Here, because it is the harness's absence that it reports.
        from training.evaluating.benchmarking import Benchmarks

        benchmarks = Benchmarks(plan, plan.data, seed=seed)
    records: Sequence[RecordLosses] = ()
    tasks: dict[TaskName, TaskReport] = {}
    with Finished(store / JOURNAL_FOLDER / FINISHED_FILE) as finished:
        if held_out is not None:
            records = measure_held_out(
                subject,
                held_out,
                plan.modes,
                finished=finished,
                store=store,
                max_tokens=max_tokens,
                on_progress=on_progress,
            )
        if benchmarks is not None:
            tasks = benchmarks.measure(subject, finished, max_tokens=max_tokens, on_progress=on_progress)
    report = EvaluationReport(
        base_fingerprint=base.fingerprint,
        base_format=base.base_format,
        dtype=str(base.dtype),
        stack_digests=subject.digests,
        router_digest=subject.router_digest,
        modes=plan.modes,
        seed=seed,
        limit=plan.limit,
        held_out=None if held_out is None else summarise_held_out(records, held_out.too_long, seed=seed),
        benchmarks=tasks,
        notes=(*subject.notes, *(benchmarks.notes if benchmarks else ())),
        versions={name: version(name) for name in ("torch", "transformers", *(["lm_eval"] if benchmarks else []))},
        seconds=round(time.perf_counter() - started, 1),
    )
    write_evaluation(report, records, output)
    return report


def write_evaluation(report: EvaluationReport, records: Sequence[RecordLosses], output: Path) -> None:
    """evaluation.json and evaluation.md, and a line per held-out record in evaluation_records.jsonl."""
    write_report(output / f"{REPORT_NAME}.json", report)
    lines = "".join(f"{json.dumps(asdict(record))}\n" for record in records)
    for name, text in ((f"{REPORT_NAME}.md", as_markdown(report)), (f"{REPORT_NAME}_records.jsonl", lines)):
        with replace_file(output / name) as file:
            file.write(text.encode())
