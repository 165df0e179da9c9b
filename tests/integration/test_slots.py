"""A domain on disk becomes a resident domain whose numbers are those of its files."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from engine.engine import Engine
from engine.model.base import load_base
from engine.model.moe_lora import MoeLoraConfig, serving_stack
from engine.slots import load_domain
from engine.types import SamplingParams
from stack_store.errors import DigestMismatch, StackInvalid, StoreError
from stack_store.format import Geometry, StackHeader, Window, pack_groups, read_stack, write_stack
from stack_store.registry import StackRegistry
from stack_store.stack_files import Bytes, StackFiles
from tests.engines import Client
from tests.stacks import header_for, random_projections, to_serving

GEOMETRY = Geometry(
    num_layers=2,
    shapes={
        "q_proj": (64, 64),
        "k_proj": (64, 32),
        "v_proj": (64, 32),
        "o_proj": (64, 64),
        "gate_proj": (64, 128),
        "up_proj": (64, 128),
        "down_proj": (128, 64),
    },
)
# Outputs that fill no panel, and one that fills several.
WIDE = Geometry(
    num_layers=3,
    shapes={
        "q_proj": (40, 72),
        "k_proj": (40, 24),
        "v_proj": (40, 24),
        "o_proj": (72, 40),
        "gate_proj": (40, 104),
        "up_proj": (40, 104),
        "down_proj": (104, 40),
    },
)
CONFIG = MoeLoraConfig(num_experts=3, rank=4, top_k=2)
CPU = torch.device("cpu")


def store_with_two_rounds(folder: Path, geometry: Geometry, fingerprint: str) -> StackRegistry:
    registry = StackRegistry.create(folder / "store", base_fingerprint=fingerprint, geometry=geometry)
    paths = []
    for round_number in (1, 2):
        header = header_for(geometry, CONFIG, fingerprint=fingerprint, round=round_number)
        projections = random_projections(geometry, CONFIG, seed=round_number)
        paths.append(folder / f"{round_number}.safetensors")
        write_stack(paths[-1], header, pack_groups(header, projections))
    registry.register_domain("math", paths)
    return registry


def test_a_resident_domain_holds_its_rounds_as_written_and_the_bytes_that_were_announced(tmp_path: Path) -> None:
    registry = store_with_two_rounds(tmp_path, GEOMETRY, "some-base")
    entry = registry.domain("math")
    for dtype in (torch.float32, torch.bfloat16):
        resident = load_domain(registry, entry, dtype=dtype, device=CPU)
        assert resident.num_bytes == registry.resident_bytes(entry, dtype)
        assert resident.version == entry.version
        for round_number, stack in enumerate(resident.stacks, 1):
            expected = to_serving(GEOMETRY, CONFIG, random_projections(GEOMETRY, CONFIG, seed=round_number))
            for key, group in expected.groups().items():
                got = stack.groups()[key]
                for mine, theirs in zip((got.a_and_gate, *got.b), (group.a_and_gate, *group.b), strict=True):
                    assert mine.dtype == dtype
                    assert torch.equal(mine.float(), theirs.bfloat16().float())  # files hold bfloat16


@pytest.mark.parametrize("panelled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_one_pass_over_a_file_gives_the_bits_of_many_small_steps(
    tmp_path: Path, weights: Literal["bf16", "int8"], dtype: torch.dtype, panelled: bool
) -> None:
    header = replace(header_for(WIDE, CONFIG), weights=weights)
    write_stack(tmp_path / "stack", header, pack_groups(header, random_projections(WIDE, CONFIG, seed=1)))
    registry = StackRegistry.create(tmp_path / "store", base_fingerprint=header.base_fingerprint, geometry=WIDE)
    entry = registry.register_domain("math", [tmp_path / "stack"]).entry
    read = read_stack(registry.stack_path(entry.stacks[0]), dtype=dtype)
    expected = serving_stack(read.header, read.groups, dtype=dtype, device=CPU, panelled=panelled)
    for _ in range(2):  # hashed, then trusted
        loaded = load_domain(registry, entry, dtype=dtype, device=CPU, panelled=panelled).stacks[0]
        assert torch.equal(loaded.memory, expected.memory)
        assert loaded.memory.dtype == dtype
        assert (loaded.scale, loaded.top_k, loaded.is_panelled) == (expected.scale, expected.top_k, panelled)


def test_a_resident_stack_is_one_allocation(tmp_path: Path) -> None:
    registry = store_with_two_rounds(tmp_path, GEOMETRY, "some-base")
    resident = load_domain(registry, registry.domain("math"), dtype=torch.float32, device=CPU)
    for stack in resident.stacks:
        storages = {t.untyped_storage().data_ptr() for g in stack.groups().values() for t in (g.a_and_gate, *g.b)}
        assert len(storages) == 1


def test_a_file_that_changes_between_two_loads_is_not_loaded_until_it_is_what_it_was(tmp_path: Path) -> None:
    """Though the second load trusts a file that it knows: any write shows in what the system keeps of it."""
    registry = store_with_two_rounds(tmp_path, GEOMETRY, "some-base")
    entry = registry.domain("math")
    load_domain(registry, entry, dtype=torch.float32, device=CPU)
    path = registry.stack_path(entry.stacks[1])
    good, times = path.read_bytes(), path.stat()
    path.chmod(0o644)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # of the same length, and the times look the same
    for _ in range(2):
        with pytest.raises(DigestMismatch, match=path.name):
            load_domain(registry, entry, dtype=torch.float32, device=CPU)
    path.write_bytes(good[:-100])
    with pytest.raises(StackInvalid, match="truncated"):
        load_domain(registry, entry, dtype=torch.float32, device=CPU)
    path.write_bytes(good)
    load_domain(registry, entry, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("is_known", [False, True])
def test_a_file_that_is_replaced_by_its_like_while_it_is_read_is_loaded(tmp_path: Path, is_known: bool) -> None:
    """As a registration of the same content does, which mends a damaged copy."""
    registry = store_with_two_rounds(tmp_path, GEOMETRY, "some-base")
    entry = registry.domain("math")
    before = load_domain(registry, entry, dtype=torch.float32, device=CPU)
    files = registry.files if is_known else StackFiles()
    path, num_begun = registry.stack_path(entry.stacks[0]), 0

    class Unread:
        def take(self, window: Window, data: Bytes) -> None:
            pass

    def begin(header: StackHeader) -> Unread:
        nonlocal num_begun
        num_begun += 1
        if num_begun == 1:
            (tmp_path / "copy").write_bytes(path.read_bytes())
            (tmp_path / "copy").rename(path)
        return Unread()

    files.read(path, entry.stacks[0].digest, begin)
    assert num_begun == (2 if is_known else 1)  # what was trusted is read again and hashed
    after = load_domain(registry, entry, dtype=torch.float32, device=CPU)
    assert torch.equal(before.stacks[0].memory, after.stacks[0].memory)


def test_a_file_that_changed_after_registration_is_not_loaded(tmp_path: Path) -> None:
    registry = store_with_two_rounds(tmp_path, GEOMETRY, "some-base")
    entry = registry.domain("math")
    path = registry.stack_path(entry.stacks[0])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(DigestMismatch):
        load_domain(registry, entry, dtype=torch.float32, device=CPU)
    path.unlink()
    with pytest.raises((StoreError, FileNotFoundError), match=path.name):
        load_domain(registry, entry, dtype=torch.float32, device=CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_mix_gives_the_tokens_of_the_cpu(tmp_path: Path, tiny_base_folder: Callable[[str], Path]) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    answers = []
    for device in ("cpu", "cuda"):
        base = load_base(str(tiny_base_folder("llama")), base_format="dense", dtype="float32", device=device)
        (tmp_path / device).mkdir()
        registry = store_with_two_rounds(tmp_path / device, base.geometry, base.fingerprint)
        engine = Engine(base, max_batch_rows=2, max_model_len=128, kv_cache_tokens=256)
        domain = load_domain(
            registry, registry.domain("math"), dtype=base.dtype, device=base.device, panelled=engine.wants_panels
        )
        engine.start()
        answers.append(Client(engine).run(range(5, 25), sampling, [(domain, 0.7)]).token_ids)
        engine.stop()
    assert answers[0] == answers[1]
