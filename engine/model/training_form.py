"""The training form of a stack: parameters, gate noise, load balance, protected directions. Knows no optimiser.

Letters: T tokens, I in, O out, P projections that share an input, E experts, R rank, K directions. The mathematics is
that of `moe_lora.py`; a stack's earlier rounds and other domains are computed beside it by the serving form.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.inject import group_of
from engine.model.moe_lora import MoeLoraConfig, ServingDeltas, StackPack, top_k_gate
from stack_store.format import INPUT_GROUPS, Geometry, ProjectionTensors


def outside(b: Tensor, directions: Tensor) -> Tensor:
    """(C, O), (O, K) orthonormal -> (C, O): b without its part in the directions, b - (b V) Vᵀ, differentiable.

    Of every row of b, hence of every delta that b makes (Brainstacks paper, section 3.5).
    """
    return b - (b @ directions) @ directions.T


def load_balance_loss(noisy_logits: Tensor, share: Tensor, real: Tensor | None = None) -> Tensor:
    """(T, ..., E), (..., E) -> (...): E * sum_e P_e f_e, 1 at best (Switch Transformer, section 2.2, for top-K).

    P_e, the mean probability of expert e over the real tokens (T,), carries the gradient; f_e, its share of the
    assignments, is a constant.
    """
    probability = token_mean(noisy_logits.float().softmax(dim=-1), real)  # (..., E)
    return noisy_logits.shape[-1] * (probability * share).sum(dim=-1)


def expert_share(gate: Tensor, top_k: int, real: Tensor | None = None) -> Tensor:
    """(T, ..., E) -> (..., E): each expert's share of the real tokens' T*K assignments, a constant."""
    return token_mean((gate.detach() > 0).float(), real) / top_k


def token_mean(values: Tensor, real: Tensor | None) -> Tensor:
    """(T, ...) -> (...): the mean over the tokens that are real, (T,) bool, or over all."""
    if real is None:
        return values.mean(dim=0)
    # Not by indexing: how many are real is known on the device only, and asking would wait for it.
    kept = torch.where(real.view(-1, *[1] * (values.dim() - 1)), values, 0.0)
    return kept.sum(dim=0) / real.sum()


class MoeLoraGroup(nn.Module):
    """The training form of one layer's input group: P projections that read the same input."""

    def __init__(self, in_features: int, out_features: Sequence[int], config: MoeLoraConfig) -> None:
        super().__init__()
        p, e, r = len(out_features), config.num_experts, config.rank
        bound = 1.0 / math.sqrt(in_features)  # kaiming_uniform_ with a = sqrt(5)
        self.config = config
        self.a = nn.Parameter(torch.empty(p, e, r, in_features).uniform_(-bound, bound))
        self.gate = nn.Parameter(torch.empty(p, e, in_features).normal_(0.0, 0.02))
        self.noise = nn.Parameter(torch.zeros(p, e, in_features))
        # Stored transposed, (E*R, O), as a stack file has it. Zero: a fresh stack changes nothing.
        self.b = nn.ParameterList([nn.Parameter(torch.zeros(e * r, out)) for out in out_features])
        self.protected: list[Tensor | None] = [None] * p  # (O, K) each: directions that the deltas may not use
        self.aux_loss: Tensor | None = None  # of the latest forward in train mode, mean over the projections
        self.expert_share: Tensor | None = None  # (P, E) share of the assignments in the latest forward

    def forward(self, x: Tensor, real: Tensor | None = None) -> list[Tensor]:
        """(T, I) -> P tensors (T, O), in x's dtype. `real` (T,) bool leaves padding out of the balance."""
        p, e, r = self.a.shape[0], self.config.num_experts, self.config.rank
        weights = [self.a.reshape(p * e * r, -1), self.gate.reshape(p * e, -1)]
        if self.training:
            weights.append(self.noise.reshape(p * e, -1))
        products = F.linear(x, torch.cat(weights).to(x.dtype))  # (T, P*E*R + P*E (+ P*E))
        mid = products[:, : p * e * r].view(-1, p, e, r)
        logits = products[:, p * e * r : p * e * (r + 1)].reshape(-1, p, e).float()
        if self.training:
            deviation = F.softplus(products[:, p * e * (r + 1) :].reshape(-1, p, e).float())
            logits = logits + deviation * torch.randn_like(deviation)
        gate = top_k_gate(logits, self.config.top_k)  # (T, P, E)
        self.expert_share = expert_share(gate, self.config.top_k, real)
        if self.training:
            self.aux_loss = load_balance_loss(logits, self.expert_share, real).mean()
        weighted = (mid * (gate * self.config.scale).to(x.dtype).unsqueeze(-1)).flatten(2)  # (T, P, E*R)
        return [weighted[:, i] @ self.allowed_b(i).to(x.dtype) for i in range(p)]

    def allowed_b(self, index: int) -> Tensor:
        """(E*R, O): one projection's B outside the protected directions; what every forward computes with."""
        directions = self.protected[index]
        return self.b[index] if directions is None else outside(self.b[index], directions)

    def projection(self, index: int) -> ProjectionTensors:
        """A copy of one projection's weights in the training layout, detached, float32, B folded.

        Folded means outside the protected directions: serving needs to know nothing of them.
        """
        e, r = self.config.num_experts, self.config.rank
        b = self.allowed_b(index).detach().float()  # (E*R, O)
        return ProjectionTensors(
            a=self.a[index].detach().float().clone(),
            b=b.view(e, r, -1).transpose(1, 2).contiguous(),
            gate=self.gate[index].detach().float().clone(),
        )


class MoeLoraStack(nn.Module):
    """One trainable stack: an input group of each kind in every layer."""

    def __init__(self, geometry: Geometry, config: MoeLoraConfig) -> None:
        super().__init__()
        self.config = config
        self.groups = nn.ModuleDict(
            {
                f"{layer}_{group}": MoeLoraGroup(
                    geometry.shapes[members[0]][0], [geometry.shapes[name][1] for name in members], config
                )
                for layer in range(geometry.num_layers)
                for group, members in INPUT_GROUPS.items()
            }
        )

    def group(self, layer: int, group: str) -> MoeLoraGroup:
        """The module of one layer's input group."""
        module = self.groups[f"{layer}_{group}"]
        assert isinstance(module, MoeLoraGroup)
        return module

    def all_groups(self) -> Iterable[MoeLoraGroup]:
        """Every group, layer by layer."""
        for module in self.groups.values():
            assert isinstance(module, MoeLoraGroup)
            yield module

    def protect(self, directions: Mapping[tuple[int, str], Tensor]) -> None:
        """Keeps every delta out of these directions from now on. (layer, projection) -> (O, K) orthonormal columns."""
        for (layer, name), columns in directions.items():
            group, index = group_of(name)
            self.group(layer, group).protected[index] = columns if columns.shape[1] else None

    def aux_loss(self) -> Tensor:
        """Scalar: the load-balance loss of the latest forward, averaged over all projections."""
        losses = [(group.aux_loss, len(group.b)) for group in self.all_groups() if group.aux_loss is not None]
        weighted = torch.stack([loss * count for loss, count in losses])
        return weighted.sum() / sum(count for _, count in losses)

    def expert_shares(self) -> dict[tuple[int, str], Tensor]:
        """Each projection's (E,) shares of the expert assignments in the latest forward."""
        shares: dict[tuple[int, str], Tensor] = {}
        for key, module in self.groups.items():
            layer, _, group = key.partition("_")
            assert isinstance(module, MoeLoraGroup)
            if module.expert_share is not None:
                shares |= {(int(layer), n): module.expert_share[i] for i, n in enumerate(INPUT_GROUPS[group])}
        return shares

    def projections(self, num_layers: int) -> dict[tuple[int, str], ProjectionTensors]:
        """Every projection's weights in the training layout, by layer and projection name."""
        return {
            (layer, name): self.group(layer, group).projection(index)
            for layer in range(num_layers)
            for group, members in INPUT_GROUPS.items()
            for index, name in enumerate(members)
        }


class TrainingDeltas:
    """The source of deltas in training: frozen stacks by the serving form, then the stack being trained.

    Nothing is cut from the graph: gradients flow through the base and the frozen stacks to every layer below.
    """

    def __init__(self, active: MoeLoraStack | None = None) -> None:
        self.active = active
        self.real_tokens: Tensor | None = (
            None  # (T,) bool of the running batch: which tokens are not padding; None: all
        )
        self._frozen = ServingDeltas()
        self._pending: list[Tensor] = []
        self._input: Tensor | None = None

    def use_frozen(self, pack: StackPack | None, weights: Sequence[float] | None = None) -> None:
        """From now on every token uses every stack of the pack at its weight: S positive numbers, or 1 for all."""
        if pack is None:
            self._frozen.current = None
        else:
            self._frozen.current = pack.step(torch.tensor([weights or [1.0] * pack.num_stacks]))

    def add_delta(self, y: Tensor, x: Tensor, layer: int, group: str, index: int) -> Tensor:
        """(..., O), (..., I) -> (..., O): y plus the frozen stacks' deltas and the active one's."""
        y = self._frozen.add_delta(y, x, layer, group, index)
        if self.active is None:
            return y
        if self._input is not x or index == 0:
            module = self.active.group(layer, group)
            self._input, self._pending = x, module(x.reshape(-1, x.shape[-1]), self.real_tokens)
        delta = self._pending[index]
        if index == len(self._pending) - 1:
            self._input, self._pending = None, []
        return y + delta.view_as(y)
