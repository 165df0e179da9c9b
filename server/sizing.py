"""Computes what stacks, domains and tokens of a base take, from its shape alone. Knows numbers; loads no model.

Legend: L layers, H hidden size, D size of an attention head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoConfig

from server.errors import ConfigInvalid
from stack_store.format import Geometry, StackHeader, resident_bytes, stored_bytes

MIB = 2**20
GIB = 2**30
NF4_BYTES = (
    0.5 + 1 / 64 + 4 / (64 * 256)
)  # 4 bits, a byte a block of 64, a float32 for 256 of those (double quantisation)
ROOMS_GIB = (1, 4, 16)


@dataclass(frozen=True, slots=True)
class BaseShape:
    """A base as its configuration describes it."""

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_key_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    is_tied: bool  # whether the head's weights are those of the embedding

    @property
    def geometry(self) -> Geometry:
        """What a stack of this base must fit."""
        queries, keys = self.num_heads * self.head_size, self.num_key_heads * self.head_size
        shapes = {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }
        return Geometry(self.num_layers, shapes)

    @property
    def projection_parameters(self) -> int:
        """Weights of all projections: what NF4 keeps in 4 bits."""
        return self.num_layers * sum(num_in * num_out for num_in, num_out in self.geometry.shapes.values())

    @property
    def other_parameters(self) -> int:
        """Embedding and head; the norms are too small to count."""
        return self.vocabulary * self.hidden * (1 if self.is_tied else 2)

    def kv_bytes(self, bytes_per_value: int) -> int:
        """Keys and values of one token."""
        return 2 * self.num_layers * self.num_key_heads * self.head_size * bytes_per_value


# As their config.json files have it.
KNOWN = (
    BaseShape("HuggingFaceTB/SmolLM2-135M-Instruct", 30, 576, 9, 3, 64, 1536, 49152, True),
    BaseShape("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 22, 2048, 32, 4, 64, 5632, 32000, False),
    BaseShape("mistralai/Mistral-7B-Instruct-v0.3", 32, 4096, 32, 8, 128, 14336, 32768, False),
    BaseShape("meta-llama/Meta-Llama-3-8B-Instruct", 32, 4096, 32, 8, 128, 14336, 128256, False),
    BaseShape("Qwen/Qwen3-8B", 36, 4096, 32, 8, 128, 12288, 151936, False),
    BaseShape("google/gemma-3-12b-it", 48, 3840, 16, 8, 256, 15360, 262208, True),
)


def known_shapes() -> list[BaseShape]:
    """The smallest first."""
    return list(KNOWN)


def find_shape(name: str) -> BaseShape:
    """A known base, by its id or the part behind the slash; else a folder or hub id. ConfigInvalid."""
    for shape in KNOWN:
        if name in (shape.name, shape.name.rpartition("/")[2]):
            return shape
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        known = ", ".join(shape.name for shape in KNOWN)
        raise ConfigInvalid(f"base {name!r} is not one of {known}, and its config cannot be read: {error}") from error
    return shape_of(name, config.get_text_config())


def shape_of(name: str, config: Any) -> BaseShape:
    """The shape that a language model's configuration says. ConfigInvalid, naming what it lacks."""
    try:
        return BaseShape(
            name=name,
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_key_heads=config.num_key_value_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            is_tied=config.tie_word_embeddings,
        )
    except AttributeError as error:
        raise ConfigInvalid(f"base {name!r} is of a kind that takes no stacks: {error}") from error


@dataclass(frozen=True, slots=True)
class StackSizes:
    """What one stack takes. A file's head, some tens of kilobytes, is left out."""

    bf16_file: int
    int8_file: int
    resident: int  # in bfloat16 or float16, whatever the file holds


def stack_sizes(shape: BaseShape, *, experts: int, rank: int) -> StackSizes:
    """Of a stack of so many experts of that rank."""
    bf16, int8 = (_header(shape, experts, rank, weights) for weights in ("bf16", "int8"))
    return StackSizes(stored_bytes(bf16), stored_bytes(int8), resident_bytes(bf16, torch.bfloat16))


def _header(shape: BaseShape, experts: int, rank: int, weights: Literal["bf16", "int8"]) -> StackHeader:
    return StackHeader(
        base_fingerprint="none",
        geometry=shape.geometry,
        num_experts=experts,
        rank=rank,
        top_k=1,
        scale=1.0,
        domain="none",
        round=1,
        recipe_digest="none",
        null_space_folded=False,
        weights=weights,
    )


def sizing_tables(shapes: Sequence[BaseShape], *, experts: int, rank: int, rounds: int) -> str:
    """Markdown: stacks and domains, then bases and tokens."""
    sizes = {shape: stack_sizes(shape, experts=experts, rank=rank) for shape in shapes}
    stacks = _table(
        shapes,
        {
            "stack file, bf16": lambda shape: _mib(sizes[shape].bf16_file),
            "stack file, int8": lambda shape: _mib(sizes[shape].int8_file),
            "domain on disk, bf16": lambda shape: _mib(rounds * sizes[shape].bf16_file),
            "domain on disk, int8": lambda shape: _mib(rounds * sizes[shape].int8_file),
            "domain resident": lambda shape: _mib(rounds * sizes[shape].resident),
            **{f"in {room} GiB": _fitting(sizes, room * GIB, rounds) for room in ROOMS_GIB},
        },
    )
    bases = _table(
        shapes,
        {
            "nf4": lambda shape: _gib(shape.projection_parameters * NF4_BYTES + shape.other_parameters * 2),
            "bfloat16": lambda shape: _gib((shape.projection_parameters + shape.other_parameters) * 2),
            "float32": lambda shape: _gib((shape.projection_parameters + shape.other_parameters) * 4),
            "KV a token, 2 bytes": lambda shape: f"{shape.kv_bytes(2) / 1024:.0f} KiB",
            "KV of 16,384 tokens": lambda shape: _gib(16384 * shape.kv_bytes(2)),
        },
    )
    said = f"{experts} experts of rank {rank}, {rounds} {'round' if rounds == 1 else 'rounds'} a domain:"
    return f"{said}\n\n{stacks}\n\nThe base's weights, and its KV cache:\n\n{bases}"


def _fitting(sizes: dict[BaseShape, StackSizes], room_bytes: int, rounds: int) -> Callable[[BaseShape], str]:
    return lambda shape: str(room_bytes // (rounds * sizes[shape].resident))


def _table(shapes: Sequence[BaseShape], columns: dict[str, Callable[[BaseShape], str]]) -> str:
    lines = [f"| base | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for shape in shapes:
        lines.append(f"| {shape.name.rpartition('/')[2]} | {' | '.join(show(shape) for show in columns.values())} |")
    return "\n".join(lines)


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:.1f} MiB" if num_bytes < 100 * MIB else f"{num_bytes / MIB:,.0f} MiB"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
