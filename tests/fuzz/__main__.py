"""Fuzzes for as long as it is told to: `python -m tests.fuzz --minutes 20 --seed 1`. Status 1 if anything was found.

Mutations and random cases take turns; the first turn also sends every bound that the document states.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.generated import run_generated
from tests.fuzz.mutated import run_mutated
from tests.fuzz.target import fuzzed_server

ROUND_SECONDS = 60
EXAMPLES = 20  # a route and turn


def main() -> int:
    """The exit status."""
    arguments = argparse.ArgumentParser(description="Fuzzes the server on a tiny base.")
    arguments.add_argument("--minutes", type=float, default=20)
    arguments.add_argument("--seed", type=int, required=True)
    arguments.add_argument("--log", type=Path, default=None, help="of the server; default: not kept")
    given = arguments.parse_args()
    if given.log is not None:
        logging.basicConfig(filename=given.log, level=logging.WARNING)
    began = time.monotonic()
    ends = began + 60 * given.minutes
    print(f"seed {given.seed}, {given.minutes:g} minutes", flush=True)
    found: dict[str, None] = {}
    num_cases = 0

    def keep(what: str, result: tuple[int, list[str]]) -> None:
        nonlocal num_cases
        cases, findings = result
        num_cases += cases
        print(f"{time.monotonic() - began:6.0f} s  {what}: {cases} cases, {len(findings)} findings", flush=True)
        for finding in findings:
            if finding not in found:
                print(f"FINDING {finding}\n", flush=True)
        found.update(dict.fromkeys(findings))

    with tempfile.TemporaryDirectory() as folder, fuzzed_server(Path(folder)) as target:
        seed = given.seed
        while (left := ends - time.monotonic()) > 0:
            keep("mutated", run_mutated(target, seed=seed, cases=10**9, seconds=min(ROUND_SECONDS, left)))
            target.restore()
            is_first = seed == given.seed
            keep("generated", run_generated(target, seed=seed, seconds=max(1, left), examples=EXAMPLES, long=is_first))
            seed += 1
    print(f"{num_cases} cases, {len(found)} findings in {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    return 1 if found else 0


sys.exit(main())
