"""Facts about the router's features. Legend: T tokens, H hidden size."""

import pytest
import torch
from torch import Tensor

from router.errors import EmptyText
from router.features import FeatureSettings, pad_features, router_token_ids, token_features
from tests.fakes import TableHiddenStates, word_tokenizer

WORDS = ["one", "two", "three", "four"]
SETTINGS = FeatureSettings(mid_layer=2)


def slow_features(mid: Tensor, last: Tensor, settings: FeatureSettings) -> list[list[float]]:
    """The formula, one number at a time."""
    return [
        [settings.mid_weight * mid[t, h].item() + settings.last_weight * last[t, h].item() for h in range(mid.shape[1])]
        for t in range(mid.shape[0])
    ]


def test_token_ids_have_no_special_tokens() -> None:
    tokenizer = word_tokenizer(WORDS)
    assert tokenizer.encode("one two") == [1, 2, 3]
    assert router_token_ids(tokenizer, "one two", SETTINGS) == [2, 3]


@pytest.mark.parametrize(("num_words", "num_tokens"), [(1, 1), (4, 4), (5, 5), (6, 5), (600, 5)])
def test_token_ids_stop_at_exactly_max_tokens(num_words: int, num_tokens: int) -> None:
    text = " ".join(WORDS[i % 4] for i in range(num_words))
    token_ids = router_token_ids(word_tokenizer(WORDS), text, FeatureSettings(mid_layer=2, max_tokens=5))
    assert token_ids == [2 + i % 4 for i in range(num_tokens)]


def test_a_long_text_leaves_the_tokenizer_as_it_was() -> None:
    tokenizer = word_tokenizer(WORDS)
    router_token_ids(tokenizer, "one " * 500, SETTINGS)
    assert tokenizer.backend_tokenizer.truncation is None
    assert len(tokenizer.encode("one " * 500)) == 501


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_a_text_without_tokens_is_refused(text: str) -> None:
    with pytest.raises(EmptyText, match=f"{len(text)} characters has no tokens"):
        router_token_ids(word_tokenizer(WORDS), text, SETTINGS)


def test_features_are_the_weighted_sum_of_mid_and_last() -> None:
    settings = FeatureSettings(mid_layer=2, mid_weight=0.3, last_weight=0.9)
    hidden_states = TableHiddenStates(num_token_ids=6, hidden_size=5)
    features = token_features(
        "two one two", tokenizer=word_tokenizer(WORDS), hidden_states=hidden_states, settings=settings
    )
    mid, last = hidden_states([3, 2, 3])
    torch.testing.assert_close(features, torch.tensor(slow_features(mid, last, settings)))


def test_the_base_is_asked_for_at_most_max_tokens() -> None:
    hidden_states = TableHiddenStates(num_token_ids=6, hidden_size=5)
    settings = FeatureSettings(mid_layer=2, max_tokens=3)
    features = token_features(
        "one two three four", tokenizer=word_tokenizer(WORDS), hidden_states=hidden_states, settings=settings
    )
    assert features.shape == (3, 5)
    assert hidden_states.asked == [[2, 3, 4]]


def test_features_are_summed_in_float32() -> None:
    table = TableHiddenStates(num_token_ids=6, hidden_size=5)
    table.mid, table.last = table.mid.bfloat16(), table.last.bfloat16()
    features = token_features("one", tokenizer=word_tokenizer(WORDS), hidden_states=table, settings=SETTINGS)
    assert features.dtype == torch.float32
    assert torch.equal(features, 0.45 * table.mid[[2]].float() + 0.55 * table.last[[2]].float())


def test_features_of_an_inference_mode_base_can_be_trained_on() -> None:
    table = TableHiddenStates(num_token_ids=6, hidden_size=5)
    features = token_features(
        "one two",
        tokenizer=word_tokenizer(WORDS),
        hidden_states=torch.inference_mode()(table),
        settings=SETTINGS,
    )
    layer = torch.nn.Linear(5, 1)
    torch.autograd.backward(layer(features).sum())
    assert layer.weight.grad is not None


def test_hidden_states_of_a_wrong_shape_are_refused() -> None:
    table = TableHiddenStates(num_token_ids=6, hidden_size=5)
    with pytest.raises(ValueError, match=r"T=2 tokens must be \(T, H\), not \(1, 2, 5\) and \(2, 5\)"):
        token_features(
            "one two",
            tokenizer=word_tokenizer(WORDS),
            hidden_states=lambda ids: (table(ids)[0].unsqueeze(0), table(ids)[1]),
            settings=SETTINGS,
        )


def test_padding_is_masked() -> None:
    features, mask = pad_features([torch.ones(1, 2), torch.full((3, 2), 2.0, dtype=torch.float16)])
    assert features.dtype == torch.float32
    assert features.tolist() == [[[1, 1], [0, 0], [0, 0]], [[2, 2], [2, 2], [2, 2]]]
    assert mask.tolist() == [[True, False, False], [True, True, True]]


def test_a_batch_with_an_empty_text_is_refused() -> None:
    with pytest.raises(EmptyText, match="text 1 of the batch"):
        pad_features([torch.ones(1, 2), torch.ones(0, 2)])


def test_wrong_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="mid_layer must be at least 0, not -1"):
        FeatureSettings(mid_layer=-1)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, not 0"):
        FeatureSettings(mid_layer=1, max_tokens=0)
    with pytest.raises(ValueError, match="must be finite, not nan"):
        FeatureSettings(mid_layer=1, mid_weight=float("nan"))
    with pytest.raises(ValueError, match="'template'"):
        FeatureSettings(mid_layer=1, text_form="template")
