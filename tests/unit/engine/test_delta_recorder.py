"""What the recorder keeps is what a token-by-token computation of the deltas gives."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.model.base import Base, load_base
from engine.model.delta_recorder import DeltaRecorder
from engine.model.inject import DeltaSource, inject
from engine.model.moe_lora import MoeLoraConfig, ServingDeltas, StackPack
from stack_store.format import INPUT_GROUPS
from tests.stacks import Projections, random_projections, slow_delta, to_serving

CONFIG = MoeLoraConfig(num_experts=3, rank=2, top_k=2)
TEXTS = ["hello", "the quick brown fox", "says the dog to the world"]
GROUP_OF_Q = ("qkv", 0)


class SlowRecorder:
    """One example without padding at a time: sums slow_delta over its tokens."""

    def __init__(self, projections: Projections) -> None:
        self.projections = projections
        self.means: dict[tuple[int, str], list[Tensor]] = {key: [] for key in projections}

    def add_delta(self, y: Tensor, x: Tensor, layer: int, group: str, index: int) -> Tensor:
        key = (layer, INPUT_GROUPS[group][index])
        deltas = torch.stack([slow_delta(token, self.projections[key], CONFIG) for token in x[0]])
        total = torch.zeros(deltas.shape[1])
        for delta in deltas:
            total += delta
        self.means[key].append(total / len(deltas))
        return y + deltas


class Constant:
    """Adds `delta` to every projection."""

    def __init__(self, delta: Tensor) -> None:
        self.delta = delta

    def add_delta(self, y: Tensor, x: Tensor, layer: int, group: str, index: int) -> Tensor:
        return y + self.delta


@pytest.fixture
def base(tiny_base_folder: Callable[[str], Path]) -> Base:
    return load_base(str(tiny_base_folder("llama")), base_format="nf4-dense", dtype="float32")


def run(
    base: Base, source: DeltaSource, rows: Sequence[Sequence[int]], recorder: DeltaRecorder | None = None
) -> Tensor:
    """One padded forward; padding is a token like any other, so that it has deltas of its own."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[7] * (longest - len(row))] for row in rows])
    real = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
    inject(base.sites, source)
    if recorder is not None:
        recorder.begin_batch(real)
    with torch.no_grad():
        hidden: Tensor = base.decoder(input_ids=ids, attention_mask=real.long(), use_cache=False).last_hidden_state
    return hidden


def serving_source(base: Base, projections: Projections) -> ServingDeltas:
    source = ServingDeltas()
    source.current = StackPack([to_serving(base.geometry, CONFIG, projections)]).step(torch.ones(1, 1))
    return source


def test_rows_equal_the_slow_sum_over_real_tokens(base: Base) -> None:
    projections = random_projections(base.geometry, CONFIG, seed=3)
    slow, recorder = SlowRecorder(projections), DeltaRecorder(serving_source(base, projections))
    token_ids = [base.tokenizer(text)["input_ids"] for text in TEXTS]
    assert len({len(ids) for ids in token_ids}) == 3  # so the batches are padded
    for ids in token_ids:
        run(base, slow, [ids])
    run(base, recorder, token_ids[:2], recorder)
    run(base, recorder, token_ids[2:], recorder)
    recorded = recorder.rows()
    assert recorded.keys() == projections.keys()
    for key, rows in recorded.items():
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, torch.stack(slow.means[key]), rtol=1e-4, atol=1e-4)


def test_recorder_adds_what_its_source_adds(base: Base) -> None:
    source = serving_source(base, random_projections(base.geometry, CONFIG, seed=3, size=0.02))
    recorder = DeltaRecorder(source)
    recorded = run(base, recorder, [[5, 6, 8], [9, 4, 3]], recorder)
    torch.testing.assert_close(recorded, run(base, source, [[5, 6, 8], [9, 4, 3]]), rtol=1e-4, atol=1e-5)


def test_small_delta_beside_a_large_output_is_recorded_exactly() -> None:
    recorder = DeltaRecorder(Constant(torch.tensor([2.0**-9, 1.0], dtype=torch.bfloat16)))
    recorder.begin_batch(torch.ones(1, 3, dtype=torch.bool))
    y = torch.full((1, 3, 2), 256.0, dtype=torch.bfloat16)
    assert (recorder.add_delta(y, y, 0, *GROUP_OF_Q)[..., 0] == 256).all()  # bf16 rounds the sum
    assert torch.equal(recorder.rows()[0, "q_proj"], torch.tensor([[2.0**-9, 1.0]]))


def test_padding_may_hold_anything() -> None:
    recorder = DeltaRecorder(Constant(torch.tensor([[[1.0], [2.0], [torch.nan]], [[3.0], [torch.inf], [-9.0]]])))
    recorder.begin_batch(torch.tensor([[True, True, False], [True, False, False]]))
    recorder.add_delta(torch.zeros(2, 3, 1), torch.zeros(2, 3, 1), 0, *GROUP_OF_Q)
    assert torch.equal(recorder.rows()[0, "q_proj"], torch.tensor([[1.5], [3.0]]))


def test_a_real_delta_that_is_not_finite_is_named() -> None:
    recorder = DeltaRecorder(Constant(torch.tensor(torch.nan)))
    recorder.begin_batch(torch.ones(1, 1, dtype=torch.bool))
    recorder.add_delta(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), 4, *GROUP_OF_Q)
    with pytest.raises(ValueError, match="layer 4 q_proj got a delta that is not finite"):
        recorder.rows()


def test_a_forward_without_its_layout_is_refused() -> None:
    recorder, y = DeltaRecorder(Constant(torch.tensor(1.0))), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="layer 0 q_proj runs without the layout"):
        recorder.add_delta(y, y, 0, *GROUP_OF_Q)
    recorder.begin_batch(torch.ones(1, 2, dtype=torch.bool))
    recorder.add_delta(y, y, 0, *GROUP_OF_Q)
    with pytest.raises(ValueError, match="layer 0 q_proj runs without the layout"):
        recorder.add_delta(y, y, 0, *GROUP_OF_Q)


def test_a_projection_that_missed_a_batch_is_named() -> None:
    recorder, y = DeltaRecorder(Constant(torch.tensor(1.0))), torch.zeros(1, 2, 3)
    for _ in range(2):
        recorder.begin_batch(torch.ones(1, 2, dtype=torch.bool))
        recorder.add_delta(y, y, 0, *GROUP_OF_Q)
    recorder.begin_batch(torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="layer 0 q_proj ran in 2 of 3 batches"):
        recorder.rows()


def test_layouts_that_no_batch_can_have_are_refused() -> None:
    recorder, y = DeltaRecorder(Constant(torch.tensor(1.0))), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"torch.int64 of shape \[1, 2\]"):
        recorder.begin_batch(torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="example 1 of the batch has no real token"):
        recorder.begin_batch(torch.tensor([[True, False], [False, False]]))
    recorder.begin_batch(torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="layer 0 q_proj runs on 2 tokens, the layout has 3"):
        recorder.add_delta(y, y, 0, *GROUP_OF_Q)
