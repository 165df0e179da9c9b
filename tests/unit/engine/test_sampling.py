"""Sampling compared with its definition, row by row and in distribution."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from engine.grammar import GrammarCompiler
from engine.sampling import RowSampler, adjust, sample, token_logprobs
from engine.types import SamplingParams
from tests.tiny_bases import tiny_tokenizer


def row(prompt: set[int] | None = None, ends: set[int] | None = None, **options: object) -> RowSampler:
    params = SamplingParams(max_tokens=1000, **options)  # type: ignore[arg-type]
    return RowSampler(params, frozenset(prompt or ()), frozenset(ends or ()))


LOGITS = torch.tensor([1.0, 2.0, 0.5, -1.0, 1.5])


def frequencies(sampler: RowSampler, draws: int = 4000) -> list[float]:
    counts = Counter(sample(LOGITS.unsqueeze(0).clone(), [sampler])[0] for _ in range(draws))
    return [counts[i] / draws for i in range(len(LOGITS))]


def test_zero_temperature_takes_the_largest() -> None:
    assert sample(LOGITS.unsqueeze(0).clone(), [row(temperature=0.0)]) == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0).tolist()
    assert frequencies(row(temperature=temperature, seed=1)) == pytest.approx(expected, abs=0.03)


def test_top_k_keeps_the_k_likeliest() -> None:
    weights = LOGITS.softmax(0)
    total = float(weights[1] + weights[4])
    expected = [0, float(weights[1]) / total, 0, 0, float(weights[4]) / total]
    assert frequencies(row(top_k=2, seed=1)) == pytest.approx(expected, abs=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    weights = LOGITS.softmax(0)  # 0.43, 0.26, 0.16, 0.10, ... in order: 1, 4, 0, 2, 3
    total = float(weights[1] + weights[4])
    expected = [0, float(weights[1]) / total, 0, 0, float(weights[4]) / total]
    assert frequencies(row(top_p=0.6, seed=1)) == pytest.approx(expected, abs=0.03)


def test_a_row_draws_the_same_in_any_company() -> None:
    alone, joint = (row(temperature=1.3, top_p=0.9, seed=3) for _ in range(2))
    expected = [sample(LOGITS.unsqueeze(0).clone(), [alone])[0] for _ in range(20)]
    others = [row(temperature=0.0), row(seed=9), row(top_k=1, seed=2)]
    got = [sample(LOGITS.repeat(4, 1), [others[0], joint, *others[1:]])[1] for _ in range(20)]
    assert got == expected


def test_an_unrestricted_row_draws_the_same_beside_a_restricted_one() -> None:
    alone, joint = row(seed=7), row(seed=7)
    expected = [sample(LOGITS.unsqueeze(0).clone(), [alone])[0] for _ in range(30)]
    got = [sample(LOGITS.repeat(2, 1), [joint, other])[0] for other in [row(top_p=0.9, seed=1)] * 30]
    assert got == expected


def test_negative_seeds_are_seeds_of_their_own() -> None:
    minus, plus = row(seed=-1), row(seed=1)
    drawn = [[sample(LOGITS.unsqueeze(0).clone(), [r])[0] for _ in range(40)] for r in (minus, plus)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("options", [{"temperature": 1e-37}, {"temperature": 1e-4}, {"top_p": 1e-46}])
def test_the_smallest_parameters_are_greedy(options: dict[str, float]) -> None:
    assert sample(LOGITS.unsqueeze(0) * 20, [row(seed=1, **options)]) == [1]  # type: ignore[arg-type]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits = LOGITS.clone()
    sampler = row(prompt={1, 3}, repetition_penalty=2.0)
    sampler.output_counts[4] = 1
    adjust(logits[None], [sampler])
    assert logits.tolist() == [1.0, 1.0, 0.5, -2.0, 0.75]


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = LOGITS.clone()
    sampler = row(prompt={0}, presence_penalty=0.5, frequency_penalty=0.25)
    sampler.output_counts.update({1: 3, 2: 1})
    adjust(logits[None], [sampler])
    assert logits.tolist() == pytest.approx([1.0, 2.0 - 0.5 - 0.75, 0.5 - 0.5 - 0.25, -1.0, 1.5])


def test_rows_are_adjusted_together_as_alone() -> None:
    rows = [
        row(),
        row(prompt={1}, repetition_penalty=1.5, logit_bias={0: 2.0, 3: -1.0}),
        row(presence_penalty=0.5, logit_bias={3: 4.0}),
        row(prompt={0, 2}, repetition_penalty=0.5, frequency_penalty=0.25),
    ]
    for sampler in rows[2:]:
        sampler.output_counts.update({1: 3, 3: 1})
    together = LOGITS.repeat(len(rows), 1)
    adjust(together, rows)
    for sampler, adjusted in zip(rows, together, strict=True):
        alone = LOGITS.clone()
        adjust(alone[None], [sampler])
        assert torch.equal(adjusted, alone)
    assert torch.equal(together[0], LOGITS)
    assert len({tuple(adjusted.tolist()) for adjusted in together}) == len(rows)


def test_logit_bias_is_added() -> None:
    assert sample(LOGITS.unsqueeze(0).clone(), [row(temperature=0.0, logit_bias={3: 50.0})]) == [3]


def test_tokens_that_end_are_forbidden_before_min_tokens() -> None:
    sampler = row(temperature=0.0, min_tokens=2, ends={1})
    assert [sample(LOGITS.unsqueeze(0).clone(), [sampler])[0] for _ in range(3)] == [4, 4, 1]


def test_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    sampler = row(seed=5)
    assert {sample(logits.clone(), [sampler])[0] for _ in range(500)} == {1, 3}


def test_logprobs_are_natural_logs_of_the_raw_distribution() -> None:
    (entry,) = token_logprobs(LOGITS.unsqueeze(0), [2], 2)
    expected = LOGITS.log_softmax(0)
    assert entry.logprob == pytest.approx(float(expected[2]))
    assert [token for token, _ in entry.top] == [1, 4]
    assert math.exp(entry.top[0][1]) == pytest.approx(float(LOGITS.softmax(0)[1]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("min_tokens", 1001),
        ("stop", ("",)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("logit_bias", {5: 101.0}),
    ],
)
def test_bad_parameters_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(max_tokens=1000, **{field: value})  # type: ignore[arg-type]


def letters(text: str) -> list[int]:
    return [tiny_tokenizer().get_vocab()[letter] for letter in text]


def test_grammar_cuts_its_own_row_only() -> None:
    compiler = GrammarCompiler(tiny_tokenizer(), vocabulary=384, eos_token_ids=frozenset({2}))
    grammar = compiler.compile("start: /[xyz]+/").result(timeout=20)
    rows = [row(seed=1), row(grammar=grammar, seed=1), row(seed=2, logit_bias={7: 3.0})]
    logits = torch.randn(3, 384, generator=torch.Generator().manual_seed(0))
    bound, free = logits.clone(), logits.clone()
    adjust(bound, rows)
    adjust(free, [row(seed=1), row(seed=1), row(seed=2, logit_bias={7: 3.0})])
    assert torch.equal(bound[[0, 2]], free[[0, 2]])
    kept = letters("xyz")
    assert bound[1].isfinite().nonzero().squeeze(1).tolist() == sorted(kept)
    assert torch.equal(bound[1, kept], free[1, kept])


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.7}, {"temperature": 0.0}])
def test_draws_of_a_grammar_are_those_of_a_vocabulary_without_the_rest(options: dict[str, Any]) -> None:
    compiler = GrammarCompiler(tiny_tokenizer(), vocabulary=384, eos_token_ids=frozenset({2}))
    grammar = compiler.compile("start: /[xyz]/").result(timeout=20)
    logits = torch.randn(1, 384, generator=torch.Generator().manual_seed(1))
    others = [token for token in range(384) if token not in letters("xyz")]
    small = logits.clone()
    small[:, others] = -torch.inf
    for seed in range(200):
        drawn = sample(logits.clone(), [row(grammar=grammar, seed=seed, **options)])
        assert drawn == sample(small.clone(), [row(seed=seed, **options)])


def test_end_of_a_grammar_waits_for_enough_tokens_if_anything_else_is_left() -> None:
    compiler = GrammarCompiler(tiny_tokenizer(), vocabulary=384, eos_token_ids=frozenset({2}))
    grammar = compiler.compile("start: /x{0,2}/").result(timeout=20)
    waiting = row(grammar=grammar, ends={2}, min_tokens=9)
    (x,) = letters("x")
    for expected in ([x], [x], [2]):  # the third has nothing else left
        assert waiting.allowed(384).nonzero()[0].tolist() == expected
        waiting.take(expected[0])
    assert waiting.is_complete
