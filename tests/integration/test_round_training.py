"""Training one stack on a tiny base: it learns, repeats itself, keeps its best, and its gradients are whole."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from engine.model.base import Base, DtypeName, load_base
from engine.model.inject import inject
from engine.model.moe_lora import MoeLoraConfig, StackPack
from engine.model.training_form import MoeLoraStack, TrainingDeltas
from stack_store.format import INPUT_GROUPS
from tests.stacks import random_serving_stack
from training.best_stack import BestStack
from training.context import Context
from training.data.examples import Example, render
from training.data.records import Record
from training.errors import TrainingDiverged
from training.evaluation import mean_answer_loss
from training.loss import Layout, answer_loss_sum, pack, pad
from training.protected_space import ProtectedSpace
from training.recipe import TrainingSection
from training.reports import RoundReport
from training.round_training import Progress, Task, accumulate_gradients, train_round
from training.workers import Workers

CONFIG = MoeLoraConfig(num_experts=4, rank=4, top_k=2)
SETTINGS = TrainingSection(steps=30, tokens_per_step=256, learning_rate=5e-3, warmup_steps=3, eval_every=10)
CPU = torch.device("cpu")


@pytest.fixture
def base(tiny_base_folder: Callable[[str], Path]) -> Base:
    return load_base(str(tiny_base_folder("llama")), base_format="nf4-dense", dtype="float32")


def examples(base: Base, count: int = 24) -> list[Example]:
    records = [
        Record(f"say {word} {i}", f"{word} the lazy dog") for i in range(count // 2) for word in ("hello", "fox")
    ]
    return [render(base.tokenizer, record) for record in records]


def task(base: Base, settings: TrainingSection = SETTINGS, **changes: object) -> Task:
    data = examples(base)
    whole = Task(
        base=base,
        train=data[4:],
        held_out=data[:4],
        context=Context("isolated", own=(), earlier={}),
        protected=None,
        settings=settings,
        workers=Workers(),
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def train(
    base: Base, *, seed: int = 1, settings: TrainingSection = SETTINGS, **changes: object
) -> tuple[MoeLoraStack, RoundReport, list[Progress]]:
    seen: list[Progress] = []
    work = task(base, settings, **changes)
    stack, report, _ = train_round(work, round=1, config=CONFIG, seed=seed, on_progress=seen.append)
    return stack, report, seen


def states_equal(one: MoeLoraStack, other: MoeLoraStack) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def stack_with_b(base: Base, config: MoeLoraConfig = CONFIG) -> MoeLoraStack:
    """A stack whose deltas are not zero, and whose noise is."""
    torch.manual_seed(1)
    stack = MoeLoraStack(base.geometry, config)
    for group in stack.all_groups():
        for b in group.b:
            torch.nn.init.normal_(b, std=0.05)
    return stack


def gradients(base: Base, stack: MoeLoraStack, deltas: TrainingDeltas, data: Sequence[Example]) -> list[Tensor]:
    """Of the answer loss and the load balance, with the same noise every time."""
    inject(base.sites, deltas)
    stack.train()
    stack.zero_grad()
    torch.manual_seed(0)
    loss, count = answer_loss_sum(base, deltas, pad(data, CPU))
    (loss / count + 0.01 * stack.aux_loss()).backward()  # type: ignore[no-untyped-call]
    return [p.grad.clone() for p in stack.parameters() if p.grad is not None]


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Relative to the largest gradient of each parameter."""
    assert len(ours) == len(theirs) > 0
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def test_training_lowers_the_held_out_loss_and_reports_progress(base: Base) -> None:
    _, report, seen = train(base)
    assert report.best_loss < report.start_loss - 0.5
    assert (report.kept, report.stop, report.steps_run) == (True, "steps", 30)
    assert [p.step for p in seen] == list(range(1, 31))
    assert [step for step, _ in report.validation] == [0, 10, 20, 30]
    assert len(report.training) == 30
    assert seen[-1].seconds_left == 0
    assert all(p.tokens_per_second > 0 for p in seen)


def test_the_same_seed_trains_the_same_stack_and_another_does_not(base: Base) -> None:
    first, second, other = (train(base, seed=seed)[0] for seed in (1, 1, 2))
    assert states_equal(first, second)
    assert not states_equal(first, other)


def test_the_base_stays_frozen(base: Base) -> None:
    before = {site.path: site.module.state_dict()["weight"].clone() for site in base.sites}
    train(base, settings=TrainingSection(steps=3, tokens_per_step=256, warmup_steps=1, eval_every=3))
    after = {site.path: site.module.state_dict()["base.weight"] for site in base.sites}
    changed = [path for path in before if not torch.equal(before[path], after[path])]
    assert changed == []


def test_gradients_are_the_same_before_and_after_an_evaluation(base: Base) -> None:
    data, stack = examples(base), stack_with_b(base)
    deltas = TrainingDeltas(stack)
    before = gradients(base, stack, deltas, data[:4])
    mean_answer_loss(base, deltas, data, max_tokens=128, workers=Workers())
    after = gradients(base, stack, deltas, data[:4])
    assert len(before) == len(list(stack.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    first_layer = stack.group(0, "qkv").a.grad
    assert first_layer is not None
    assert float(first_layer.abs().sum()) > 0  # the graph reaches through the base to the first layer


def test_a_frozen_zero_stack_changes_no_gradient(base: Base) -> None:
    data, stack = examples(base)[:4], stack_with_b(base)
    alone = gradients(base, stack, TrainingDeltas(stack), data)
    beside = TrainingDeltas(stack)
    beside.use_frozen(StackPack([random_serving_stack(base.geometry, zero=True)]))
    assert largest_difference(gradients(base, stack, beside, data), alone) < 1e-5


def test_gradients_beside_a_frozen_stack_are_those_of_finite_differences(base: Base) -> None:
    """The gradient flows through the frozen deltas too: moving a weight moves the loss as its gradient says.

    With every expert active, for the choice of the top ones makes the loss jump.
    """
    data, stack = examples(base)[:4], stack_with_b(base, MoeLoraConfig(num_experts=4, rank=4, top_k=4)).eval()
    deltas = TrainingDeltas(stack)
    deltas.use_frozen(StackPack([random_serving_stack(base.geometry, top_k=4)]))
    inject(base.sites, deltas)

    def loss() -> Tensor:
        total, count = answer_loss_sum(base, deltas, pad(data, CPU))
        return total / count

    weight = stack.group(0, "qkv").b[0]
    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        weight += 1e-2 * direction
        above = loss().item()
        weight -= 2e-2 * direction
        below = loss().item()
    assert (above - below) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.01)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers the old way
def test_one_expert_is_a_plain_lora_as_peft_has_it(base: Base, tiny_base_folder: Callable[[str], Path]) -> None:
    data = examples(base)[:4]
    stack = stack_with_b(base, MoeLoraConfig(num_experts=1, rank=4, top_k=1, alpha=8.0))
    peer = load_base(str(tiny_base_folder("llama")), base_format="nf4-dense", dtype="float32")
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=[site.projection for site in peer.sites[:7]]
    )
    model = peft.get_peft_model(peer.model, settings)
    weights = dict(model.named_parameters())
    projections = stack.projections(base.geometry.num_layers)

    def of_peft(layer: int, name: str, side: str) -> Tensor:
        return next(w for n, w in weights.items() if f"layers.{layer}." in n and f"{name}.lora_{side}" in n)

    with torch.no_grad():
        for (layer, name), ours in projections.items():
            of_peft(layer, name, "A").copy_(ours.a[0])
            of_peft(layer, name, "B").copy_(ours.b[0])
    gradients(base, stack, TrainingDeltas(stack), data)
    with torch.no_grad():
        ours_sum, _ = answer_loss_sum(base, TrainingDeltas(stack), pad(data, CPU))
    loss, count = answer_loss_sum(peer, TrainingDeltas(), pad(data, CPU))
    assert loss.item() == pytest.approx(ours_sum.item(), rel=1e-6)
    (loss / count).backward()  # type: ignore[no-untyped-call]
    for layer, name in projections:
        group = stack.group(layer, {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "d": "down"}.get(name[0], "gate_up"))
        index = {"k_proj": 1, "v_proj": 2, "up_proj": 1}.get(name, 0)
        ours_a, ours_b = group.a.grad, group.b[index].grad
        assert ours_a is not None
        assert ours_b is not None
        torch.testing.assert_close(ours_a[index, 0], of_peft(layer, name, "A").grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(ours_b.T, of_peft(layer, name, "B").grad, atol=1e-6, rtol=1e-4)


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
        loss = mean_answer_loss(base, TrainingDeltas(), data, max_tokens=max_tokens, workers=Workers())
        assert loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3", "mistral"])
def test_packed_examples_do_not_see_each_other(tiny_base_folder: Callable[[str], Path], architecture: str) -> None:
    base = load_base(str(tiny_base_folder(architecture)), base_format="nf4-dense", dtype="float32")
    data = [*examples(base, 6), Example(tuple(range(5, 105)), 40)]  # longer than Gemma 3's window here
    with torch.no_grad():
        padded, tokens = answer_loss_sum(base, TrainingDeltas(), pad(data, CPU))
        packed, packed_tokens = answer_loss_sum(base, TrainingDeltas(), pack(data, CPU))
    assert tokens == packed_tokens
    assert packed.item() == pytest.approx(padded.item(), rel=1e-5)


def test_more_passes_make_the_same_gradients(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # gate noise differs from pass to pass
    short, long = examples(base)[:3], Example(tuple(range(5, 105)), 20)  # answers of very different lengths
    stack = stack_with_b(base)
    deltas = TrainingDeltas(stack)
    inject(base.sites, deltas)
    work = task(base, SETTINGS.model_copy(update={"aux_weight": 0.0}))
    found = []
    for passes in ([[*short, long]], [short, [long]], [[long], *[[example] for example in short]]):
        stack.zero_grad()
        loss = accumulate_gradients(
            work, deltas, passes, noise_seed=1, scaler=torch.amp.GradScaler("cpu", enabled=False)
        )
        found.append((loss, [p.grad.clone() for p in stack.parameters() if p.grad is not None]))
    for loss, of_passes in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert largest_difference(of_passes, found[0][1]) < 1e-4


def test_gradient_checkpointing_changes_no_bit(base: Base) -> None:
    settings = SETTINGS.model_copy(update={"steps": 4, "eval_every": 2})
    forwards: list[int] = []
    base.sites[-1].parent.register_forward_pre_hook(lambda *_: forwards.append(1))  # the last layer's MLP
    plain = train(base, settings=settings)[0]
    num_plain = len(forwards)
    checkpointed = train(base, settings=settings.model_copy(update={"gradient_checkpointing": True}))[0]
    assert states_equal(plain, checkpointed)
    assert len(forwards) == 2 * num_plain + 4  # one more a step: the layer is computed again in the backward


def test_a_stack_stays_out_of_the_protected_directions_at_every_step(base: Base) -> None:
    bases = {}
    for key, empty in ProtectedSpace.empty(base.geometry).bases.items():
        generator = torch.Generator().manual_seed(key[0])
        bases[key] = torch.linalg.qr(torch.randn(empty.shape[0], 4, generator=generator)).Q
    stack, report, _ = train(base, protected=ProtectedSpace(bases))
    assert report.kept
    for training in (True, False):
        stack.train(training)
        for layer, group in ((0, "qkv"), (1, "gate_up"), (2, "down")):
            module = stack.group(layer, group)
            deltas = module(torch.randn(20, module.a.shape[-1]))
            for name, delta in zip(INPUT_GROUPS[group], deltas, strict=True):
                assert delta.any()
                inside = (delta @ bases[layer, name]).square().sum()
                assert inside <= 1e-10 * delta.square().sum()
    assert not states_equal(stack, train(base)[0])


def test_earlier_domains_are_active_as_the_context_says(base: Base) -> None:
    earlier = {name: (random_serving_stack(base.geometry, seed=i),) for i, name in enumerate(("a", "b", "c"))}
    own = (random_serving_stack(base.geometry, seed=9),)
    isolated, everything, sampled = (
        Context(setting, own=own, earlier=earlier) for setting in ("isolated", "all", "sampled")
    )

    def count(packed: StackPack | None) -> int:
        return 0 if packed is None else packed.num_stacks

    assert count(isolated.for_step(1)) == count(isolated.for_validation()) == 1
    assert count(everything.for_step(1)) == count(everything.for_validation()) == 4
    drawn = [count(sampled.for_step(seed)) for seed in range(40)]
    assert set(drawn) == {1, 2, 3, 4}
    assert drawn == [count(sampled.for_step(seed)) for seed in range(40)]
    assert count(sampled.for_validation()) == 1
    assert count(Context("all", own=(), earlier={}).for_step(1)) == 0


def test_products_in_bfloat16_train_weights_in_float32(tiny_base_folder: Callable[[str], Path]) -> None:
    base = load_base(str(tiny_base_folder("llama")), base_format="nf4-dense", dtype="bfloat16")
    stack, report, _ = train(base)
    assert report.best_loss < report.start_loss - 0.5
    assert {weight.dtype for weight in stack.parameters()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_packed_base_trains_on_cuda(tiny_base_folder: Callable[[str], Path], dtype: DtypeName) -> None:
    base = load_base(str(tiny_base_folder("llama")), base_format="nf4", dtype=dtype, device="cuda")
    _, report, _ = train(base)
    assert report.best_loss < report.start_loss - 0.5


def stack_with(value: float, base: Base) -> MoeLoraStack:
    stack = MoeLoraStack(base.geometry, CONFIG)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.fill_(value)
    return stack


def test_guard_restores_the_best_and_stops_on_spike_patience_and_nan(base: Base) -> None:
    guard = BestStack(patience=2, spike=0.1)
    assert guard.observe(1.0, stack_with(1.0, base)) is None
    assert guard.observe(0.8, stack_with(2.0, base)) is None
    assert guard.observe(0.85, stack_with(3.0, base)) is None
    assert guard.observe(0.82, stack_with(4.0, base)) == "patience"
    restored = stack_with(9.0, base)
    guard.restore(restored)
    assert all(bool((p == 2.0).all()) for p in restored.parameters())
    assert BestStack(patience=9, spike=0.1, best_loss=0.8).observe(0.95, stack_with(0.0, base)) == "spike"
    assert BestStack(patience=9, spike=0.1, best_loss=0.8).observe(math.nan, stack_with(0.0, base)) == "not finite"


def test_a_stack_without_a_finite_loss_is_not_kept(base: Base) -> None:
    guard = BestStack(patience=2, spike=0.1)
    assert guard.observe(math.nan, stack_with(1.0, base))
    with pytest.raises(TrainingDiverged):
        guard.restore(stack_with(1.0, base))


def test_a_round_that_never_gets_better_is_dropped(base: Base) -> None:
    hopeless = TrainingSection(steps=4, tokens_per_step=256, learning_rate=1e18, warmup_steps=1, eval_every=2)
    stack, report, _ = train(base, settings=hopeless)
    assert not report.kept
    assert report.stop in ("spike", "not finite")
    assert report.best_loss == report.start_loss
    assert all(not group.b[0].any() for group in stack.all_groups())  # its best was where it began


def test_padding_does_not_count_in_the_load_balance(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    data = [examples(base)[0], Example(tuple(range(5, 105)), 20)]
    stack = stack_with_b(base).train()
    deltas = TrainingDeltas(stack)
    inject(base.sites, deltas)

    def balance(layout: Layout) -> tuple[float, Tensor]:
        answer_loss_sum(base, deltas, layout)
        share = stack.group(0, "qkv").expert_share
        assert share is not None
        return stack.aux_loss().item(), share

    padded, packed = balance(pad(data, CPU)), balance(pack(data, CPU))  # packed has no padding at all
    assert padded[0] == pytest.approx(packed[0], rel=1e-5)
    torch.testing.assert_close(padded[1], packed[1], atol=1e-5, rtol=0)
