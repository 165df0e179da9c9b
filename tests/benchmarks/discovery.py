"""Times the candidates of a discovery as rows of shared batches, against the same candidates one at a time.

    python -m tests.benchmarks.discovery [--recipe FILE] [--store DIR] [--prompts N] [--rounds N] [--threads N]

The candidates are what greedy searches ask for first: for the first N training prompts of each domain the base, every
domain alone, all of them, and the label's domain with each other one. Both forms compute the same function of the same
base and stacks in one process, interleaved round by round; one at a time, every combination's pack is made beforehand.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Parses, settles threads before torch is imported, measures, prints."""
    parser = argparse.ArgumentParser(description="Discovery's candidates in batches and one at a time.")
    parser.add_argument("--recipe", type=Path, default=Path("demo/recipe.toml"))
    parser.add_argument("--store", type=Path, default=Path("demo/store"))
    parser.add_argument("--prompts", type=int, default=10, help="of each domain")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    print(json.dumps(measure(arguments.recipe, arguments.store, prompts=arguments.prompts, rounds=arguments.rounds)))


def measure(recipe_path: Path, store: Path, *, prompts: int, rounds: int) -> dict[str, Any]:
    """Medians of the seconds of both forms, their ratio, and how far their losses differ at most."""
    import torch

    from training.discovery.candidate_losses import RowLosses
    from training.discovery.run import load_domains
    from training.recipe import read_recipe
    from training.run import load_training_base
    from training.workers import Workers

    recipe = read_recipe(recipe_path)
    base = load_training_base(recipe, Workers())
    domains = load_domains(recipe, base, store)
    rows = candidates(recipe, base, prompts=prompts)
    max_tokens = recipe.settings.training.max_pass_tokens
    together = RowLosses(base, domains.stacks, max_tokens=max_tokens)
    apart = RowLosses(base, domains.stacks, max_tokens=max_tokens, max_packs=len(rows))
    forms: dict[str, Callable[[], list[Any]]] = {
        "batched": lambda: together.measure(rows),
        "one at a time": lambda: [apart.measure_batch([row])[0] for row in rows],
    }
    for combination in {row.shape.domains: row for row in rows}.values():
        apart.measure_batch([combination])  # makes its pack
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    losses: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, form in forms.items():
            started = time.perf_counter()
            losses[name] = [loss.mean for loss in form()]
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    differences = [abs(one - other) for one, other in zip(*losses.values(), strict=True)]
    return {
        "speedup": round(medians["one at a time"] / medians["batched"], 3),
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "prompts": prompts * len(domains.stacks),
        "rows": len(rows),
        "tokens": sum(row.shape.length for row in rows),
        "batches": len(together.plan(rows)),
        "max_tokens": max_tokens,
        "largest_difference": max(differences),
        "threads": torch.get_num_threads(),
        "dtype": str(base.dtype),
        "device": str(base.device),
        "torch": torch.__version__,
        "base": base.fingerprint,
    }


def candidates(recipe: Any, base: Any, *, prompts: int) -> list[Any]:
    """The rows, prompt by prompt."""
    from dataclasses import replace

    from training.discovery.candidate_losses import Row
    from training.discovery.run import discovery_settings, training_examples

    settings = replace(discovery_settings(recipe), prompts_per_domain=prompts)
    names = [domain.name for domain in recipe.settings.domains]
    rows = []
    for labelled in training_examples(recipe, base, settings).examples:
        others = [name for name in names if name != labelled.label]
        sets = [[], *([name] for name in names), *([labelled.label, name] for name in others), names]
        rows += [Row(labelled.example, dict.fromkeys(members, 1.0)) for members in sets]
    return rows


if __name__ == "__main__":
    main()
