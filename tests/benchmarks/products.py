"""Times one projection in every format that a base can have here: the evidence behind `base_format = "auto"`.

python -m tests.benchmarks.products [--threads N]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

SHAPES = ((576, 576), (576, 1536), (1536, 576))
TOKENS = (1, 8, 64)


def main() -> None:
    """Settles threads before torch is imported, measures, prints."""
    parser = argparse.ArgumentParser(description="One projection, dense and NF4, in float32 and bfloat16.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    os.environ["OMP_NUM_THREADS"] = str(parser.parse_args().threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import torch

    rows = [row for shape in SHAPES for row in measure_shape(*shape)]
    print(f"microseconds, median of 50; {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(json.dumps(rows))


def measure_shape(in_features: int, out_features: int) -> list[dict[str, Any]]:
    """One row per number of tokens; all formats measured in the same breath."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    rows = []
    weight = torch.randn(out_features, in_features)
    for tokens in TOKENS:
        row: dict[str, Any] = {"shape": f"{in_features}->{out_features}", "tokens": tokens}
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(tokens, in_features, dtype=dtype)
            dense = torch.nn.Linear(in_features, out_features, bias=False, dtype=dtype)
            packed = Linear4bit(  # type: ignore[no-untyped-call]
                in_features, out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            packed.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
            name = str(dtype).removeprefix("torch.")
            with torch.inference_mode():
                row[f"dense {name}"] = microseconds(partial(dense, x))
                row[f"nf4 {name}"] = microseconds(partial(packed.to("cpu").eval(), x))
        rows.append(row)
    return rows


def microseconds(run: Callable[[], object]) -> float:
    """Median of 50 runs after 5 that do not count."""
    seconds = []
    for _ in range(55):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds[5:]) * 1e6, 1)


if __name__ == "__main__":
    main()
