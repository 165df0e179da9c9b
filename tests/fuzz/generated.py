"""Cases that schemathesis makes from the server's own document, valid and not. Knows schemathesis, no endpoint."""

import logging
import time

import schemathesis
from schemathesis.engine import events, from_schema

from tests.fuzz.target import ADMIN_KEY, API_KEY, REQUEST_SECONDS, Target

# A valid body may still name a model, a domain or a token that there is not, which no schema can say.
UNSAYABLE = {"positive_data_acceptance": {"enabled": False}}


def run_generated(
    target: Target, *, seed: int, examples: int, seconds: float = 600, long: bool = False
) -> tuple[int, list[str]]:
    """Cases sent, and findings: so many random cases a route, unless the time is over before.

    A long run first sends every bound that the document states, and at last makes sequences of calls out of answers.
    """
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    config = _config(target, seed, examples, long=long)
    stream = from_schema(schemathesis.openapi.from_dict(target.document, config=config)).execute()
    num_cases, ends = 0, time.monotonic() + seconds
    findings: dict[str, str] = {}
    for event in stream:
        if isinstance(event, events.ScenarioFinished):
            num_cases += len(event.recorder.cases)
            for case_id, checks in event.recorder.checks.items():
                for check in checks:
                    if check.failure_info is not None:
                        failure = check.failure_info.failure
                        case = event.recorder.cases[case_id].value
                        key = f"{case.operation.label}: {failure.title}"
                        answered = event.recorder.interactions[case_id].response
                        status = None if answered is None else answered.status_code
                        sample = check.failure_info.code_sample[:2000]
                        findings.setdefault(key, f"{key} ({status})\n{failure.message}\n{sample}")
        elif isinstance(event, events.NonFatalError):
            findings.setdefault(f"{event.label}: error", f"{event.label}: {event.info.format()}")
        elif isinstance(event, events.FatalError):
            raise event.exception
        if time.monotonic() > ends:
            stream.stop()
    return num_cases, list(findings.values())


def _config(target: Target, seed: int, examples: int, *, long: bool) -> schemathesis.Config:
    return schemathesis.Config.from_dict(
        {
            "seed": seed,
            "base-url": target.url,
            "request-timeout": REQUEST_SECONDS,
            "continue-on-failure": True,
            "suppress-health-check": ["too_slow"],  # how fast bodies are made says something of the machine only
            "generation": {"database": "none", "no-shrink": True, "max-examples": examples},
            "phases": {"coverage": {"enabled": long}, "stateful": {"enabled": long}},
            "checks": UNSAYABLE,
            "auth": {"openapi": {"apiKey": {"bearer": API_KEY}, "adminKey": {"bearer": ADMIN_KEY}}},
        }
    )
