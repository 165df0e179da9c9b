"""Measures what answers in a form cost: masks by schema, and what a row that follows a grammar costs those beside it.

python -m tests.benchmarks.structured [--rounds N] [--threads N]
"""

import argparse
import json
import os
import random
import statistics
import time
from typing import Any

ROWS, TOKENS = 8, 80
ORDER = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "count": {"type": "integer", "minimum": 0, "maximum": 150},
        "when": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
        "tags": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/part"}]}},
    },
    "required": ["name", "count", "when", "tags"],
    "additionalProperties": False,
    "$defs": {"part": {"type": "object", "properties": {"of": {"$ref": "#"}, "note": {"type": ["string", "null"]}}}},
}
TEXT = {"type": "array", "items": {"type": "string", "minLength": 200}, "minItems": 3}  # the widest masks there are


def main() -> None:
    """Parses, settles threads before torch is imported, measures, prints."""
    parser = argparse.ArgumentParser(description="What answers in a form cost.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    print(json.dumps(measure(arguments.rounds), indent=1))


def measure(rounds: int) -> dict[str, Any]:
    """Milliseconds, and shares."""
    from engine.engine import Engine
    from engine.grammar import GrammarCompiler
    from engine.model.base import load_base
    from tests.costly_schemas import AT_BOUNDS

    schemas = {"order": ORDER, "any object": {"type": "object"}, **AT_BOUNDS}
    base = load_base()
    vocabulary = base.text_config.vocab_size
    ends = ends_of(base.tokenizer, vocabulary)
    started = time.perf_counter()
    compiler = GrammarCompiler(base.tokenizer, vocabulary=vocabulary, eos_token_ids=base.eos_token_ids)
    reading = time.perf_counter() - started
    engine = Engine(base, max_batch_rows=ROWS, max_model_len=1024, kv_cache_tokens=ROWS * 1024)
    engine.start()
    result = {
        "vocabulary": vocabulary,
        "vocabulary_seconds": reading,
        "masks": {name: mask_cost(compiler, schema, ends) for name, schema in schemas.items()},
        "sampling_milliseconds_of_one_core": sampling_cost(compiler, vocabulary),
        "plain_row_milliseconds_per_token": beside(engine, compiler, rounds),
        "dtype": str(base.dtype),
    }
    engine.stop()
    compiler.close()
    return result


def compile_now(compiler: Any, schema: Any) -> Any:
    """A compiled grammar of the schema."""
    from server.answer_grammar import read_form
    from server.tool_schemas import ResponseFormat

    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    form = read_form(ResponseFormat.model_validate(wanted), None, None, parallel_calls=True)
    assert form.grammar is not None
    return compiler.compile(form.grammar).result()


def ends_of(tokenizer: Any, vocabulary: int) -> Any:
    """(V,) whether a token can end something in JSON, behind which the costliest masks are."""
    import numpy as np

    texts = (tokenizer.convert_ids_to_tokens(token) or "" for token in range(vocabulary))
    return np.array([any(mark in text for mark in '"},') for text in texts])


def mask_cost(compiler: Any, schema: Any, ends: Any) -> dict[str, float]:
    """Milliseconds of compiling, of starting an answer, and of one token on random walks through the grammar.

    Every other token is one of `ends` where one is allowed. A token's time is this thread's own.
    """
    started = time.perf_counter()
    grammar = compile_now(compiler, schema)
    compiling = time.perf_counter() - started
    started = time.perf_counter()
    grammar.start()
    starting = time.perf_counter() - started
    rng = random.Random(0)
    steps = []
    for _ in range(8):
        state = grammar.start()
        for _ in range(60):
            if state.is_complete:
                break
            started = time.thread_time()
            allowed = state.allowed(len(ends))
            masked = time.thread_time() - started
            ending = allowed & ends
            token = rng.choice((ending if ending.any() and rng.random() < 0.5 else allowed).nonzero()[0].tolist())
            started = time.thread_time()
            state.take(token)
            steps.append(masked + time.thread_time() - started)
            if state.error is not None:
                raise state.error
    steps.sort()
    return {
        "compile": 1e3 * compiling,
        "start": 1e3 * starting,
        "token_median": 1e3 * statistics.median(steps),
        "token_p99": 1e3 * steps[int(0.99 * len(steps))],
        "token_most": 1e3 * steps[-1],
    }


def sampling_cost(compiler: Any, vocabulary: int) -> dict[str, float]:
    """Median milliseconds of one core for picking a token of each row, masks included."""
    import torch

    from engine.sampling import RowSampler, sample
    from engine.types import SamplingParams

    grammar = compile_now(compiler, TEXT)
    logits = torch.randn(ROWS, vocabulary, generator=torch.Generator().manual_seed(0))
    costs = {}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for num_bound in (0, 1, 4, 7):
        kinds = [grammar] * num_bound + [None] * (ROWS - num_bound)
        wishes = [SamplingParams(max_tokens=1000, seed=1, grammar=kind) for kind in kinds]
        rows = [RowSampler(wish, frozenset(), frozenset()) for wish in wishes]
        seconds = []
        for _ in range(60):
            fresh = logits.clone()
            started = time.thread_time()
            sample(fresh, rows)
            seconds.append(time.thread_time() - started)
        costs[f"{num_bound} of {ROWS} rows"] = 1e3 * statistics.median(seconds[5:])
    torch.set_num_threads(num_threads)
    return costs


def beside(engine: Any, compiler: Any, rounds: int) -> dict[str, float]:
    """Medians of what a plain row waits for a token, by how many of the rows beside it follow a grammar.

    Runs are interleaved, so that a machine that slows down slows all of them.
    """
    grammar = compile_now(compiler, TEXT)
    waits: dict[int, list[float]] = {0: [], 1: [], 4: [], 7: []}
    for _ in range(rounds + 1):
        for num_bound, seconds in waits.items():
            seconds.append(plain_wait(engine, grammar, num_bound))
    return {f"{num_bound} of {ROWS} rows": 1e3 * statistics.median(values[1:]) for num_bound, values in waits.items()}


def plain_wait(engine: Any, grammar: Any, num_bound: int) -> float:
    """Seconds a token of the plain rows of a batch that is always full."""
    from engine.types import SamplingParams
    from tests.engines import Client, collect

    client = Client(engine)
    bound = SamplingParams(max_tokens=TOKENS, seed=1, grammar=grammar)
    plain = SamplingParams(max_tokens=TOKENS, seed=1, ignore_eos=True)
    wishes = [bound] * num_bound + [plain] * (ROWS - num_bound)
    pending = [client.submit([number + 5] * 8, wish)[1] for number, wish in enumerate(wishes)]
    answers = [collect(events) for events in pending]
    assert all(len(answer.token_ids) == TOKENS for answer in answers)
    finished = [answer.finished for answer in answers[num_bound:]]
    return statistics.median(one.seconds["decode"] / (TOKENS - 1) for one in finished if one is not None)


if __name__ == "__main__":
    main()
