"""Measures what training a stack costs: a MoE-LoRA step against a PEFT LoRA step of as many parameters.

    python -m tests.benchmarks.training_step [--rounds N] [--ranks N N ...] [--rows N] [--tokens N] [--threads N]

Both train on the embedded base with the same dense NF4 values, the same batch, the same loss on the answer only and
the same optimiser, in one process, interleaved round by round. A step is forward, backward, clip and AdamW. PEFT's
rank is the one whose LoRA has the most nearly as many parameters as the stack.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any


def main() -> None:
    """Parses, settles threads before torch is imported, measures, prints."""
    parser = argparse.ArgumentParser(description="Training step of a stack against a PEFT LoRA's.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    for rank in arguments.ranks:
        result = measure(rounds=arguments.rounds, rank=rank, rows=arguments.rows, tokens=arguments.tokens)
        print_table(result)
        print(json.dumps(result))


def measure(*, rounds: int, rank: int, rows: int, tokens: int) -> dict[str, Any]:
    """Seconds per step of every form, medians with spread, and parameter counts."""
    import torch

    from engine.model.base import load_base
    from training.data.examples import Example

    torch.manual_seed(0)
    batch = [Example(tuple(ids), tokens // 2) for ids in torch.randint(100, 40_000, (rows, tokens)).tolist()]
    base = load_base(base_format="nf4-dense")
    ours, parameters = stack_step(base, batch, rank=rank)
    peer, of_peft = peft_step(batch, parameters=parameters)
    steps = {f"stack, rank {rank}": ours, "PEFT LoRA": peer}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_index in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if round_index:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    return {
        "rank": rank,
        "rows": rows,
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "dtype": str(base.dtype),
        "torch": torch.__version__,
        "parameters": {"stack": parameters, "PEFT LoRA": of_peft},
        "seconds_per_step": {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in seconds.items()
        },
    }


def stack_step(base: Any, batch: list[Any], *, rank: int) -> tuple[Callable[[], None], int]:
    """One optimiser step of a fresh stack of four experts, and its parameter count."""
    from engine.model.inject import inject
    from engine.model.moe_lora import MoeLoraConfig
    from engine.model.training_form import MoeLoraStack, TrainingDeltas
    from training.loss import answer_loss_sum, pad

    stack = MoeLoraStack(base.geometry, MoeLoraConfig(num_experts=4, rank=rank)).train()
    deltas = TrainingDeltas(stack)
    inject(base.sites, deltas)

    def loss() -> Any:
        total, count = answer_loss_sum(base, deltas, pad(batch, base.device))
        return total / count + 0.01 * stack.aux_loss()

    return optimiser_step(loss, stack.parameters())


def peft_step(batch: list[Any], *, parameters: int) -> tuple[Callable[[], None], int]:
    """The same step of a PEFT LoRA on all seven projections, and its parameter count."""
    from peft import LoraConfig, get_peft_model

    from engine.model.base import load_base
    from engine.model.training_form import TrainingDeltas
    from training.loss import answer_loss_sum, pad

    base = load_base(base_format="nf4-dense")
    parameters_per_rank = sum(sum(shape) for shape in base.geometry.shapes.values()) * base.num_layers
    settings = LoraConfig(
        r=round(parameters / parameters_per_rank),
        lora_alpha=16,
        use_rslora=True,
        target_modules=[site.projection for site in base.sites[:7]],
    )
    model = get_peft_model(base.model, settings).train()

    def loss() -> Any:
        total, count = answer_loss_sum(base, TrainingDeltas(), pad(batch, base.device))
        return total / count

    return optimiser_step(loss, (weight for weight in model.parameters() if weight.requires_grad))


def optimiser_step(loss: Callable[[], Any], weights: Iterable[Any]) -> tuple[Callable[[], None], int]:
    """Forward, backward, clip, AdamW; and how many numbers it trains."""
    import torch

    trained = list(weights)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(weight.numel() for weight in trained)


def print_table(result: dict[str, Any]) -> None:
    """The medians, each with its spread, and its ratio to PEFT."""
    print(f"{result['rows']} x {result['tokens']} tokens, {result['dtype']}, {result['threads']} threads")
    print(f"{'seconds per training step':44} {'median':>8} {'min':>8} {'max':>8} {'of PEFT':>8}")
    peer = result["seconds_per_step"]["PEFT LoRA"]["median"]
    for name, value in result["seconds_per_step"].items():
        spread = f"{value['median']:8.2f} {value['min']:8.2f} {value['max']:8.2f}"
        print(f"{name:44} {spread} {value['median'] / peer:8.2f}")


if __name__ == "__main__":
    main()
