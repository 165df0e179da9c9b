"""Facts about router files: what is read back, and what is refused by name."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from router.checkpoint import RouterCheckpoint
from router.errors import CheckpointIncompatible, CheckpointInvalid
from router.features import FeatureSettings, pad_features
from router.network import MetaRouter
from router.policy import RoutingPolicy

DIGEST = "ab" * 32
POLICY = {"floor_domain": "chat", "floor": 0.2, "threshold": 0.1, "gap_threshold": 0.1}


def small_checkpoint() -> RouterCheckpoint:
    torch.manual_seed(0)
    return RouterCheckpoint(
        network=MetaRouter(6, ("math", "chat"), hidden_dim=8),
        settings=FeatureSettings(mid_layer=3, mid_weight=0.4, last_weight=0.6, max_tokens=17),
        policy=RoutingPolicy(floor_domain="chat", floor=0.3, threshold=0.2, gap_threshold=0.4),
        stack_digests={"math": (DIGEST,), "chat": ()},
        base_fingerprint="base-1",
    )


def rewrite(path: Path, *, tensors: dict[str, Tensor] | None = None, entries: dict[str, str] | None = None) -> None:
    """The file again, with these tensors or these metadata entries in place of its own."""
    with safetensors.safe_open(path, framework="pt") as file:
        old_entries = file.metadata()
    old_tensors = safetensors.torch.load(path.read_bytes())
    new_entries = entries if entries is not None else old_entries
    path.write_bytes(safetensors.torch.save(tensors if tensors is not None else old_tensors, new_entries))


def metadata_of(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["router"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound router file."""
    path = tmp_path / "router.safetensors"
    small_checkpoint().save(path)
    return path


def test_a_loaded_router_is_the_saved_one(tmp_path: Path) -> None:
    saved = small_checkpoint()
    digest = saved.save(tmp_path / "router.safetensors")
    loaded = RouterCheckpoint.load(tmp_path / "router.safetensors", base_fingerprint="base-1", expected_digest=digest)
    assert loaded.network.domains == ("math", "chat")
    assert (loaded.settings, loaded.policy) == (saved.settings, saved.policy)
    assert (loaded.stack_digests, loaded.base_fingerprint) == (saved.stack_digests, saved.base_fingerprint)
    batch = pad_features([torch.randn(5, 6), torch.randn(2, 6)])
    assert not loaded.network.training
    assert torch.equal(loaded.network.scores(*batch), saved.network.eval().scores(*batch))


def test_equal_routers_have_equal_digests(tmp_path: Path) -> None:
    digests = {small_checkpoint().save(tmp_path / f"{copy}.safetensors") for copy in range(5)}
    assert len(digests) == 1


def test_loading_spends_no_random_numbers(path: Path) -> None:
    before = torch.get_rng_state()
    RouterCheckpoint.load(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_leaves_one_file_and_replaces_the_old(path: Path) -> None:
    path.write_bytes(b"old")
    small_checkpoint().save(path)
    RouterCheckpoint.load(path)
    assert list(path.parent.iterdir()) == [path]


def test_a_loaded_router_outlives_its_file(path: Path) -> None:
    network = RouterCheckpoint.load(path).network
    path.write_bytes(b"")
    assert torch.equal(network.token_proj.weight, small_checkpoint().network.token_proj.weight)


def test_a_missing_tensor_is_refused(path: Path) -> None:
    tensors = safetensors.torch.load(path.read_bytes())
    del tensors["domain_queries.1"]
    rewrite(path, tensors=tensors)
    with pytest.raises(CheckpointInvalid, match=r"lacks the tensors \['domain_queries.1'\]"):
        RouterCheckpoint.load(path)


def test_an_extra_tensor_is_refused(path: Path) -> None:
    rewrite(path, tensors={**safetensors.torch.load(path.read_bytes()), "domain_queries.2": torch.zeros(8)})
    with pytest.raises(CheckpointInvalid, match=r"has the foreign tensors \['domain_queries.2'\]"):
        RouterCheckpoint.load(path)


def test_a_misshapen_tensor_is_refused(path: Path) -> None:
    rewrite(path, tensors={**safetensors.torch.load(path.read_bytes()), "global_query": torch.zeros(1, 8)})
    with pytest.raises(CheckpointInvalid, match=r"'global_query' has shape \(1, 8\), not \(8,\)"):
        RouterCheckpoint.load(path)


def test_a_tensor_of_another_dtype_is_refused(path: Path) -> None:
    rewrite(path, tensors={**safetensors.torch.load(path.read_bytes()), "global_query": torch.zeros(8).half()})
    with pytest.raises(CheckpointInvalid, match=r"'global_query' is torch.float16, not torch.float32"):
        RouterCheckpoint.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_refused(path: Path, value: float) -> None:
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["mlp.0.weight"][2, 3] = value
    rewrite(path, tensors=tensors)
    with pytest.raises(CheckpointInvalid, match=r"'mlp.0.weight' is not finite"):
        RouterCheckpoint.load(path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format_version": 2}, "format_version: Input should be 1"),
        ({"kind": "stack"}, "kind: Input should be 'meta_router'"),
        ({"base_fingerprint": ""}, "base_fingerprint"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"domains": ["math", "math"]}, r"domains \('math', 'math'\) must be unique"),
        ({"domains": ["math", "law"]}, r"stack_digests has \['chat', 'math'\], domains has \['law', 'math'\]"),
        ({"stack_digests": {"math": ["xyz"], "chat": []}}, "stack_digests.math.0"),
        ({"token_dim": "6"}, "token_dim: Input should be a valid integer"),
        ({"token_dim": 10**30}, "token_dim"),
        ({"token_dim": 7}, r"'token_proj.weight' has shape \(8, 6\), not \(8, 7\)"),
        ({"features": {"mid_layer": 3}}, r"lacks the keys \['last_weight', 'max_tokens', 'mid_weight', 'text_form'\]"),
        ({"policy": {**POLICY, "threshold": 7.0}}, "threshold must be in"),
        ({"policy": {**POLICY, "floor": float("nan")}}, "floor: Input should be a finite"),
        ({"policy": {**POLICY, "cap": 2}}, "policy.cap: Unexpected"),
        (
            {"policy": {name: value for name, value in POLICY.items() if name != "gap_threshold"}},
            r"policy: Value error, lacks the keys \['gap_threshold'\]",
        ),
    ],
)
def test_wrong_metadata_is_refused_by_name(path: Path, change: dict[str, object], fault: str) -> None:
    rewrite(path, entries={"router": json.dumps({**metadata_of(path), **change})})
    with pytest.raises(CheckpointInvalid, match=fault):
        RouterCheckpoint.load(path)


def test_a_missing_metadata_key_is_refused(path: Path) -> None:
    metadata = metadata_of(path)
    del metadata["domains"]
    rewrite(path, entries={"router": json.dumps(metadata)})
    with pytest.raises(CheckpointInvalid, match="domains: Field required"):
        RouterCheckpoint.load(path)


def test_metadata_that_is_no_json_is_refused(path: Path) -> None:
    rewrite(path, entries={"router": "{"})
    with pytest.raises(CheckpointInvalid, match="as a whole: Invalid JSON"):
        RouterCheckpoint.load(path)


@pytest.mark.parametrize("entries", [{}, {"format": "pt"}, {"router": "{}", "more": "x"}])
def test_a_safetensors_file_of_another_kind_is_refused(path: Path, entries: dict[str, str]) -> None:
    rewrite(path, entries=entries)
    with pytest.raises(CheckpointInvalid, match="is not a router file"):
        RouterCheckpoint.load(path)


def test_a_renamed_pickle_is_refused(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": [1.0]}))
    with pytest.raises(CheckpointInvalid, match="is not a safetensors file"):
        RouterCheckpoint.load(path)


def test_a_renamed_torch_file_is_refused(path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointInvalid, match="is not a safetensors file"):
        RouterCheckpoint.load(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.9, 0.9999])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    file_bytes = path.read_bytes()
    path.write_bytes(file_bytes[: int(len(file_bytes) * share)])
    with pytest.raises(CheckpointInvalid, match="is not a safetensors file"):
        RouterCheckpoint.load(path)


def test_a_dtype_unknown_to_torch_is_refused(path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(CheckpointInvalid, match="unknown type 'F8_E8M0'"):
        RouterCheckpoint.load(path)


def test_another_base_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointIncompatible, match="trained on base 'base-1', not on 'base-2'"):
        RouterCheckpoint.load(path, base_fingerprint="base-2")


def test_another_digest_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointIncompatible, match=f"not {DIGEST}"):
        RouterCheckpoint.load(path, expected_digest=DIGEST)


def test_an_unsound_router_is_not_saved(path: Path) -> None:
    before = path.read_bytes()
    broken = small_checkpoint()
    torch.nn.init.constant_(broken.network.global_query, torch.nan)
    with pytest.raises(CheckpointInvalid, match="'global_query' is not finite"):
        broken.save(path)
    sound = small_checkpoint()
    unlabelled = RouterCheckpoint(
        network=sound.network,
        settings=sound.settings,
        policy=sound.policy,
        stack_digests={"math": (DIGEST,)},
        base_fingerprint="base-1",
    )
    with pytest.raises(CheckpointInvalid, match=r"cannot be written: .*stack_digests has \['math'\]"):
        unlabelled.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
