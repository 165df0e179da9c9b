"""Facts about the meta-router's network. Legend: B prompts, T tokens, H token width, C hidden width, D domains."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from router.features import pad_features
from router.network import MetaRouter

DOMAINS = ("chat", "code", "math")


def random_network(*, token_dim: int = 12, hidden_dim: int = 16, domains: tuple[str, ...] = DOMAINS) -> MetaRouter:
    """Seeded, in eval mode, with every parameter off its starting value."""
    torch.manual_seed(0)
    network = MetaRouter(token_dim, domains, hidden_dim=hidden_dim)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network.eval()


def random_prompts(*lengths: int, token_dim: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, token_dim, generator=generator) for length in lengths]


def slow_logit(network: MetaRouter, tokens: Tensor, query: Tensor) -> Tensor:
    """(T, H), (C,) -> scalar: one prompt, one domain, the paper's formula spelled out."""

    def pool(rows: Tensor, by: Tensor, norm: nn.LayerNorm) -> Tensor:
        weights = torch.exp(torch.stack([(row * by).sum() for row in rows]))
        pooled = sum((w * row for w, row in zip(weights / weights.sum(), rows, strict=True)), torch.zeros_like(rows[0]))
        return norm(pooled)

    first, _, _, norm, second, _, _, out = network.mlp
    x = network.token_ln(tokens @ network.token_proj.weight.T + network.token_proj.bias)
    fused = torch.cat([pool(x, query, network.domain_ln), pool(x, network.global_query, network.global_ln)])
    hidden = functional.gelu(second(norm(functional.gelu(first(fused)))))
    return (out(hidden) / min(max(math.exp(network.log_temperature.item()), 0.3), 3.0)).squeeze()


def test_logits_equal_the_slow_formula() -> None:
    network = random_network()
    prompts = random_prompts(1, 7, 4)
    slow = torch.stack([torch.stack([slow_logit(network, p, q) for q in network.domain_queries]) for p in prompts])
    torch.testing.assert_close(network(*pad_features(prompts)), slow)


def test_scores_are_the_sigmoid_of_the_logits() -> None:
    network = random_network()
    batch = pad_features(random_prompts(3, 5))
    torch.testing.assert_close(network.scores(*batch), network(*batch).sigmoid())


def test_padding_and_neighbours_do_not_change_a_score() -> None:
    network = random_network(token_dim=96, hidden_dim=512)
    prompts = random_prompts(1, 33, 256, 8, token_dim=96)
    together = network.scores(*pad_features(prompts))
    alone = torch.cat([network.scores(*pad_features([prompt])) for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_what_lies_in_the_padding_does_not_matter() -> None:
    network = random_network()
    features, mask = pad_features(random_prompts(2, 5))
    poisoned = features.masked_fill(~mask.unsqueeze(-1), math.nan)
    assert torch.equal(network.scores(poisoned, mask), network.scores(features, mask))


@pytest.mark.parametrize("num_domains", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("lengths", [(1,), (19,), (256,), (3, 40, 7)])
def test_adding_a_domain_leaves_old_scores_bit_identical(num_domains: int, lengths: tuple[int, ...]) -> None:
    network = random_network(token_dim=96, hidden_dim=512, domains=tuple(f"d{i}" for i in range(num_domains)))
    batch = pad_features(random_prompts(*lengths, token_dim=96))
    with torch.inference_mode():
        logits, scores = network(*batch), network.scores(*batch)
        network.add_domain("new")
        assert torch.equal(network(*batch)[:, :num_domains], logits)
        assert torch.equal(network.scores(*batch)[:, :num_domains], scores)


def test_training_an_added_query_alone_leaves_old_scores_bit_identical() -> None:
    network = random_network()
    batch = pad_features(random_prompts(3, 9))
    before = network.scores(*batch).detach()
    network.add_domain("law")
    query = network.requires_grad_(False).domain_queries[-1].requires_grad_(True)
    optimizer = torch.optim.AdamW([query], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        torch.autograd.backward(functional.binary_cross_entropy_with_logits(network(*batch)[:, 3], torch.ones(2)))
        optimizer.step()
    after = network.scores(*batch).detach()
    assert torch.equal(after[:, :3], before)
    assert not torch.equal(after[:, 3], before[:, 0])


def test_add_domain_adds_one_query_and_nothing_else() -> None:
    network = random_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.add_domain("law")
    after = network.state_dict()
    assert network.domains == (*DOMAINS, "law")
    assert set(after) - set(before) == {"domain_queries.3"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_domain_is_added_once() -> None:
    with pytest.raises(ValueError, match="'chat' is already an output"):
        random_network().add_domain("chat")
    with pytest.raises(ValueError, match="needs a name"):
        random_network().add_domain("")


@pytest.mark.parametrize(("log_temperature", "temperature"), [(-5.0, 0.3), (0.0, 1.0), (5.0, 3.0)])
def test_temperature_is_clamped(log_temperature: float, temperature: float) -> None:
    network = random_network()
    nn.init.constant_(network.log_temperature, log_temperature)
    assert network.temperature().item() == pytest.approx(temperature)


def test_the_network_has_the_size_of_the_paper() -> None:
    network = MetaRouter(3840, ("chat", "code", "math", "medical", "reasoning"))
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_761_730
