"""Compiles the fused step's kernels into numba's cache: `python -m tests.compile_fused_kernels`.

One process for each dtype, side by side, before tests run in several processes: each would compile them for itself.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16")


def compile_for(dtype: Any) -> None:
    """By an engine of a tiny base: all architectures share their kernels."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from engine.engine import Engine
    from engine.model.base import load_base
    from engine.slots import prepare_loads
    from tests.tiny_bases import make_llama

    disable_progress_bar()  # type: ignore[no-untyped-call]
    prepare_loads(getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        base = load_base(str(make_llama(Path(folder) / "base")), base_format="dense", dtype=dtype)
    Engine(base, max_batch_rows=2, max_model_len=64, kv_cache_tokens=128)


def main() -> None:
    """Starts the processes and waits for them."""
    if len(sys.argv) == 2:
        compile_for(sys.argv[1])
        return
    command = (sys.executable, "-m", "tests.compile_fused_kernels")
    processes = [subprocess.Popen((*command, dtype), env=os.environ) for dtype in DTYPES]
    sys.exit(max(process.wait() for process in processes))


if __name__ == "__main__":
    main()
