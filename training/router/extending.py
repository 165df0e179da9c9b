"""Adds a domain to a trained router by training one new query. Knows the network; no base, no store, no files.

Everything else stays frozen, and each domain's score is made of its own query and shared weights, so every old score
keeps its bits.
"""

import copy

from torch import Tensor

from router.network import MetaRouter
from training.router.examples import SplitExamples
from training.router.learning import BestEpoch, OnProgress, RouterRecipe, keep_best_epoch, router_loss, seeded
from training.router.metrics import domain_quality, predict_logits
from training.router.reports import DomainQuality


def extend_router(
    network: MetaRouter,
    examples: SplitExamples,
    *,
    domain: str,
    threshold: float,
    recipe: RouterRecipe,
    on_progress: OnProgress = lambda progress: None,
) -> BestEpoch[DomainQuality]:
    """A copy of the router with one more output, learnt from that domain's column of the examples.

    The examples' domains are the router's and then the new one. The epoch with the lowest cross-entropy of the new
    output on the validation side is kept. Global random state is left alone. TrainingDiverged as in training.
    """
    if examples.train.domains != (*network.domains, domain):
        raise ValueError(f"examples of {examples.train.domains} cannot add {domain!r} to a router of {network.domains}")
    with seeded(recipe.seed, network.device):
        # In eval mode: the frozen weights are to compute just what they compute when they serve.
        extended = copy.deepcopy(network).eval().requires_grad_(False)
        extended.add_domain(domain)
        column = len(extended.domains) - 1

        def loss_of(features: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
            logits = extended.domain_logit(domain, features, mask)
            return router_loss(logits, targets[:, column], margin=recipe.margin, margin_weight=recipe.margin_weight)

        def measure_domain() -> DomainQuality:
            logits = predict_logits(extended, examples.validation.features)
            return domain_quality(logits, examples.validation.prompts, domain, threshold=threshold)

        return keep_best_epoch(
            extended,
            examples.train,
            recipe,
            loss_of=loss_of,
            measure=measure_domain,
            score=lambda quality: -quality.bce,
            on_progress=on_progress,
        )
