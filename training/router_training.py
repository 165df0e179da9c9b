"""Trains a meta-router from ready features and targets. Knows the network and the policy; no base, no store, no files.

Legend: N prompts, B prompts in a batch, T tokens, H hidden size of the base, D domains.
Longer than most files: the recipe, its measure and its loop are read together.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from router.features import pad_features
from router.network import DROPOUT, HIDDEN_DIM, MetaRouter
from router.policy import RoutingPolicy
from training.errors import TrainingDiverged
from training.router_data import split_by_prompt


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
    validation_share: float = 0.1
    seed: int = 42
    hidden_dim: int = HIDDEN_DIM
    dropout: float = DROPOUT

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_prompts", "hidden_dim", "learning_rate", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if not 0.0 < self.validation_share < 1.0:
            raise ValueError(f"validation_share must be between 0 and 1, not {self.validation_share}")


@dataclass(frozen=True, slots=True, eq=False)
class RouterExamples:
    """N prompts: text, features (T_n, H) of any float type on the CPU, and targets (N, D) in [0, 1], soft ones too.

    Features are turned into float32 batch by batch, so a caller who is short of memory may keep them in float16.
    """

    domains: tuple[str, ...]
    texts: Sequence[str]
    features: Sequence[Tensor]
    targets: Tensor

    def __post_init__(self) -> None:
        counts = (len(self.texts), len(self.features), len(self.targets))
        if len(set(counts)) > 1:
            raise ValueError(f"texts, features and targets must be equally many, not {counts}")
        for row, features in enumerate(self.features):
            if features.ndim != 2 or not len(features) or features.shape[1] != self.features[0].shape[-1]:
                raise ValueError(f"features of prompt {row} must be (T, H), not {tuple(features.shape)}")
        if self.targets.ndim != 2 or self.targets.shape[1] != len(self.domains):
            raise ValueError(f"targets of {len(self.domains)} domains cannot have shape {tuple(self.targets.shape)}")
        outside = ~((self.targets >= 0) & (self.targets <= 1)).all(dim=1)  # (N,); NaN is outside too.
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(f"targets must be in [0, 1], not {self.targets[row].tolist()} of prompt {row}")

    def select(self, rows: Sequence[int]) -> "RouterExamples":
        """The examples of these rows, sharing their features."""
        return RouterExamples(
            domains=self.domains,
            texts=[self.texts[row] for row in rows],
            features=[self.features[row] for row in rows],
            targets=self.targets[list(rows)],
        )


@dataclass(frozen=True, slots=True)
class DomainMetrics:
    """How well one domain's activity is predicted; None where a ratio has nothing to divide by."""

    precision: float | None
    recall: float | None
    num_positive: int


@dataclass(frozen=True, slots=True)
class RouterMetrics:
    """Shares of prompts, and the mean binary cross-entropy per prompt and domain in nats.

    A domain is positive if its target is above the policy's threshold, and predicted if its raw score is (the floor
    would make the floor domain right for nothing). top1: of the prompts with a positive domain, those whose highest
    score is at a highest target. set_match: the prompts whose predicted set is the positive one exactly.
    """

    top1: float
    set_match: float
    bce: float
    domains: Mapping[str, DomainMetrics]

    @property
    def selection_score(self) -> float:
        """What the best epoch has the most of."""
        return 0.50 * self.top1 + 0.35 * self.set_match - 0.15 * self.bce


@dataclass(frozen=True, slots=True)
class RouterProgress:
    """After one step: counts from 1, the step's loss, and the validation metrics if the step ended an epoch."""

    epoch: int
    step: int
    num_steps: int
    loss: float
    metrics: RouterMetrics | None


@dataclass(frozen=True, slots=True, eq=False)
class TrainedRouter:
    """The network of the best epoch, in eval mode, with its validation metrics and those of every epoch in order."""

    network: MetaRouter
    metrics: RouterMetrics
    best_epoch: int
    history: tuple[RouterMetrics, ...]
    num_train: int
    num_validation: int


def router_loss(logits: Tensor, targets: Tensor, *, margin: float, margin_weight: float) -> Tensor:
    """(B, D), (B, D) -> scalar: binary cross-entropy plus a push away from 0.5 (paper, section 3.6)."""
    confidence = (logits.sigmoid() - 0.5).abs()
    return (
        functional.binary_cross_entropy_with_logits(logits, targets)
        + margin_weight * (margin - confidence).relu().mean()
    )


def train_router(
    examples: RouterExamples,
    *,
    policy: RoutingPolicy,
    recipe: RouterRecipe,
    device: torch.device | str = "cpu",
    on_progress: Callable[[RouterProgress], None] = lambda progress: None,
) -> TrainedRouter:
    """Train on one share of the prompts, keep the epoch that is best on the others. Global random state is left alone.

    TrainingDiverged if a loss is not finite, with the step at which it happened.
    """
    device = torch.device(device)
    train_rows, validation_rows = split_by_prompt(
        examples.texts, validation_share=recipe.validation_share, seed=recipe.seed
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        token_dim = examples.features[0].shape[1]
        network = MetaRouter(token_dim, examples.domains, hidden_dim=recipe.hidden_dim, dropout=recipe.dropout)
        return _keep_best_epoch(
            network.to(device),
            examples.select(train_rows),
            examples.select(validation_rows),
            policy=policy,
            recipe=recipe,
            on_progress=on_progress,
        )


def _keep_best_epoch(
    network: MetaRouter,
    train: RouterExamples,
    validation: RouterExamples,
    *,
    policy: RoutingPolicy,
    recipe: RouterRecipe,
    on_progress: Callable[[RouterProgress], None],
) -> TrainedRouter:
    steps_per_epoch = math.ceil(len(train.texts) / recipe.batch_prompts)
    num_steps = recipe.epochs * steps_per_epoch
    history: list[RouterMetrics] = []
    best_epoch, best_state = 0, network.state_dict()
    for step, loss in enumerate(_train_steps(network, train, recipe, num_steps=num_steps), start=1):
        metrics = evaluate_router(network, validation, policy=policy) if step % steps_per_epoch == 0 else None
        epoch = math.ceil(step / steps_per_epoch)
        on_progress(RouterProgress(epoch, step, num_steps, loss, metrics))
        if metrics is None:
            continue
        if not history or metrics.selection_score > history[best_epoch - 1].selection_score:
            best_epoch, best_state = epoch, copy.deepcopy(network.state_dict())
        history.append(metrics)
    network.load_state_dict(best_state)
    return TrainedRouter(
        network=network.eval(),
        metrics=history[best_epoch - 1],
        best_epoch=best_epoch,
        history=tuple(history),
        num_train=len(train.texts),
        num_validation=len(validation.texts),
    )


def _train_steps(
    network: MetaRouter, train: RouterExamples, recipe: RouterRecipe, *, num_steps: int
) -> Iterator[float]:
    """Takes one optimizer step per item and yields its loss; the learning rate falls to 0 on a cosine over all."""
    optimizer = AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = CosineAnnealingLR(optimizer, T_max=num_steps)
    for step, (features, mask, targets) in enumerate(_epochs(train, recipe, network.device), start=1):
        network.train()
        loss = router_loss(network(features, mask), targets, margin=recipe.margin, margin_weight=recipe.margin_weight)
        if not loss.isfinite():
            raise TrainingDiverged(f"the router's loss is {loss.item()} at step {step} of {num_steps}")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_grad_norm_(network.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        schedule.step()
        yield loss.item()


def _epochs(
    train: RouterExamples, recipe: RouterRecipe, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every epoch's batches in a new random order."""
    for _ in range(recipe.epochs):
        yield from _batches(train.select(torch.randperm(len(train.texts)).tolist()), recipe.batch_prompts, device)


def _batches(
    examples: RouterExamples, batch_prompts: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """features (B, T, H), mask (B, T), targets (B, D), in the order of the examples; only the last may be smaller."""
    for start in range(0, len(examples.texts), batch_prompts):
        rows = slice(start, start + batch_prompts)
        features, mask = pad_features(examples.features[rows])
        yield features.to(device), mask.to(device), examples.targets[rows].float().to(device)


@torch.no_grad()
def evaluate_router(
    network: MetaRouter, examples: RouterExamples, *, policy: RoutingPolicy, batch_prompts: int = 16
) -> RouterMetrics:
    """Measure a router on examples whose domains are its own, in the same order. Leaves it in eval mode."""
    if network.domains != examples.domains:
        raise ValueError(f"examples of {examples.domains} cannot measure a router of {network.domains}")
    network.eval()
    batches = _batches(examples, batch_prompts, network.device)
    logits = torch.cat([network(features, mask).cpu() for features, mask, _ in batches])  # (N, D)
    targets = examples.targets.float()
    predicted, positive = logits.sigmoid() > policy.threshold, targets > policy.threshold  # (N, D) each
    chosen = targets.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)  # (N,)
    routable = positive.any(dim=1)  # (N,)
    right = (chosen == targets.amax(dim=1)) & routable
    return RouterMetrics(
        top1=_ratio(right.sum(), routable.sum()) or 0.0,
        set_match=(predicted == positive).all(dim=1).double().mean().item(),
        bce=functional.binary_cross_entropy_with_logits(logits, targets).item(),
        domains={
            name: _domain_metrics(predicted[:, column], positive[:, column])
            for column, name in enumerate(network.domains)
        },
    )


def _domain_metrics(predicted: Tensor, positive: Tensor) -> DomainMetrics:
    """(N,) bool, (N,) bool -> the metrics of one domain."""
    right = (predicted & positive).sum()
    return DomainMetrics(
        precision=_ratio(right, predicted.sum()),
        recall=_ratio(right, positive.sum()),
        num_positive=int(positive.sum()),
    )


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return part.item() / whole.item() if whole else None
