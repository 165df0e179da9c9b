"""Trains one stack of one domain: the inner loop with its guard. Knows examples and a base, not files or domains."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.model.base import Base
from engine.model.inject import inject
from engine.model.moe_lora import MoeLoraConfig, MoeLoraStack, TrainingDeltas
from training.data import Example, batches
from training.errors import TrainingDiverged
from training.loss import answer_loss_sum, mean_answer_loss
from training.recipe import TrainingSection


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands after a step."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    validation_loss: float | None  # of this step, if it was validated
    best_loss: float


@dataclass(slots=True)
class BestStack:
    """Keeps the best weights seen and says when to stop (Brainstacks paper, section 3.3: BestStackCallback)."""

    patience: int
    spike: float
    best_loss: float = math.inf
    weights: dict[str, Tensor] = field(default_factory=dict)
    bad_evaluations: int = 0

    def observe(self, loss: float, stack: MoeLoraStack) -> bool:
        """Takes one validation loss; True if training should stop."""
        if math.isfinite(loss) and loss < self.best_loss:
            self.best_loss, self.bad_evaluations = loss, 0
            self.weights = {name: value.detach().clone() for name, value in stack.state_dict().items()}
            return False
        self.bad_evaluations += 1
        spiked = not math.isfinite(loss) or loss > self.best_loss + self.spike
        return spiked or self.bad_evaluations >= self.patience

    def restore(self, stack: MoeLoraStack) -> None:
        """Puts the best weights back. Raises TrainingDiverged if no loss was finite."""
        if not self.weights:
            raise TrainingDiverged("no validation loss was finite; the stack is not kept")
        stack.load_state_dict(self.weights)


@dataclass(frozen=True, slots=True)
class TrainedStack:
    """A stack at its best validation loss, and how it got there."""

    stack: MoeLoraStack
    base_loss: float
    best_loss: float
    steps_run: int
    validation_losses: tuple[tuple[int, float], ...]
    expert_share_range: tuple[float, float]  # least and most used expert's share of assignments, mean over projections


def train_stack(
    base: Base,
    train: Sequence[Example],
    validation: Sequence[Example],
    *,
    config: MoeLoraConfig,
    settings: TrainingSection,
    seed: int,
    on_progress: Callable[[Progress], None],
) -> TrainedStack:
    """Trains a fresh stack on the frozen base and returns it with its best weights. Reproducible from the seed."""
    torch.manual_seed(seed)
    stack = MoeLoraStack(base.geometry, config).to(base.device)
    deltas = TrainingDeltas(stack)
    inject(base.sites, deltas)
    optimizer = torch.optim.AdamW(
        stack.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, settings))
    guard = BestStack(settings.patience, settings.spike)
    base_loss = _validate(base, stack, validation, settings)  # B is zero: this is the base
    guard.observe(base_loss, stack)
    losses = [(0, base_loss)]
    started, tokens_done = time.monotonic(), 0
    stream = batches(train, max_tokens=settings.tokens_per_step, seed=seed)
    for step, batch in zip(range(1, settings.steps + 1), stream, strict=False):
        loss = _train_step(base, stack, optimizer, batch, settings)
        schedule.step()
        tokens_done += sum(len(example.token_ids) for example in batch)
        validated = step % settings.eval_every == 0 or step == settings.steps
        if validated:
            losses.append((step, _validate(base, stack, validation, settings)))
        stop = validated and guard.observe(losses[-1][1], stack)
        seconds = time.monotonic() - started
        on_progress(
            Progress(
                step=step,
                steps=settings.steps,
                loss=loss,
                tokens_per_second=tokens_done / seconds,
                seconds_left=seconds / step * (settings.steps - step),
                validation_loss=losses[-1][1] if validated else None,
                best_loss=guard.best_loss,
            )
        )
        if stop or not math.isfinite(loss):
            break
    guard.restore(stack)
    if guard.best_loss == base_loss:
        raise TrainingDiverged(f"no evaluation was better than the base: {losses}; the stack is not kept")
    _validate(base, stack, validation[:1], settings)  # leaves each group's expert shares, without noise
    shares = torch.stack([g.expert_share.mean(0) for g in stack.all_groups() if g.expert_share is not None]).mean(0)
    return TrainedStack(
        stack, base_loss, guard.best_loss, step, tuple(losses), (shares.min().item(), shares.max().item())
    )


def _train_step(
    base: Base,
    stack: MoeLoraStack,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    settings: TrainingSection,
) -> float:
    """One optimiser step on one batch; returns the mean answer loss, without the load-balance term."""
    stack.train()
    loss_sum, tokens = answer_loss_sum(base, stack, batch)
    loss = loss_sum / tokens
    (loss + settings.aux_weight * stack.aux_loss()).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(stack.parameters(), settings.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _validate(base: Base, stack: MoeLoraStack, examples: Sequence[Example], settings: TrainingSection) -> float:
    stack.eval()  # noise off
    return mean_answer_loss(base, stack, examples, max_tokens=settings.tokens_per_step)


def _warmup_cosine(step: int, settings: TrainingSection) -> float:
    """Learning-rate factor of a step that counts from 0: linear warm-up, then half a cosine to 0."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
