"""The meta-router's network: token features in, one logit per domain out. Knows domain names, no policy.

Legend: B prompts, T tokens, H hidden size of the base, C hidden size of the router, D domains.
The architecture is the paper's (section 3.6, meta-router): every domain's logit is made of its own query and of shared
weights, and is computed by itself in shapes that do not know D. So adding a domain leaves the others' bits alone.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

HIDDEN_DIM = 512
DROPOUT = 0.1
MIN_TEMPERATURE = 0.3
MAX_TEMPERATURE = 3.0
QUERY_STD = 0.02


class MetaRouter(nn.Module):
    """Independent logits for each domain, in float32, in the order of `domains`."""

    def __init__(
        self, token_dim: int, domains: Sequence[str], *, hidden_dim: int = HIDDEN_DIM, dropout: float = DROPOUT
    ) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.hidden_dim = hidden_dim
        self.token_proj = nn.Linear(token_dim, hidden_dim)
        self.token_ln = nn.LayerNorm(hidden_dim)
        self.global_query = nn.Parameter(torch.randn(hidden_dim) * QUERY_STD)
        self.global_ln = nn.LayerNorm(hidden_dim)
        self.domain_ln = nn.LayerNorm(hidden_dim)
        self.mlp = nn.Sequential(
            nn.Linear(2 * hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.LayerNorm(hidden_dim),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, 1),
        )
        self.log_temperature = nn.Parameter(torch.zeros(()))
        # A list, not one (D, C) tensor: a new query can then be trained while every other parameter is frozen.
        self.domain_queries = nn.ParameterList()
        self._domains: tuple[str, ...] = ()
        for name in domains:
            self.add_domain(name)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains in output order."""
        return self._domains

    @property
    def device(self) -> torch.device:
        return self.global_query.device

    def add_domain(self, name: str) -> None:
        """Append one output with a fresh random query; nothing else changes."""
        if not name:
            raise ValueError("a domain needs a name, not ''")
        if name in self._domains:
            raise ValueError(f"domain {name!r} is already an output of this router")
        self.domain_queries.append(nn.Parameter(torch.randn_like(self.global_query) * QUERY_STD))
        self._domains = (*self._domains, name)

    def temperature(self) -> Tensor:
        """A scalar in [0.3, 3]."""
        return self.log_temperature.exp().clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """(B, T, H), (B, T) true on tokens -> (B, D) logits. Every prompt must have a token."""
        return torch.stack(list(self._logits(features, mask, self.domain_queries)), dim=-1)

    def domain_logit(self, domain: str, features: Tensor, mask: Tensor) -> Tensor:
        """(B, T, H), (B, T) -> (B,): the column of one domain, at the cost of one."""
        query = self.domain_queries[self._domains.index(domain)]
        return next(self._logits(features, mask, [query]))

    def scores(self, features: Tensor, mask: Tensor) -> Tensor:
        """(B, T, H), (B, T) -> (B, D) sigmoid scores, each as free of the other domains as its logit."""
        logits = self._logits(features, mask, self.domain_queries)
        return torch.stack([logit.sigmoid() for logit in logits], dim=-1)

    def _logits(self, features: Tensor, mask: Tensor, queries: Iterable[Tensor]) -> Iterator[Tensor]:
        """One (B,) tensor per query. A loop, because a product over all domains may round differently as D grows."""
        # Zeroed, since a weight of 0 would still let NaN through from what lies in the padding.
        tokens = self.token_ln(self.token_proj(features.masked_fill(~mask.unsqueeze(-1), 0.0)))  # (B, T, C)
        shared = self.global_ln(_attention_pool(tokens, self.global_query, mask))  # (B, C)
        temperature = self.temperature()
        for query in queries:
            domain = self.domain_ln(_attention_pool(tokens, query, mask))  # (B, C)
            yield self.mlp(torch.cat([domain, shared], dim=-1)).squeeze(-1) / temperature


def _attention_pool(tokens: Tensor, query: Tensor, mask: Tensor) -> Tensor:
    """(B, T, C), (C,), (B, T) -> (B, C). Unscaled like the paper's: normed tokens meet queries that start at 0.02."""
    attention = (tokens @ query).masked_fill(~mask, -torch.inf).softmax(dim=-1)  # (B, T)
    return torch.bmm(attention.unsqueeze(1), tokens).squeeze(1)
