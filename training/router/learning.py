"""Trains a meta-router from ready features and targets. Knows the network; no base, no store, no files.

Legend: N prompts, B prompts in a batch, D domains.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from router.network import DROPOUT, HIDDEN_DIM, MetaRouter
from training.errors import TrainingDiverged
from training.router.examples import RouterExamples, SplitExamples
from training.router.metrics import evaluate_router
from training.router.reports import RouterMetrics

Measured = TypeVar("Measured")


@dataclass(frozen=True, slots=True)
class RouterRecipe:
    """Every number of the training; with the examples it decides the result, on one device and thread count."""

    epochs: int = 8
    batch_prompts: int = 16
    learning_rate: float = 8e-4
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    margin: float = 0.3
    margin_weight: float = 0.05
    mixed_weight: int = 1  # how often an epoch shows a prompt with several positive domains
    seed: int = 42
    hidden_dim: int = HIDDEN_DIM
    dropout: float = DROPOUT

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_prompts", "hidden_dim", "learning_rate", "max_gradient_norm", "mixed_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class RouterProgress:
    """After one step: counts from 1, and the step's loss."""

    step: int
    num_steps: int
    loss: float


@dataclass(frozen=True, slots=True, eq=False)
class BestEpoch(Generic[Measured]):
    """The network as it was after its best epoch, in eval mode, and what every epoch measured, in order."""

    network: MetaRouter
    best_epoch: int  # from 1
    history: tuple[Measured, ...]

    @property
    def metrics(self) -> Measured:
        """What the best epoch measured."""
        return self.history[self.best_epoch - 1]


OnProgress = Callable[[RouterProgress], None]
LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # features, mask, targets of a batch -> scalar


def router_loss(logits: Tensor, targets: Tensor, *, margin: float, margin_weight: float) -> Tensor:
    """(B, D), (B, D) -> scalar: binary cross-entropy plus a push away from 0.5 (Brainstacks paper, section 3.6)."""
    confidence = (logits.sigmoid() - 0.5).abs()
    return (
        functional.binary_cross_entropy_with_logits(logits, targets)
        + margin_weight * (margin - confidence).relu().mean()
    )


def train_router(
    examples: SplitExamples,
    *,
    threshold: float,
    recipe: RouterRecipe,
    device: torch.device | str = "cpu",
    on_progress: OnProgress = lambda progress: None,
) -> BestEpoch[RouterMetrics]:
    """Train a new router, keep the epoch that is best on the validation side. Global random state is left alone.

    `threshold` is the policy's. TrainingDiverged if a loss is not finite, with the step at which it happened.
    """
    with seeded(recipe.seed, torch.device(device)):
        token_dim = examples.train.features[0].shape[1]
        network = MetaRouter(
            token_dim, examples.train.domains, hidden_dim=recipe.hidden_dim, dropout=recipe.dropout
        ).to(device)

        def loss_of(features: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
            network.train()
            logits = network(features, mask)
            return router_loss(logits, targets, margin=recipe.margin, margin_weight=recipe.margin_weight)

        return keep_best_epoch(
            network,
            examples.train,
            recipe,
            loss_of=loss_of,
            measure=lambda: evaluate_router(network, examples.validation, threshold=threshold),
            score=lambda metrics: metrics.selection_score,
            on_progress=on_progress,
        )


def keep_best_epoch(
    network: MetaRouter,
    train: RouterExamples,
    recipe: RouterRecipe,
    *,
    loss_of: LossOf,
    measure: Callable[[], Measured],
    score: Callable[[Measured], float],
    on_progress: OnProgress,
) -> BestEpoch[Measured]:
    """Train those of the network's parameters that need a gradient; the first epoch with the highest score is kept."""
    rows = _rows_of_epoch(train, recipe.mixed_weight)
    steps_per_epoch = math.ceil(len(rows) / recipe.batch_prompts)
    num_steps = recipe.epochs * steps_per_epoch
    history: list[Measured] = []
    best_epoch, best_state = 0, network.state_dict()
    for step, loss in enumerate(_train_steps(network, train, rows, recipe, loss_of, num_steps), start=1):
        on_progress(RouterProgress(step, num_steps, loss))
        if step % steps_per_epoch:
            continue
        history.append(measure())
        if not best_epoch or score(history[-1]) > score(history[best_epoch - 1]):
            best_epoch, best_state = len(history), copy.deepcopy(network.state_dict())
    network.load_state_dict(best_state)
    return BestEpoch(network.eval(), best_epoch, tuple(history))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of that seed inside the block; outside, as if there had been none."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _rows_of_epoch(train: RouterExamples, mixed_weight: int) -> list[int]:
    """Every row once, and those of mixed prompts `mixed_weight` times."""
    num_positive = train.prompts.positive.sum(dim=1).tolist()  # (N,)
    return [row for row, count in enumerate(num_positive) for _ in range(mixed_weight if count > 1 else 1)]


def _train_steps(
    network: MetaRouter,
    train: RouterExamples,
    rows: list[int],
    recipe: RouterRecipe,
    loss_of: LossOf,
    num_steps: int,
) -> Iterator[float]:
    """Takes one optimizer step per item and yields its loss; the learning rate falls to 0 on a cosine over all."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = AdamW(learning, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = CosineAnnealingLR(optimizer, T_max=num_steps)
    for step, (features, mask, targets) in enumerate(_epochs(train, rows, recipe, network.device), start=1):
        loss = loss_of(features, mask, targets)
        if not loss.isfinite():
            raise TrainingDiverged(f"the router's loss is {loss.item()} at step {step} of {num_steps}")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_grad_norm_(learning, recipe.max_gradient_norm)
        optimizer.step()
        schedule.step()
        yield loss.item()


def _epochs(
    train: RouterExamples, rows: list[int], recipe: RouterRecipe, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every epoch's batches in a new random order."""
    for _ in range(recipe.epochs):
        order = torch.randperm(len(rows)).tolist()
        yield from train.select([rows[place] for place in order]).batches(recipe.batch_prompts, device)
