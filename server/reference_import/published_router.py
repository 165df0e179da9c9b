"""Turns a published router into ours: the same function under other names. Knows tensors and policy, not files.

The published network is that of router/network.py, parameter by parameter: `ctx_ln` is our `domain_ln`, `ff` and `out`
are our `mlp`, and the domains' queries lie in one tensor. It pools by unscaled products, has dropout that serving does
not use, and clamps its temperature between the same bounds.
Legend: H hidden size of the base, C hidden size of the router, D domains.
"""

from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from router.network import MetaRouter
from router.policy import RoutingPolicy
from server.errors import ReferenceRefused
from server.reference_import.published_tensor import finite_in, require_shape, require_tensor

VERSION = "reasoning_aware"
FLOOR_DOMAIN = "chat"
OUR_MODULES: Mapping[str, str] = {
    "token_proj": "token_proj",
    "token_ln": "token_ln",
    "global_ln": "global_ln",
    "ctx_ln": "domain_ln",
    "ff.0": "mlp.0",
    "ff.3": "mlp.3",
    "ff.4": "mlp.4",
    "out": "mlp.7",
}


class _Router(BaseModel):
    """What is in the archive. Every key must be there and no other may be."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    state_dict: dict[str, object]
    domain_names: list[str] = Field(min_length=1)
    token_dim: int
    n_domains: int
    version: str
    chat_floor: float
    gate_threshold: float


def read_published_router(
    file: str, content: object, *, domains: Sequence[str], hidden_size: int
) -> tuple[MetaRouter, RoutingPolicy]:
    """The network in eval mode, in float32, with the published scores, and the policy with the published constants.

    The outputs are in the published order, under the published names. `domains` are the manifest's, `hidden_size` is H.
    A published file has no gap threshold; where no score is above its gate threshold, no domain knows the prompt.
    Raises ReferenceRefused, naming the thing and the value, for another version, other domains, another H, and for
    tensors that are missing, unknown, misshapen or not finite.
    """
    router = _validate(file, content)
    _require_domains(file, router, domains)
    if router.token_dim != hidden_size:
        raise ReferenceRefused(f"{file}: token_dim is {router.token_dim}, the base's hidden size is {hidden_size}")
    try:
        policy = RoutingPolicy(FLOOR_DOMAIN, router.chat_floor, router.gate_threshold, router.gate_threshold)
    except ValueError as error:
        raise ReferenceRefused(f"{file}: chat_floor or gate_threshold cannot be used: {error}") from error
    return _network(file, router), policy


def _validate(file: str, content: object) -> _Router:
    try:
        router = _Router.model_validate(content)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc'])) or 'as a whole'}: {fault['msg']}" for fault in error.errors())
        raise ReferenceRefused(f"{file}: {'; '.join(faults)}") from error
    if router.version != VERSION:
        raise ReferenceRefused(f"{file}: version is {router.version!r}, this build knows {VERSION!r}")
    return router


def _require_domains(file: str, router: _Router, domains: Sequence[str]) -> None:
    names = router.domain_names
    if len(set(names)) < len(names):
        raise ReferenceRefused(f"{file}: a domain appears twice in domain_names {names}")
    if router.n_domains != len(names):
        raise ReferenceRefused(f"{file}: n_domains is {router.n_domains}, domain_names has {len(names)}")
    if set(names) != set(domains):
        raise ReferenceRefused(f"{file}: domain_names are {sorted(names)}, the manifest's domains {sorted(domains)}")


def _network(file: str, router: _Router) -> MetaRouter:
    tensors = {key: require_tensor(file, key, value) for key, value in router.state_dict.items()}
    queries = tensors.get("domain_queries")
    if queries is None or queries.ndim != 2 or 0 in queries.shape:
        shape = "missing" if queries is None else list(queries.shape)
        raise ReferenceRefused(f"{file}: tensor 'domain_queries' is {shape}, must be (domains, hidden size)")
    with torch.device("meta"):  # no memory is spent on what a file merely promises
        network = MetaRouter(router.token_dim, router.domain_names, hidden_dim=queries.shape[1])
    shapes = _published_shapes(network)
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise ReferenceRefused(f"{file} lacks the tensor {missing[0]!r}")
    if extra := sorted(tensors.keys() - shapes.keys()):
        raise ReferenceRefused(f"{file} has the unknown tensor {extra[0]!r}")
    if tensors["log_temperature"].numel() == 1:
        tensors["log_temperature"] = tensors["log_temperature"].reshape(())
    for key, tensor in tensors.items():
        require_shape(file, key, tensor, shapes[key])
    finite = {key: finite_in(torch.float32, file, key, tensor) for key, tensor in tensors.items()}
    network.to_empty(device="cpu").load_state_dict(_our_names(finite))
    return network.eval()


def _published_shapes(network: MetaRouter) -> dict[str, Sequence[int]]:
    """The shape of each published tensor, told by the same network under our names."""
    ours = network.state_dict()
    shapes: dict[str, Sequence[int]] = {key: ours[key].shape for key in ("global_query", "log_temperature")}
    shapes["domain_queries"] = (len(network.domains), network.hidden_dim)
    for theirs, name in OUR_MODULES.items():
        shapes |= {f"{theirs}.{part}": ours[f"{name}.{part}"].shape for part in ("weight", "bias")}
    return shapes


def _our_names(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"domain_queries.{i}": query for i, query in enumerate(published["domain_queries"])}
    tensors |= {key: published[key] for key in ("global_query", "log_temperature")}
    for theirs, name in OUR_MODULES.items():
        tensors |= {f"{name}.{part}": published[f"{theirs}.{part}"] for part in ("weight", "bias")}
    return tensors
