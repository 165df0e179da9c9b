"""Training one stack on a tiny base: it learns, repeats itself, keeps its best, and serves as it was evaluated."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.model.base import Base, load_base
from engine.model.inject import inject
from engine.model.moe_lora import (
    MoeLoraConfig,
    MoeLoraStack,
    ServingDeltas,
    StackPack,
    TrainingDeltas,
    serving_stack,
)
from stack_store.format import StackHeader, pack_groups, read_stack, write_stack
from training.data import Example, Record, render
from training.errors import TrainingDiverged
from training.loss import answer_loss_sum, mean_answer_loss
from training.recipe import TrainingSection
from training.stack_training import BestStack, Progress, TrainedStack, train_stack

CONFIG = MoeLoraConfig(num_experts=4, rank=4, top_k=2)
SETTINGS = TrainingSection(steps=30, tokens_per_step=256, learning_rate=5e-3, warmup_steps=3, eval_every=10)


@pytest.fixture
def base(tiny_base_folder: Callable[[str], Path]) -> Base:
    return load_base(str(tiny_base_folder("llama")), base_format="nf4-dense", dtype="float32")


def examples(base: Base, count: int = 24) -> list[Example]:
    records = [
        Record(f"say {word} {i}", f"{word} the lazy dog") for i in range(count // 2) for word in ("hello", "fox")
    ]
    return [render(base.tokenizer, record) for record in records]


def train(base: Base, *, seed: int = 1, settings: TrainingSection = SETTINGS) -> tuple[TrainedStack, list[Progress]]:
    seen: list[Progress] = []
    data = examples(base)
    trained = train_stack(
        base, data[4:], data[:4], config=CONFIG, settings=settings, seed=seed, on_progress=seen.append
    )
    return trained, seen


def test_training_lowers_the_held_out_loss_and_reports_progress(base: Base) -> None:
    trained, seen = train(base)
    assert trained.best_loss < trained.base_loss - 0.5
    assert [p.step for p in seen] == list(range(1, 31))
    assert [p.step for p in seen if p.validation_loss is not None] == [10, 20, 30]
    assert seen[-1].seconds_left == 0
    assert all(p.tokens_per_second > 0 for p in seen)
    low, high = trained.expert_share_range
    assert 0 < low <= 0.25 <= high < 1


def test_the_same_seed_trains_the_same_stack_and_another_does_not(base: Base) -> None:
    first, second, other = (train(base, seed=seed)[0].stack.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_base_stays_frozen(base: Base) -> None:
    before = {site.path: site.module.state_dict()["weight"].clone() for site in base.sites}
    train(base, settings=TrainingSection(steps=3, tokens_per_step=256, warmup_steps=1, eval_every=3))
    after = {site.path: site.module.state_dict()["base.weight"] for site in base.sites}
    changed = [path for path in before if not torch.equal(before[path], after[path])]
    assert changed == []


def test_gradients_are_the_same_before_and_after_an_evaluation(base: Base) -> None:
    data = examples(base)
    stack = MoeLoraStack(base.geometry, CONFIG)
    for group in stack.all_groups():
        for b in group.b:
            torch.nn.init.normal_(b, std=0.05)
    inject(base.sites, TrainingDeltas(stack))

    def gradients() -> list[torch.Tensor]:
        stack.train()
        stack.zero_grad()
        torch.manual_seed(0)  # the same noise
        loss, count = answer_loss_sum(base, stack, data[:4])
        (loss / count + 0.01 * stack.aux_loss()).backward()  # type: ignore[no-untyped-call]
        return [p.grad.clone() for p in stack.parameters() if p.grad is not None]

    before = gradients()
    stack.eval()
    mean_answer_loss(base, stack, data, max_tokens=128)
    after = gradients()
    assert len(before) == len(list(stack.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    first_layer = stack.group(0, "qkv").a.grad
    assert first_layer is not None
    assert float(first_layer.abs().sum()) > 0  # the graph reaches through the base to the first layer


def test_loss_counts_answer_tokens_only_and_ignores_batch_and_padding(base: Base) -> None:
    data = examples(base, 8)
    total, count = 0.0, 0
    for example in data:
        ids = torch.tensor([example.token_ids])
        with torch.no_grad():
            logits = base.model(input_ids=ids).logits[0].log_softmax(-1)
        for position in range(example.prompt_length, len(example.token_ids)):
            total -= float(logits[position - 1, example.token_ids[position]])
            count += 1
    for max_tokens in (1, 64, 4096):
        loss = mean_answer_loss(base, MoeLoraStack(base.geometry, CONFIG), data, max_tokens=max_tokens)
        assert loss == pytest.approx(total / count, rel=1e-5)


def test_the_stack_that_is_served_is_the_stack_that_was_evaluated(base: Base, tmp_path: Path) -> None:
    trained, _ = train(base)
    ids = torch.tensor([examples(base)[0].token_ids])
    trained.stack.eval()
    with torch.no_grad():
        evaluated = base.model(input_ids=ids).logits
    header = StackHeader(
        base_fingerprint=base.fingerprint,
        geometry=base.geometry,
        num_experts=4,
        rank=4,
        top_k=2,
        scale=CONFIG.scale,
        domain="greetings",
        round=1,
        recipe_digest="0" * 64,
        null_space_folded=False,
        weights="bf16",
    )
    write_stack(tmp_path / "s.safetensors", header, pack_groups(header, trained.stack.projections(3)))
    stored = read_stack(tmp_path / "s.safetensors", dtype=torch.float32)
    served = serving_stack(stored.header, stored.groups, dtype=torch.float32, device=torch.device("cpu"))
    deltas = ServingDeltas()
    inject(base.sites, deltas)
    with torch.no_grad():
        plain = base.model(input_ids=ids).logits
        deltas.current = StackPack([served]).step(torch.ones(ids.shape[1], 1))
        logits = base.model(input_ids=ids).logits
    # The file rounds to bfloat16: 8 bits of each weight. The stack's own effect is much larger.
    assert float((logits - evaluated).abs().max()) < 0.05 * float((plain - evaluated).abs().max())


def stack_with(value: float, base: Base) -> MoeLoraStack:
    stack = MoeLoraStack(base.geometry, CONFIG)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.fill_(value)
    return stack


def test_guard_restores_the_best_and_stops_on_spike_patience_and_nan(base: Base) -> None:
    guard = BestStack(patience=2, spike=0.1)
    assert not guard.observe(1.0, stack_with(1.0, base))
    assert not guard.observe(0.8, stack_with(2.0, base))
    assert not guard.observe(0.85, stack_with(3.0, base))
    assert guard.observe(0.82, stack_with(4.0, base))  # patience
    restored = stack_with(9.0, base)
    guard.restore(restored)
    assert all(bool((p == 2.0).all()) for p in restored.parameters())
    assert BestStack(patience=9, spike=0.1, best_loss=0.8).observe(0.95, stack_with(0.0, base))
    assert BestStack(patience=9, spike=0.1, best_loss=0.8).observe(math.nan, stack_with(0.0, base))


def test_a_stack_without_a_finite_loss_is_not_kept(base: Base) -> None:
    guard = BestStack(patience=2, spike=0.1)
    assert guard.observe(math.nan, stack_with(1.0, base))
    with pytest.raises(TrainingDiverged):
        guard.restore(stack_with(1.0, base))


def test_training_that_never_beats_the_base_is_an_error(base: Base) -> None:
    hopeless = TrainingSection(steps=4, tokens_per_step=256, learning_rate=1e18, warmup_steps=1, eval_every=2)
    with pytest.raises(TrainingDiverged, match="better than the base"):
        train(base, settings=hopeless)


def test_padding_does_not_count_in_the_load_balance(base: Base) -> None:
    data = sorted(examples(base), key=lambda e: len(e.token_ids))
    stack = MoeLoraStack(base.geometry, CONFIG).eval()
    inject(base.sites, TrainingDeltas(stack))

    def shares(batch: list[Example]) -> torch.Tensor:
        with torch.no_grad():
            answer_loss_sum(base, stack, batch)
        share = stack.group(0, "qkv").expert_share
        assert share is not None
        return share

    short, long = data[0], Example(data[-1].token_ids * 4, data[-1].prompt_length)
    lengths = torch.tensor([len(short.token_ids), len(long.token_ids)], dtype=torch.float32)
    alone = torch.stack([shares([short]), shares([long])])
    expected = (alone * (lengths / lengths.sum()).view(2, 1, 1)).sum(0)
    torch.testing.assert_close(shares([short, long]), expected, atol=1e-5, rtol=0)
