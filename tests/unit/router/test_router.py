"""Facts about routing one text."""

import pytest
import torch

from router.checkpoint import RouterCheckpoint
from router.errors import EmptyText, ScoresNotFinite
from router.features import FeatureSettings, pad_features, token_features
from router.network import MetaRouter
from router.policy import RoutingPolicy
from router.router import Router
from tests.fakes import TableHiddenStates, word_tokenizer

SETTINGS = FeatureSettings(mid_layer=1, max_tokens=4)
TOKENIZER = word_tokenizer(["one", "two", "three"])


def small_router(*, hidden_states: TableHiddenStates, policy: RoutingPolicy) -> Router:
    torch.manual_seed(0)
    return Router(
        network=MetaRouter(6, ("math", "chat", "code"), hidden_dim=8),
        settings=SETTINGS,
        policy=policy,
        tokenizer=TOKENIZER,
        hidden_states=hidden_states,
    )


def small_hidden_states() -> TableHiddenStates:
    return TableHiddenStates(num_token_ids=5, hidden_size=6)


def test_a_route_is_the_network_on_the_features_and_the_policy_on_the_scores() -> None:
    hidden_states, policy = small_hidden_states(), RoutingPolicy(threshold=0.5, floor=0.9)
    route = small_router(hidden_states=hidden_states, policy=policy).route("one three")
    torch.manual_seed(0)
    network = MetaRouter(6, ("math", "chat", "code"), hidden_dim=8).eval()
    features = token_features("one three", tokenizer=TOKENIZER, hidden_states=hidden_states, settings=SETTINGS)
    scores = network.scores(*pad_features([features])).squeeze(0).tolist()
    assert route.scores == dict(zip(("math", "chat", "code"), scores, strict=True))
    assert route.mix == policy.mix_from_scores(route.scores)
    assert route.mix["chat"] == 0.9
    assert route.gap == policy.is_gap(route.scores)


def test_the_gap_is_told_though_the_floor_answers() -> None:
    policy = RoutingPolicy(threshold=0.999, gap_threshold=0.999, floor=1.0)
    route = small_router(hidden_states=small_hidden_states(), policy=policy).route("one")
    assert route.gap
    assert route.mix == {"chat": 1.0}


def test_a_text_is_routed_by_its_first_max_tokens() -> None:
    router = small_router(hidden_states=small_hidden_states(), policy=RoutingPolicy())
    assert router.route("one two three one") == router.route("one two three one two two two")
    assert router.route("one two three one") != router.route("one two three two")


def test_routing_twice_gives_the_same_bits() -> None:
    router = small_router(hidden_states=small_hidden_states(), policy=RoutingPolicy())
    assert router.route("two one") == router.route("two one")


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(EmptyText):
        small_router(hidden_states=small_hidden_states(), policy=RoutingPolicy()).route("  ")


def test_scores_that_are_no_numbers_are_refused() -> None:
    hidden_states = small_hidden_states()
    hidden_states.last[2] = torch.nan
    with pytest.raises(ScoresNotFinite, match=r"\['math', 'chat', 'code'\]"):
        small_router(hidden_states=hidden_states, policy=RoutingPolicy()).route("one")


def test_a_router_can_be_made_from_a_checkpoint() -> None:
    torch.manual_seed(0)
    checkpoint = RouterCheckpoint(
        network=MetaRouter(6, ("math", "chat", "code"), hidden_dim=8),
        settings=SETTINGS,
        policy=RoutingPolicy(),
        stack_digests={"math": (), "chat": (), "code": ()},
        base_fingerprint="base-1",
    )
    hidden_states = small_hidden_states()
    made = Router.from_checkpoint(checkpoint, tokenizer=TOKENIZER, hidden_states=hidden_states)
    assert made.domains == ("math", "chat", "code")
    assert made.route("one") == small_router(hidden_states=hidden_states, policy=RoutingPolicy()).route("one")
