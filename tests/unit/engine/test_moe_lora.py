"""Compares every form of a stack's mathematics with the slow, obviously right one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.model.moe_lora import (
    PANEL,
    MoeLoraConfig,
    ServingDeltas,
    ServingStack,
    StackPack,
    panels_of,
    serving_stack,
    top_k_gate,
)
from engine.model.training_form import MoeLoraGroup, MoeLoraStack, TrainingDeltas, expert_share, load_balance_loss
from stack_store.format import INPUT_GROUPS, PROJECTIONS, Geometry, pack_groups
from tests.stacks import Projections, header_for, random_projections, slow_delta, to_serving

GEOMETRY = Geometry(
    num_layers=2,
    shapes={
        "q_proj": (12, 12),
        "k_proj": (12, 6),
        "v_proj": (12, 6),
        "o_proj": (12, 12),
        "gate_proj": (12, 20),
        "up_proj": (12, 20),
        "down_proj": (20, 12),
    },
)

configs = st.integers(1, 6).flatmap(
    lambda experts: st.builds(
        MoeLoraConfig,
        num_experts=st.just(experts),
        rank=st.integers(1, 5),
        top_k=st.integers(1, experts),
        alpha=st.floats(1.0, 16.0),
    )
)


def all_deltas(stacks: list[ServingStack], x_by_width: dict[int, Tensor], row_weights: Tensor) -> dict[str, Tensor]:
    """What the serving form adds to every projection of the last layer."""
    deltas = ServingDeltas()
    deltas.current = StackPack(stacks).step(row_weights)
    layer = GEOMETRY.num_layers - 1
    out = {}
    for group, members in INPUT_GROUPS.items():
        x = x_by_width[GEOMETRY.shapes[members[0]][0]]
        for index, name in enumerate(members):
            y = torch.zeros(1, x.shape[0], GEOMETRY.shapes[name][1])
            out[name] = deltas.add_delta(y, x, layer, group, index)[0]
    return out


def slow_mix(
    stacks: list[tuple[MoeLoraConfig, Projections]], x_by_width: dict[int, Tensor], row_weights: Tensor
) -> dict[str, Tensor]:
    """The same, one token, one stack, one expert at a time."""
    layer = GEOMETRY.num_layers - 1
    out = {}
    for name in PROJECTIONS:
        width, out_features = GEOMETRY.shapes[name]
        x = x_by_width[width]
        rows = torch.zeros(x.shape[0], out_features)
        for row in range(x.shape[0]):
            for column, (config, projections) in enumerate(stacks):
                weight = float(row_weights[row, column])
                rows[row] += weight * slow_delta(x[row], projections[layer, name], config)
        out[name] = rows
    return out


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shapes=st.lists(configs, min_size=1, max_size=4), tokens=st.integers(1, 5))
def test_serving_form_equals_the_slow_reference(data: st.DataObject, shapes: list[MoeLoraConfig], tokens: int) -> None:
    drawn = [(c, random_projections(GEOMETRY, c, seed=data.draw(st.integers(0, 2**31)))) for c in shapes]
    weight = st.one_of(st.just(0.0), st.floats(0.01, 1.0))
    row_weights = torch.tensor([[data.draw(weight) for _ in drawn] for _ in range(tokens)], dtype=torch.float32)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = {width: torch.randn(tokens, width, generator=generator) for width in (12, 20)}
    fast = all_deltas([to_serving(GEOMETRY, c, p) for c, p in drawn], x, row_weights)
    slow = slow_mix(drawn, x, row_weights)
    for name in PROJECTIONS:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-5, atol=1e-5)


def test_training_form_without_noise_equals_the_slow_reference() -> None:
    config = MoeLoraConfig(num_experts=4, rank=3, top_k=2)
    torch.manual_seed(0)
    group = MoeLoraGroup(12, [12, 6, 6], config).eval()
    for b in group.b:
        torch.nn.init.normal_(b)
    x = torch.randn(7, 12)
    for index, fast in enumerate(group(x)):
        weights = group.projection(index)
        slow = torch.stack([slow_delta(row, weights, config) for row in x])
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_stack_that_serving_computes_equals_the_one_that_training_evaluated() -> None:
    config = MoeLoraConfig(num_experts=4, rank=3, top_k=2)
    torch.manual_seed(0)
    stack = MoeLoraStack(GEOMETRY, config).eval()
    for group in stack.all_groups():
        for b in group.b:
            torch.nn.init.normal_(b)
    header = header_for(GEOMETRY, config)
    packed = pack_groups(header, stack.projections(GEOMETRY.num_layers))
    served = serving_stack(header, packed, dtype=torch.float32, device=torch.device("cpu"))
    x = {width: torch.randn(5, width) for width in (12, 20)}
    fast = all_deltas([served], x, torch.ones(5, 1))
    for group_name, members in INPUT_GROUPS.items():
        trained = stack.group(1, group_name)(x[GEOMETRY.shapes[members[0]][0]])
        for name, expected in zip(members, trained, strict=True):
            torch.testing.assert_close(fast[name], expected)


@pytest.mark.parametrize("width", [20, 32, 64, 70])
def test_panels_hold_every_number_once_in_the_order_of_columns(width: int) -> None:
    experts, rank = 3, 4
    b = torch.arange(experts * rank * width, dtype=torch.float32).view(experts * rank, width)
    slow = [
        b[expert * rank + row, column]
        for expert in range(experts)
        for start in range(0, width, PANEL)
        for row in range(rank)
        for column in range(start, min(start + PANEL, width))
    ]
    assert torch.equal(panels_of(b, experts), torch.stack(slow))


def test_a_panelled_stack_is_not_packed() -> None:
    config = MoeLoraConfig(num_experts=4, rank=3, top_k=2)
    stack = to_serving(GEOMETRY, config, random_projections(GEOMETRY, config, seed=1), panelled=True)
    with pytest.raises(ValueError, match="panelled"):
        StackPack([stack])


def test_fresh_stack_changes_no_bit() -> None:
    stack = MoeLoraStack(GEOMETRY, MoeLoraConfig())
    for group in stack.all_groups():  # in train mode, with noise
        for delta in group(torch.randn(5, group.a.shape[-1])):
            assert torch.equal(delta, torch.zeros_like(delta))


def test_noise_acts_in_train_mode_only() -> None:
    torch.manual_seed(0)
    group = MoeLoraGroup(12, [12], MoeLoraConfig(num_experts=4, rank=2))
    torch.nn.init.normal_(group.b[0])
    x = torch.randn(64, 12)
    assert not torch.equal(group(x)[0], group(x)[0])
    group.eval()
    assert torch.equal(group(x)[0], group(x)[0])


def test_serving_form_is_deterministic_while_another_stack_trains_beside_it() -> None:
    config = MoeLoraConfig(num_experts=4, rank=2)
    served = to_serving(GEOMETRY, config, random_projections(GEOMETRY, config, seed=1))
    x = {width: torch.randn(5, width) for width in (12, 20)}
    before = all_deltas([served], x, torch.ones(5, 1))
    training = TrainingDeltas(MoeLoraStack(GEOMETRY, config).train())
    for group, members in INPUT_GROUPS.items():
        for index, name in enumerate(members):
            width, out_features = GEOMETRY.shapes[name]
            training.add_delta(torch.zeros(5, out_features), x[width], 0, group, index)  # draws noise
    after = all_deltas([served], x, torch.ones(5, 1))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_row_without_a_mix_is_exactly_the_base_also_beside_a_broken_stack() -> None:
    config = MoeLoraConfig(num_experts=2, rank=2, top_k=1)
    broken = random_projections(GEOMETRY, config, seed=1, size=1e38)
    x = {width: torch.randn(3, width) * 10 for width in (12, 20)}
    weights = torch.tensor([[0.0], [1.0], [0.0]])
    deltas = all_deltas([to_serving(GEOMETRY, config, broken)], x, weights)
    for delta in deltas.values():
        assert torch.equal(delta[0], torch.zeros_like(delta[0]))
        assert torch.equal(delta[2], torch.zeros_like(delta[2]))


def test_rows_share_one_input_product_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoeLoraConfig(num_experts=2, rank=2)
    stack = to_serving(GEOMETRY, config, random_projections(GEOMETRY, config, seed=1))
    calls: list[tuple[int, str]] = []
    deltas = ServingDeltas()
    step = StackPack([stack]).step(torch.ones(3, 1))
    computed = step.weighted_mid

    def counted(x: Tensor, key: tuple[int, str]) -> Tensor:
        calls.append(key)
        return computed(x, key)

    monkeypatch.setattr(step, "weighted_mid", counted)
    deltas.current = step
    x = torch.randn(3, 12)
    for index, name in enumerate(INPUT_GROUPS["qkv"]):
        deltas.add_delta(torch.zeros(3, GEOMETRY.shapes[name][1]), x, 0, "qkv", index)
    assert calls == [(0, "qkv")]


def test_a_new_tensor_in_the_same_group_is_never_taken_for_the_old_one() -> None:
    config = MoeLoraConfig(num_experts=2, rank=2)
    stack = to_serving(GEOMETRY, config, random_projections(GEOMETRY, config, seed=1))
    deltas = ServingDeltas()
    deltas.current = StackPack([stack]).step(torch.ones(3, 1))
    first, second = torch.randn(3, 12), torch.randn(3, 12)
    deltas.add_delta(torch.zeros(3, 12), first, 0, "qkv", 0)  # k and v of this call never come
    got = deltas.add_delta(torch.zeros(3, 12), second, 0, "qkv", 0)
    deltas.current = StackPack([stack]).step(torch.ones(3, 1))
    fresh = ServingDeltas()
    fresh.current = deltas.current
    assert torch.equal(got, fresh.add_delta(torch.zeros(3, 12), second, 0, "qkv", 0))


def test_gate_weighs_the_largest_logits_and_sums_to_one() -> None:
    gate = top_k_gate(torch.tensor([[1.0, 3.0, 2.0, -5.0]]), 2)
    expected = torch.tensor([[0.0, math.e / (1 + math.e), 1 / (1 + math.e), 0.0]])
    torch.testing.assert_close(gate, expected)


def test_load_balance_is_one_when_balanced_and_pulls_towards_it() -> None:
    balanced = torch.eye(4).repeat(8, 1) * 1e-6
    gate = top_k_gate(balanced + torch.rand(32, 4, generator=torch.Generator().manual_seed(0)) * 1e-9, 2)
    assert float(load_balance_loss(balanced, expert_share(gate, 2))) == pytest.approx(1.0, abs=1e-4)

    logits = torch.zeros(64, 4)
    logits[:, 0] = 3.0
    logits.requires_grad_()
    loss = load_balance_loss(logits, expert_share(top_k_gate(logits, 2), 2))
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert loss.item() > 1.2
    assert float(logits.grad[:, 0].sum()) > 0  # descending lowers the busy expert's logit


@pytest.mark.parametrize(
    ("fields", "named"), [({"top_k": 5}, "top_k"), ({"rank": 0}, "rank"), ({"alpha": -1.0}, "alpha")]
)
def test_impossible_shapes_are_refused_by_name(fields: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MoeLoraConfig(**fields)


def test_the_balance_loss_moves_a_gate_that_favours_two_experts() -> None:
    torch.manual_seed(0)
    group = MoeLoraGroup(12, [12, 6], MoeLoraConfig(num_experts=4, rank=2))
    x = torch.randn(200, 12) + 1.0
    with torch.no_grad():
        group.gate[:, :2] += 0.5  # x has a positive mean: every token chooses the first two

    def shares() -> Tensor:
        """(P, E), of the noisy choices that the loss balances."""
        group.train()(x)
        assert group.expert_share is not None
        return group.expert_share

    torch.testing.assert_close(shares(), torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2), atol=0.05, rtol=0)
    optimizer = torch.optim.AdamW([group.gate, group.noise], lr=1e-2)
    for _ in range(300):
        group.train()(x)
        assert group.aux_loss is not None
        (0.01 * group.aux_loss).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert bool(((shares() > 0.15) & (shares() < 0.35)).all()), shares()
