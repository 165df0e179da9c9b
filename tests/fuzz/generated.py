"""Cases that schemathesis makes from the server's own document, valid and not. Knows schemathesis, no endpoint."""

import logging
import time
from typing import Any

import schemathesis
from schemathesis.engine import events, from_schema

from tests.fuzz.target import ADMIN_KEY, API_KEY, Target

# A valid body may still name a model, a domain or a token that there is not, which no schema can say.
UNSAYABLE = {"positive_data_acceptance": {"enabled": False}}


def run_generated(target: Target, *, seed: int, seconds: int, examples: int | None = None) -> tuple[int, list[str]]:
    """Cases sent, and findings. With `examples` all phases once, so many a route; without, one case after another."""
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    schema = schemathesis.openapi.from_dict(target.document, config=_config(target, seed, seconds, examples))
    engine = from_schema(schema)
    stream = engine.fuzz() if examples is None else engine.execute()
    num_cases = 0
    findings: dict[str, str] = {}
    ends = time.monotonic() + seconds + 60
    for event in stream:
        if isinstance(event, (events.ScenarioFinished, events.FuzzScenarioFinished)):
            num_cases += len(event.recorder.cases)
            for case_id, checks in event.recorder.checks.items():
                for check in checks:
                    if check.failure_info is not None:
                        failure = check.failure_info.failure
                        case = event.recorder.cases[case_id].value
                        key = f"{case.operation.label}: {failure.title}"
                        shown = f"{key}\n{failure.message}\n{check.failure_info.code_sample[:2000]}"
                        findings.setdefault(key, shown)
        elif isinstance(event, events.NonFatalError):
            findings.setdefault(f"{event.label}: error", f"{event.label}: {event.info.format()}")
        elif isinstance(event, events.FatalError):
            raise event.exception
        if time.monotonic() > ends:
            stream.stop()
    return num_cases, list(findings.values())


def _config(target: Target, seed: int, seconds: int, examples: int | None) -> schemathesis.Config:
    generation: dict[str, Any] = {"database": "none", "no-shrink": True}
    if examples is not None:
        generation["max-examples"] = examples
    return schemathesis.Config.from_dict(
        {
            "seed": seed,
            "max-time": seconds,
            "base-url": target.url,
            "request-timeout": 60,
            "continue-on-failure": True,
            "generation": generation,
            "checks": UNSAYABLE,
            "auth": {"openapi": {"apiKey": {"bearer": API_KEY}, "adminKey": {"bearer": ADMIN_KEY}}},
            "fuzz": {"max-time": seconds},
        }
    )
