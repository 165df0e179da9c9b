"""Measures what a router says of prompts that it did not learn from. Knows logits and what is right, not how it learns.

Legend: N prompts, D domains.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from router.network import MetaRouter
from training.router.examples import RouterExamples, pad_batches
from training.router.prompts import RouterPrompts
from training.router.reports import DomainMetrics, DomainQuality, RouterMetrics
from training.router.roc import area_under_roc

EVALUATION_PROMPTS = 16  # in a batch


@torch.no_grad()
def predict_logits(network: MetaRouter, features: Sequence[Tensor]) -> Tensor:
    """N features (T_n, H) -> (N, D) on the CPU. Leaves the network in eval mode."""
    network.eval()
    device = network.device
    return torch.cat(
        [network(rows.to(device), mask.to(device)).cpu() for rows, mask in pad_batches(features, EVALUATION_PROMPTS)]
    )


def measure(logits: Tensor, prompts: RouterPrompts, *, threshold: float) -> RouterMetrics:
    """(N, D) logits of the prompts -> the metrics. The threshold is the policy's."""
    positive = prompts.positive
    predicted = logits.sigmoid() > threshold  # (N, D)
    num_positive = positive.sum(dim=1)  # (N,)
    right = positive.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)  # (N,)
    matches = (predicted == positive).all(dim=1)  # (N,)
    single, mixed = num_positive == 1, num_positive > 1
    return RouterMetrics(
        top1=_share(right, num_positive > 0),
        set_match=matches.double().mean().item(),
        bce=functional.binary_cross_entropy_with_logits(logits, prompts.targets.float()).item(),
        single_top1=_share(right, single),
        mixed_set_match=_share(matches, mixed),
        num_prompts=len(positive),
        num_single=int(single.sum()),
        num_mixed=int(mixed.sum()),
        domains={
            name: domain_metrics(predicted[:, column], positive[:, column])
            for column, name in enumerate(prompts.domains)
        },
    )


def evaluate_router(network: MetaRouter, examples: RouterExamples, *, threshold: float) -> RouterMetrics:
    """The metrics of a router on examples of its own domains, in the same order. Leaves it in eval mode."""
    if network.domains != examples.domains:
        raise ValueError(f"examples of {examples.domains} cannot measure a router of {network.domains}")
    return measure(predict_logits(network, examples.features), examples.prompts, threshold=threshold)


def domain_quality(logits: Tensor, prompts: RouterPrompts, domain: str, *, threshold: float) -> DomainQuality:
    """(N, D) logits of the prompts -> how well they tell one domain's."""
    column = prompts.domains.index(domain)
    scores, positive = logits[:, column].sigmoid(), prompts.positive[:, column]  # (N,) each
    targets = prompts.targets[:, column].float()  # (N,)
    return DomainQuality(
        metrics=domain_metrics(scores > threshold, positive),
        auc=area_under_roc(scores[~positive].tolist(), scores[positive].tolist()),
        bce=functional.binary_cross_entropy_with_logits(logits[:, column], targets).item(),
    )


def label_top1(logits: Tensor, prompts: RouterPrompts) -> float:
    """(N, D) -> the share of prompts whose highest score is their label's."""
    return (logits.argmax(dim=1) == prompts.label_columns).double().mean().item()


def domain_metrics(predicted: Tensor, positive: Tensor) -> DomainMetrics:
    """(N,) bool, (N,) bool -> the metrics of one domain."""
    return DomainMetrics(
        precision=_share(positive, predicted), recall=_share(predicted, positive), num_positive=int(positive.sum())
    )


def _share(such: Tensor, of: Tensor) -> float | None:
    """(N,) bool, (N,) bool -> how many of the latter are such."""
    return (such & of).sum().item() / of.sum().item() if of.any() else None
