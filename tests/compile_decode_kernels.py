"""Compiles the decode kernels to machine code for NVIDIA GPUs, without one: `python -m tests.compile_decode_kernels`.

Prints a line for each kernel and architecture. The interpreter that other tests use checks no types; this does.
"""

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.block_table import BLOCK_TOKENS
from engine.model import decode_kernels as kernels

ARCHITECTURES = (80, 90)  # Ampere, Hopper
WARP_SIZE = 32
STACKS = {"addresses": "*i64", "address_stride": "i32", "shapes": "*i64", "shape_stride": "i32"}
SCRATCH = {"mids": "*fp32", "experts": "*i64"}
PLACE = {"rank_rows": "i32", "expert_rows": "i32", "num_rows": "i32", "num_projections": "i32"}
CACHE = {"keys": "*bf16", "values": "*bf16", "head_stride": "i32", "tables": "*i64", "table_stride": "i32"}
QUERY = {"query": "*bf16", "query_head_stride": "i32", "query_row_stride": "i32", "num_heads": "i32"}
ROOM = {"most_choices": kernels.MOST_CHOICES, "most_ranks": kernels.MOST_RANKS, "rank_tile": kernels.RANK_TILE}
CHOOSE = ROOM | {"dtype": tl.bfloat16, "most_experts": kernels.MOST_EXPERTS, "width": kernels.MOST_INPUTS_AT_ONCE}
ADD = ROOM | {"dtype": tl.bfloat16, "stacks_at_once": kernels.STACKS_AT_ONCE, "width": kernels.COLUMNS}
TILES = {"block": BLOCK_TOKENS, "tile": kernels.POSITIONS}
ATTEND = TILES | {"group": 3, "size": 64, "most_group": 16, "most_size": 64}


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int) -> int:
    """The size of the kernel's machine code in bytes."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, WARP_SIZE))
    return len(compiled.asm["cubin"])


def main() -> None:
    """All kernels, attention with and without a window."""
    x, y = {"x": "*bf16", "weights": "*fp32", "num_in": "i32"}, {"y": "*bf16", "num_out": "i32", "num_stacks": "i32"}
    choose = STACKS | SCRATCH | PLACE | x
    add = STACKS | SCRATCH | PLACE | y | {"projection": "i32"}
    attend = CACHE | QUERY | {"lengths": "*i64", "output": "*bf16", "scaling": "fp32"}
    for architecture in ARCHITECTURES:
        wanted = [
            compile_kernel(kernels._choose_kernel, choose, CHOOSE, architecture),
            compile_kernel(kernels._add_kernel, add, ADD, architecture),
            *(compile_kernel(kernels._attend_kernel, attend, ATTEND | {"window": n}, architecture) for n in (0, 512)),
        ]
        print(*wanted, sep="\n")


if __name__ == "__main__":
    main()
