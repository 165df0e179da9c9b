"""A domain on disk becomes a resident domain whose numbers are those of its files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.model.base import load_base
from engine.model.moe_lora import MoeLoraConfig
from engine.slots import load_domain
from engine.types import SamplingParams
from stack_store.errors import DigestMismatch, StoreError
from stack_store.format import Geometry, pack_groups, write_stack
from stack_store.registry import StackRegistry
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
            for key, group in expected.groups.items():
                got = stack.groups[key]
                for mine, theirs in zip((got.a_and_gate, *got.b), (group.a_and_gate, *group.b), strict=True):
                    assert mine.dtype == dtype
                    assert torch.equal(mine.float(), theirs.bfloat16().float())  # files hold bfloat16


def test_a_resident_stack_is_one_allocation(tmp_path: Path) -> None:
    registry = store_with_two_rounds(tmp_path, GEOMETRY, "some-base")
    resident = load_domain(registry, registry.domain("math"), dtype=torch.float32, device=CPU)
    for stack in resident.stacks:
        storages = {t.untyped_storage().data_ptr() for g in stack.groups.values() for t in (g.a_and_gate, *g.b)}
        assert len(storages) == 1


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
        domain = load_domain(registry, registry.domain("math"), dtype=base.dtype, device=base.device)
        engine = Engine(base, max_batch_rows=2, max_model_len=128, kv_cache_tokens=256)
        engine.start()
        answers.append(Client(engine).run(range(5, 25), sampling, [(domain, 0.7)]).token_ids)
        engine.stop()
    assert answers[0] == answers[1]
