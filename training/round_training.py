"""Trains one stack on one domain's examples: the inner loop. Knows a base and examples, not files or domains."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from engine.model.base import Base
from engine.model.inject import injected
from engine.model.moe_lora import MoeLoraConfig
from engine.model.training_form import MoeLoraStack, TrainingDeltas
from training.best_stack import BestStack
from training.context import Context
from training.data.batching import packed_steps, step_batches
from training.data.examples import Example
from training.evaluation import mean_answer_loss
from training.loss import answer_loss_sum, pack, pad
from training.protected_space import ProtectedSpace
from training.recipe import TrainingSection
from training.reports import RoundReport
from training.seeds import derive_seed
from training.survey import expert_shares
from training.workers import Workers

Pass = Sequence[Example]
BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a round stands after a step."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    validation_loss: float | None  # of this step, if it was validated
    best_loss: float


@dataclass(frozen=True, slots=True)
class Task:
    """What a round trains on and against."""

    base: Base
    train: Sequence[Example]
    held_out: Sequence[Example]
    context: Context
    protected: ProtectedSpace | None
    settings: TrainingSection
    workers: Workers


def train_round(
    task: Task, *, round: int, config: MoeLoraConfig, seed: int, on_progress: Callable[[Progress], None]
) -> tuple[MoeLoraStack, RoundReport, dict[str, tuple[float, ...]]]:
    """Trains a fresh stack in its context; returns it with its best weights, and its experts' shares by projection.

    Reproducible from the seed. Raises TrainingDiverged if no validation loss was finite.
    """
    torch.manual_seed(derive_seed(seed, "weights"))
    stack = MoeLoraStack(task.base.geometry, config).to(task.base.device)
    if task.protected is not None:
        stack.protect({key: basis.to(task.base.device) for key, basis in task.protected.bases.items()})
    deltas = TrainingDeltas(stack)
    with injected(task.base.sites, deltas):
        report = _Run(task, stack, deltas, seed).train(round, on_progress)
        deltas.use_frozen(task.context.for_validation())
        shares = expert_shares(task.base, deltas, task.held_out, max_tokens=task.settings.max_pass_tokens)
    return stack, report, shares


class _Run:
    """One round while it trains."""

    def __init__(self, task: Task, stack: MoeLoraStack, deltas: TrainingDeltas, seed: int) -> None:
        settings = task.settings
        self.task, self.stack, self.deltas, self.seed = task, stack, deltas, seed
        self.parameters = list(stack.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: warmup_cosine(step, settings))
        # Only float16 needs it: small gradients vanish there. Weights and optimiser are float32 always.
        self.scaler = torch.amp.GradScaler(task.base.device.type, enabled=task.base.dtype == torch.float16)
        self.guard = BestStack(settings.patience, settings.spike)
        self.training_losses: list[float] = []
        self.validation: list[tuple[int, float]] = []

    def train(self, round: int, on_progress: Callable[[Progress], None]) -> RoundReport:
        settings = self.task.settings
        started, tokens_done = time.monotonic(), 0
        stop = self._validate(0)
        with _checkpointing(self.task.base, enabled=settings.gradient_checkpointing):
            for step, passes in zip(range(1, settings.steps + 1), self._steps(), strict=False):
                loss = self._step(step, passes)
                tokens_done += sum(len(example.token_ids) for examples in passes for example in examples)
                validated = step % settings.eval_every == 0 or step == settings.steps
                stop = self._validate(step) if validated else None
                if not math.isfinite(loss):
                    stop = "not finite"
                seconds = time.monotonic() - started
                on_progress(
                    Progress(
                        step=step,
                        steps=settings.steps,
                        loss=loss,
                        tokens_per_second=tokens_done / seconds,
                        seconds_left=seconds / step * (settings.steps - step),
                        validation_loss=self.validation[-1][1] if validated else None,
                        best_loss=self.guard.best_loss,
                    )
                )
                if stop is not None:
                    break
        self.guard.restore(self.stack)
        start_loss = self.validation[0][1]
        return RoundReport(
            round=round,
            start_loss=start_loss,
            best_loss=self.guard.best_loss,
            kept=self.guard.best_loss < start_loss - settings.min_gain,
            stop=stop or "steps",
            steps_run=len(self.training_losses),
            seconds=time.monotonic() - started,
            validation=tuple(self.validation),
            training=tuple(self.training_losses),
        )

    def _steps(self) -> Iterator[Sequence[Pass]]:
        settings = self.task.settings
        batches = packed_steps if settings.packing else step_batches
        return batches(
            self.task.train,
            tokens_per_step=settings.tokens_per_step,
            tokens_per_pass=settings.tokens_per_pass,
            seed=derive_seed(self.seed, "order"),
        )

    def _step(self, step: int, passes: Sequence[Pass]) -> float:
        """One optimiser step; returns its mean answer loss, without the load-balance term."""
        self.deltas.use_frozen(self.task.context.for_step(derive_seed(self.seed, "context", step)))
        noise_seed = derive_seed(self.seed, "noise", step)
        loss = accumulate_gradients(self.task, self.deltas, passes, noise_seed=noise_seed, scaler=self.scaler)
        self._update()
        self.training_losses.append(loss)
        return loss

    def _update(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:  # a worker without a pass
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.task.workers.sum(parameter.grad)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.task.settings.clip_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else a gradient was not finite, and the scaler left the step out
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _validate(self, step: int) -> str | None:
        """Measures the held-out loss; why training should stop, if it should."""
        self.deltas.use_frozen(self.task.context.for_validation())
        loss = mean_answer_loss(
            self.task.base,
            self.deltas,
            self.task.held_out,
            max_tokens=self.task.settings.max_pass_tokens,
            workers=self.task.workers,
        )
        self.validation.append((step, loss))
        return self.guard.observe(loss, self.stack)


def accumulate_gradients(
    task: Task, deltas: TrainingDeltas, passes: Sequence[Pass], *, noise_seed: int, scaler: torch.amp.GradScaler
) -> float:
    """Adds this worker's share of a step's gradients, scaled; returns the whole step's mean answer loss.

    Each pass is weighed by its share of the step's tokens, so their number does not change the answer loss; the load
    balance is each pass's own, weighed likewise.
    """
    assert deltas.active is not None
    deltas.active.train()
    answer_tokens = sum(example.answer_length for examples in passes for example in examples)
    tokens = sum(len(example.token_ids) for examples in passes for example in examples)
    loss = torch.zeros((), dtype=torch.float64)
    for index, examples in task.workers.mine(list(enumerate(passes))):
        torch.manual_seed(derive_seed(noise_seed, index))  # whichever worker takes the pass
        layout = (pack if task.settings.packing else pad)(examples, task.base.device)
        loss_sum, _ = answer_loss_sum(task.base, deltas, layout)
        share = sum(len(example.token_ids) for example in examples) / tokens
        balance = task.settings.aux_weight * share * deltas.active.aux_loss()
        scaler.scale(loss_sum / answer_tokens + balance).backward()  # type: ignore[no-untyped-call]
        loss += loss_sum.item() / answer_tokens
    return task.workers.sum(loss).item()


def warmup_cosine(step: int, settings: TrainingSection) -> float:
    """Learning-rate factor of a step that counts from 0: linear warm-up, then half a cosine to 0."""
    warmup = settings.steps // 10 if settings.warmup_steps is None else settings.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


@contextmanager
def _checkpointing(base: Base, *, enabled: bool) -> Iterator[None]:
    """Recomputes each layer in the backward instead of keeping what it computed."""
    layers = cast(Any, base.decoder).layers if enabled else ()
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class has the plain one
