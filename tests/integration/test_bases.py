"""Loading and wrapping bases of every supported architecture, in every format."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from engine.errors import BaseUnsupported
from engine.model.base import BaseIdentity, identify_base, load_base
from engine.model.hidden import hidden_states
from engine.model.inject import StackedLinear, inject
from engine.model.moe_lora import ServingDeltas
from stack_store.format import PROJECTIONS
from tests.tiny_bases import MAKERS, SHAPE, make_llama, tiny_tokenizer

IDS = list(range(5, 30))


@pytest.mark.parametrize("architecture", sorted(MAKERS))
def test_exactly_the_seven_projections_of_every_layer_are_wrapped(
    architecture: str, tiny_base_folder: Callable[[str], Path]
) -> None:
    base = load_base(str(tiny_base_folder(architecture)), base_format="dense", dtype="float32")
    inject(base.sites, ServingDeltas())
    wrapped = [name for name, module in base.decoder.named_modules() if isinstance(module, StackedLinear)]
    expected = {
        f"layers.{layer}.{'self_attn' if p[0] in 'qkvo' else 'mlp'}.{p}" for layer in range(3) for p in PROJECTIONS
    }
    assert set(wrapped) == expected
    assert sum(isinstance(module, StackedLinear) for module in base.model.modules()) == len(expected)
    assert base.geometry.num_layers == 3
    assert base.geometry.shapes["down_proj"] == (128, 64)


@pytest.mark.parametrize("base_format", ["dense", "nf4-dense"])
@pytest.mark.parametrize("architecture", sorted(MAKERS))
def test_a_base_is_identified_without_its_weights(
    architecture: str, base_format: Any, tiny_base_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_base_folder(architecture)
    loaded = load_base(str(folder), base_format=base_format, dtype="float32")
    without_weights = tmp_path / folder.name
    shutil.copytree(folder, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    identity = identify_base(str(without_weights))
    assert identity == BaseIdentity(loaded.model_id, loaded.fingerprint, loaded.geometry)


def test_a_vision_tower_is_never_touched(tiny_base_folder: Callable[[str], Path]) -> None:
    base = load_base(str(tiny_base_folder("gemma3")), base_format="dense", dtype="float32")
    vision = [(name, module) for name, module in base.model.named_modules() if "vision_tower" in name]
    linear_before = {name: module for name, module in vision if isinstance(module, nn.Linear)}
    assert any(name.endswith("q_proj") for name in linear_before)  # it has projections of the same names
    inject(base.sites, ServingDeltas())
    linear_after = {
        name: module
        for name, module in base.model.named_modules()
        if "vision_tower" in name and isinstance(module, nn.Linear)
    }
    assert linear_after == linear_before


@pytest.mark.parametrize("architecture", sorted(MAKERS))
def test_a_wrapped_base_without_stacks_is_the_base_bit_for_bit(
    architecture: str, tiny_base_folder: Callable[[str], Path]
) -> None:
    base = load_base(str(tiny_base_folder(architecture)), base_format="dense", dtype="float32")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        before = base.head(base.decoder(input_ids=ids, use_cache=False).last_hidden_state)
        inject(base.sites, ServingDeltas())
        after = base.head(base.decoder(input_ids=ids, use_cache=False).last_hidden_state)
    assert torch.equal(before, after)


def test_nf4_is_packed_with_double_quantisation(tiny_base_folder: Callable[[str], Path]) -> None:
    base = load_base(str(tiny_base_folder("llama")), base_format="nf4", dtype="float32")
    for site in base.sites:
        assert isinstance(site.module, Linear4bit)
        state = getattr(site.module.weight, "quant_state")  # noqa: B009 - unknown to the type of a parameter
        assert state is not None
        assert state.quant_type == "nf4"
        assert state.nested
        assert site.module.weight.dtype == torch.uint8


def test_dense_nf4_holds_the_values_of_packed_nf4(tiny_base_folder: Callable[[str], Path]) -> None:
    folder = str(tiny_base_folder("llama"))
    packed, dense = (load_base(folder, base_format=name, dtype="float32") for name in ("nf4", "nf4-dense"))
    plain = load_base(folder, base_format="dense", dtype="float32")
    x = torch.randn(4, 64)
    for packed_site, dense_site, plain_site in zip(packed.sites, dense.sites, plain.sites, strict=True):
        if packed_site.in_features == 64:
            torch.testing.assert_close(packed_site.module(x), dense_site.module(x), rtol=5e-3, atol=5e-3)
        assert not torch.equal(dense_site.module.weight, plain_site.module.weight)  # type: ignore[arg-type]
    assert packed.fingerprint == dense.fingerprint == plain.fingerprint


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_hidden_states_are_those_of_transformers(architecture: str, tiny_base_folder: Callable[[str], Path]) -> None:
    folder = tiny_base_folder(architecture)
    base = load_base(str(folder), base_format="dense", dtype="float32")
    mid, last = hidden_states(base, IDS, mid_layer=1)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(mid, expected[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, expected[-1][0], rtol=1e-4, atol=1e-5)


def test_a_base_without_a_projection_is_refused_by_name(tmp_path: Path) -> None:
    config = Phi3Config(**{**SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "phi3")  # one fused qkv_proj
    tiny_tokenizer().save_pretrained(tmp_path / "phi3")
    with pytest.raises(BaseUnsupported, match=r"no projection layers\.0\.self_attn\.q_proj"):
        load_base(str(tmp_path / "phi3"), base_format="dense", dtype="float32")


def test_a_folder_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(BaseUnsupported, match=r"\./no/such/folder"):
        load_base("./no/such/folder")


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BaseUnsupported, match=tmp_path.name):
        load_base(str(tmp_path), base_format="dense", dtype="float32")


def test_unknown_formats_and_dtypes_are_refused_by_name(tiny_base_folder: Callable[[str], Path]) -> None:
    with pytest.raises(BaseUnsupported, match="int3"):
        load_base(str(tiny_base_folder("llama")), base_format="int3")  # type: ignore[arg-type]
    with pytest.raises(BaseUnsupported, match="float8"):
        load_base(str(tiny_base_folder("llama")), dtype="float8")  # type: ignore[arg-type]


def test_fingerprint_follows_configuration_and_chat_template(tmp_path: Path) -> None:
    first = make_llama(tmp_path / "a" / "model")
    same = make_llama(tmp_path / "b" / "model")
    wider = make_llama(tmp_path / "c" / "model", rope_theta=5e5)
    retold = make_llama(tmp_path / "d" / "model")
    (retold / "chat_template.jinja").write_text("{{ messages }}")
    prints = [
        load_base(str(folder), base_format="dense", dtype="float32").fingerprint
        for folder in (first, same, wider, retold)
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    assert prints[0].startswith("model@")


def test_a_recorded_identity_goes_with_the_folder(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "anywhere")
    (folder / "brainstacks_base.json").write_text(json.dumps({"model_id": "acme/clinic-1b"}))
    assert load_base(str(folder), base_format="dense", dtype="float32").fingerprint.startswith("acme/clinic-1b@")


def test_a_device_that_is_not_there_is_refused_by_name(tiny_base_folder: Callable[[str], Path]) -> None:
    with pytest.raises(BaseUnsupported, match="gpu"):
        load_base(str(tiny_base_folder("llama")), device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(BaseUnsupported, match="cuda"):
            load_base(str(tiny_base_folder("llama")), device="cuda")


def test_a_damaged_base_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BaseUnsupported, match="damaged"):
        load_base(str(folder), base_format="dense", dtype="float32")
