"""Imports of published stores through the command line compute what the published formulas compute from the files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from engine.model.base import Base, identify_base, load_base
from engine.model.hidden import hidden_states
from engine.model.inject import injected
from engine.model.moe_lora import ServingDeltas, ServingStack, StackPack
from engine.slots import load_domain
from router.checkpoint import RouterCheckpoint
from router.router import Router
from server.cli import app
from stack_store.format import verify_stack
from stack_store.registry import StackRegistry
from tests.published import PREFIXES, PublishedFiles, published_files, slow_published_delta, slow_published_scores

IDS = [5, 17, 300, 8, 41, 250, 99, 12]
MIX = {"chat": 0.3, "code": 0.8, "math": 0.55}
TEXT = "the quick brown fox says hello"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

TinyBase = Callable[[str], Path]


def import_store(folder: Path, store: Path, base: Path, *options: str) -> str:
    """What the command says of an import that succeeds."""
    arguments = ["stacks", "import-reference", str(folder), "--store", str(store), "--base", str(base), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def our_logits(base: Base, registry: StackRegistry, mix: Mapping[str, float]) -> Tensor:
    """(T, V) by the imported domains, in the form in which they are served."""
    stacks: list[ServingStack] = []
    weights: list[float] = []
    for name, weight in mix.items():
        domain = load_domain(registry, registry.domain(name), dtype=torch.float32, device=base.device)
        stacks += domain.stacks
        weights += [weight] * len(domain.stacks)
    deltas = ServingDeltas()
    deltas.current = StackPack(stacks).step(torch.tensor([weights] * len(IDS)))
    with injected(base.sites, deltas), torch.no_grad():
        logits: Tensor = base.model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    return logits


def plain_model(base_folder: Path) -> Any:
    """The base as transformers has it."""
    model: Any = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def slow_logits(base_folder: Path, published: PublishedFiles, mix: Mapping[str, float], **how: Any) -> Tensor:
    """(T, V): y = W x + sum over domains of w times the sum over their rounds of Delta(x), token by token."""
    model = plain_model(base_folder)
    for path, module in model.named_modules():
        if "vision_tower" in path or not isinstance(module, nn.Linear) or "layers." not in path:
            continue
        marker = path[path.index("layers.") :] + ".active_stack."
        module.register_forward_hook(_adds(_parameters(published, marker, mix), how))
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    return logits


def _parameters(
    published: PublishedFiles, marker: str, mix: Mapping[str, float]
) -> list[tuple[float, dict[str, Tensor]]]:
    """The weight and the parameters of every stack at one projection, found by what their keys end in."""
    found = []
    for name, weight in mix.items():
        for state in published.stacks[name]:
            text_keys = [key for key in state if marker in key and "vision_tower" not in key]
            assert len(text_keys) == 10
            found.append((weight, {key.partition(marker)[2]: state[key] for key in text_keys}))
    return found


def _adds(stacks: list[tuple[float, dict[str, Tensor]]], how: dict[str, Any]) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added = output.clone()
        for token, x in enumerate(inputs[0][0]):
            for weight, parameters in stacks:
                added[0, token] += weight * slow_published_delta(x, parameters, **how)
        return added

    return hook


def _load(base_folder: Path) -> Base:
    return load_base(str(base_folder), base_format="dense", dtype="float32", attention="eager")


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(("architecture", "prefix"), [("llama", "model"), *(("gemma3", prefix) for prefix in PREFIXES)])
def test_imported_stacks_give_the_logits_of_the_published_formula(
    architecture: str, prefix: str, dtype: str, tiny_base_folder: TinyBase, tmp_path: Path
) -> None:
    base_folder = tiny_base_folder(architecture)
    base = _load(base_folder)
    vision = architecture == "gemma3"
    published = published_files(
        f"maker/{base_folder.name}", base.geometry, prefix=prefix, dtype=DTYPES[dtype], vision=vision
    )
    said = import_store(published.write(tmp_path / "published"), tmp_path / "store", base_folder)
    assert f"dropped  {5 * 2 * 3 * 10 * vision} vision tensors, {5 * 3 * 7} noise tensors" in said
    registry = StackRegistry.open(tmp_path / "store", base_fingerprint=base.fingerprint, geometry=base.geometry)
    assert [(domain.name, len(domain.stacks)) for domain in registry.manifest.domains] == [
        ("chat", 2),
        ("code", 1),
        ("math", 2),
    ]
    expected = slow_logits(base_folder, published, MIX)
    torch.testing.assert_close(our_logits(base, registry, MIX), expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(
        our_logits(base, registry, {"math": 1.0}),
        slow_logits(base_folder, published, {"math": 1.0}),
        atol=2e-4,
        rtol=2e-4,
    )
    # The stacks matter, or the comparison would say nothing.
    assert (expected - slow_logits(base_folder, published, {})).abs().max() > 0.05


def test_top_k_and_scale_are_what_the_options_say(tiny_base_folder: TinyBase, tmp_path: Path) -> None:
    base_folder = tiny_base_folder("llama")
    base = _load(base_folder)
    published = published_files(base_folder.name, base.geometry, rank=3)
    folder = published.write(tmp_path / "published", stacks_under=".")
    import_store(folder, tmp_path / "store", base_folder, "--top-k", "1", "--scale", "2.5")
    registry = StackRegistry.open(tmp_path / "store")
    header = verify_stack(registry.stack_path(registry.domain("math").stacks[1]))[0]
    assert (header.top_k, header.scale, header.rank, header.round, header.domain) == (1, 2.5, 3, 2, "math")
    torch.testing.assert_close(
        our_logits(base, registry, MIX),
        slow_logits(base_folder, published, MIX, top_k=1, scale=2.5),
        atol=2e-4,
        rtol=2e-4,
    )


def test_a_recorded_path_that_exists_is_taken_first(tiny_base_folder: TinyBase, tmp_path: Path) -> None:
    base_folder = tiny_base_folder("llama")
    identity = identify_base(str(base_folder))
    published = published_files(base_folder.name, identity.geometry)
    folder = published.write(tmp_path / "published", stacks_under="BrainStacks_tiny")
    decoy = folder / "stacks" / "chat" / "stack_1.pt"
    decoy.parent.mkdir(parents=True)
    decoy.write_bytes(b"not what the manifest means")
    assert "round 2" in import_store(folder, tmp_path / "store", base_folder)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("log_temperature", [0.3, 5.0, -5.0])  # between the bounds, above and below
def test_imported_router_gives_the_published_scores_and_mix(
    architecture: str, log_temperature: float, tiny_base_folder: TinyBase, tmp_path: Path
) -> None:
    base_folder = tiny_base_folder(architecture)
    base = _load(base_folder)
    published = published_files(base_folder.name, base.geometry)
    published.router["state_dict"]["log_temperature"].fill_(log_temperature)
    import_store(published.write(tmp_path / "published"), tmp_path / "store", base_folder)
    registry = StackRegistry.open(tmp_path / "store")
    path = registry.router_path()
    assert path is not None
    checkpoint = RouterCheckpoint.load(path, base_fingerprint=base.fingerprint)
    router = Router.from_checkpoint(
        checkpoint,
        tokenizer=base.tokenizer,
        hidden_states=lambda ids: hidden_states(base, ids, checkpoint.settings.mid_layer),
    )
    for text in (TEXT, f"{TEXT} to the world" * 40):
        route = router.route(text)
        expected = slow_published_scores(published.router, slow_features(base_folder, base.tokenizer, text))
        assert dict(route.scores) == pytest.approx(expected, abs=1e-5)
        assert list(route.scores) == ["math", "chat", "code"]
        floored = expected | {"chat": max(expected["chat"], 0.3)}
        assert dict(route.mix) == pytest.approx({n: w for n, w in floored.items() if w > 0.15}, abs=1e-5)
    assert len({round(score, 3) for score in expected.values()}) == 3
    assert checkpoint.stack_digests == {
        name: tuple(stack.digest for stack in registry.domain(name).stacks) for name in ("math", "chat", "code")
    }


def slow_features(base_folder: Path, tokenizer: Any, text: str) -> Tensor:
    """(T, H): 0.45 of the middle hidden state and 0.55 of the last, of the first 256 tokens of the raw text."""
    model = plain_model(base_folder)
    ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=256)["input_ids"]
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == 4
    return 0.45 * states[len(states) // 2][0] + 0.55 * states[-1][0]


def test_feature_settings_are_what_the_options_say(tiny_base_folder: TinyBase, tmp_path: Path) -> None:
    base_folder = tiny_base_folder("llama")
    published = published_files(base_folder.name, identify_base(str(base_folder)).geometry)
    published.router["state_dict"]["log_temperature"] = torch.tensor([0.25])  # a parameter of one value has two shapes
    options = ["--mid-layer", "1", "--mid-weight", "0.3", "--last-weight", "0.7", "--max-tokens", "96"]
    import_store(published.write(tmp_path / "published"), tmp_path / "store", base_folder, *options)
    path = StackRegistry.open(tmp_path / "store").router_path()
    assert path is not None
    checkpoint = RouterCheckpoint.load(path)
    settings = checkpoint.settings
    assert (settings.mid_layer, settings.mid_weight, settings.last_weight, settings.max_tokens) == (1, 0.3, 0.7, 96)
    assert checkpoint.network.temperature().item() == pytest.approx(2.718281828**0.25)
    policy = checkpoint.policy
    assert (policy.floor_domain, policy.floor, policy.threshold, policy.gap_threshold) == ("chat", 0.3, 0.15, 0.15)


def test_stacks_can_be_imported_without_a_router(tiny_base_folder: TinyBase, tmp_path: Path) -> None:
    base_folder = tiny_base_folder("llama")
    published = published_files(base_folder.name, identify_base(str(base_folder)).geometry)
    folder = published.write(tmp_path / "published")
    (folder / "meta_router.pt").unlink()
    import_store(folder, tmp_path / "store", base_folder, "--without-router")
    manifest = StackRegistry.open(tmp_path / "store").manifest
    assert manifest.router is None
    assert len(manifest.domains) == 3
