"""Sampling: what the parameters say, the draw against its distribution, and a row against its neighbours.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.reference_sampling import kept_ids
from moemesh.sampling import SampleRow, describe_samples, draws_of, prompt_logprobs
from moemesh.sampling_params import SamplingParams
from moemesh.sequence import Sampled, SamplingError, Sequence


def sample(logits_BV: torch.Tensor, rows: list[SampleRow]) -> list[Sampled | SamplingError]:
    return describe_samples(kernels.sample(logits_BV, draws_of(rows, logits_BV.shape[1])), logits_BV, rows)


def row(params: SamplingParams, *, position: int = 0, **fields: object) -> SampleRow:
    given_fields: dict[str, object] = {"seq_id": 0, "prompt_ids": (), "seed": 0, **fields}
    return SampleRow(Sequence(params=params, **given_fields), position)  # type: ignore[arg-type]


def logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def token(logits_V: list[float], params: SamplingParams, **fields: object) -> int:
    (result,) = sample(torch.tensor([logits_V]), [row(params, **fields)])
    assert isinstance(result, Sampled)
    return result.token_id


def reason(logits_V: list[float], params: SamplingParams, **fields: object) -> str:
    (result,) = sample(torch.tensor([logits_V]), [row(params, **fields)])
    assert isinstance(result, SamplingError)
    return result.reason


GREEDY = SamplingParams(temperature=0.0)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert token([1.0, 3.0, 3.0, 0.0], GREEDY) == 1
    assert token([1.0, 3.0, 3.0, 0.0], replace(GREEDY, logit_bias={3: 3.0})) == 1


def test_a_greedy_batch_needs_no_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*arguments: object) -> None:
        raise AssertionError("scores of a batch in which nobody asked for them")

    monkeypatch.setattr(kernels, "score", unexpected)
    logits_BV = logits(5, 40)
    results = sample(logits_BV, [row(GREEDY)] * 5)
    assert [r.token_id for r in results if isinstance(r, Sampled)] == logits_BV.argmax(dim=1).tolist()
    assert all(isinstance(r, Sampled) and r.logprob is None for r in results)


def test_stop_tokens_are_masked_until_min_tokens() -> None:
    params = replace(GREEDY, min_tokens=2, stop_token_ids=(1, 99))
    best_two_stop = [5.0, 4.0, 3.0]
    assert token(best_two_stop, params, eos_ids=frozenset({0})) == 2
    assert token(best_two_stop, params, eos_ids=frozenset({0}), output_ids=[2]) == 2
    assert token(best_two_stop, params, eos_ids=frozenset({0}), output_ids=[2, 2]) == 0
    assert "leave no token" in reason([1.0, 2.0], params, eos_ids=frozenset({0}))


def test_logit_bias_moves_the_choice() -> None:
    assert token([1.0, 3.0, 2.0], replace(GREEDY, logit_bias={0: 5.0, 1: -100.0})) == 0
    assert "token 3, the vocabulary has 3" in reason([1.0, 3.0, 2.0], replace(GREEDY, logit_bias={3: 1.0}))


@pytest.mark.parametrize(
    ("penalties", "best"),
    [
        # Logits 4.0, 3.9, 3.0, 1.0; token 0 is in the prompt, token 1 twice and token 2 once in the output.
        ({"presence_penalty": 0.95}, 0),
        ({"presence_penalty": 0.95, "logit_bias": {0: -1.0}}, 0),
        ({"frequency_penalty": 0.5, "logit_bias": {0: -1.2}}, 1),
        ({"frequency_penalty": 1.0, "logit_bias": {0: -2.1}}, 2),
        ({"repetition_penalty": 2.0, "logit_bias": {3: 1.05}}, 3),
        ({"repetition_penalty": 2.0}, 0),
        ({"repetition_penalty": 0.5, "presence_penalty": -0.5}, 1),
    ],
)
def test_penalties(penalties: dict[str, object], best: int) -> None:
    params = SamplingParams(temperature=0.0, **penalties)  # type: ignore[arg-type]
    assert token([4.0, 3.9, 3.0, 1.0], params, prompt_ids=(0,), output_ids=[1, 2, 1]) == best


def test_a_repetition_penalty_pushes_negative_logits_down() -> None:
    assert token([-1.0, -1.5], replace(GREEDY, repetition_penalty=2.0), prompt_ids=(0,)) == 1


def test_penalties_that_overflow_are_an_error_of_the_row() -> None:
    assert "finite" in reason([1.0, 2.0], replace(GREEDY, repetition_penalty=5e-324), prompt_ids=(0,))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, top_k=5),
        SamplingParams(temperature=1.7, top_p=0.8),
        SamplingParams(temperature=1.2, min_p=0.1),
    ],
)
def test_draws_have_the_distribution(params: SamplingParams) -> None:
    num_draws, logits_V = 20_000, logits(1, 12)[0]
    scores = logits_V.double().numpy() / params.temperature
    draw = kernels.Draw(top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
    allowed = kept_ids(scores - scores.max(), np.exp(scores - scores.max()), draw).tolist()
    expected = np.zeros(12)
    expected[allowed] = np.exp(scores[allowed] - scores.max())
    expected *= num_draws / expected.sum()
    rows = [row(params, position=position, seed=11) for position in range(num_draws)]
    counts = Counter(r.token_id for r in sample(logits_V.repeat(num_draws, 1), rows) if isinstance(r, Sampled))
    assert set(counts) <= set(allowed)
    chi_square = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in allowed)
    # Mean len - 1 and variance 2 (len - 1): five deviations above the mean, for fixed seeds.
    freedom = len(allowed) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_top_k_one_is_greedy_even_among_equals() -> None:
    assert {token([2.0, 5.0, 5.0], SamplingParams(top_k=1), position=p) for p in range(20)} == {1}


def test_a_small_temperature_overflows_nothing() -> None:
    assert {token([3e38, -3e38, 1.0], SamplingParams(temperature=1e-4), position=p) for p in range(5)} == {0}


def many_rows() -> list[SampleRow]:
    params = [
        GREEDY,
        replace(GREEDY, logprobs=3),
        replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.2),
        SamplingParams(seed=1),
        SamplingParams(temperature=0.7, top_p=0.9, logprobs=0),
        SamplingParams(top_k=4, min_p=0.05, presence_penalty=0.5, logprobs=20),
        SamplingParams(min_tokens=3, logit_bias={5: 2.0}),
    ]
    return [
        row(p, prompt_ids=(1, 2, 3), output_ids=[4] * (i % 4), position=i, seed=i * 17, eos_ids=frozenset({6}))
        for i, p in enumerate(params * 3)
    ]


def test_a_row_does_not_depend_on_the_batch() -> None:
    rows = many_rows()
    logits_BV = logits(len(rows), 1003)
    alone = [sample(logits_BV[i : i + 1].clone(), [r])[0] for i, r in enumerate(rows)]
    assert sample(logits_BV, rows) == alone
    order = list(reversed(range(len(rows))))
    assert sample(logits_BV[order], [rows[i] for i in order]) == [alone[i] for i in order]
    num_threads = kernels.num_threads()
    try:
        for other in (1, 2):
            kernels.set_num_threads(other)
            assert sample(logits_BV, rows) == alone
    finally:
        kernels.set_num_threads(num_threads)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_hurt_their_row_alone(bad: float) -> None:
    rows = many_rows()
    logits_BV = logits(len(rows), 67)
    whole = sample(logits_BV, rows)
    for broken in (0, 1, 3, 5):
        poisoned_BV = logits_BV.clone()
        poisoned_BV[broken, 13] = bad
        results = sample(poisoned_BV, rows)
        assert results[broken] == SamplingError(reason="the model's logits are not finite")
        assert results[:broken] + results[broken + 1 :] == whole[:broken] + whole[broken + 1 :]


def test_logits_are_left_as_they_were() -> None:
    logits_BV = logits(21, 50)
    before_BV = logits_BV.clone()
    sample(logits_BV, many_rows())
    assert torch.equal(logits_BV, before_BV)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits_BV = logits(1, 30)
    params = SamplingParams(temperature=3.0, logit_bias={7: 100.0}, logprobs=4)
    (result,) = sample(logits_BV, [row(params)])
    assert isinstance(result, Sampled)
    logprobs = logits_BV.double().log_softmax(-1)[0].tolist()
    ranked = sorted(range(30), key=lambda i: (-logprobs[i], i))
    assert result.token_id == 7
    assert result.logprob == pytest.approx(logprobs[7], abs=1e-5)
    assert result.rank == ranked.index(7) + 1
    assert result.top_ids == tuple(ranked[:4])
    assert result.top_logprobs == pytest.approx([logprobs[i] for i in ranked[:4]], abs=1e-5)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 14), st.data())
@settings(deadline=None)
def test_equal_logprobs_rank_equal_and_list_the_lower_id_first(
    values: list[int], num_top: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.integers(0, len(values) - 1))
    (entry,) = prompt_logprobs(torch.tensor([values], dtype=torch.float32), [chosen], [num_top])
    assert isinstance(entry, Sampled)
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert entry.token_id == chosen
    assert entry.rank == 1 + sum(value > values[chosen] for value in values)
    assert entry.top_ids == tuple(ranked[:num_top])
    assert len(entry.top_logprobs) == len(entry.top_ids)
    if chosen in entry.top_ids:
        assert entry.top_logprobs[entry.top_ids.index(chosen)] == entry.logprob


def test_prompt_rows_are_scored_one_by_one() -> None:
    logits_BV = logits(4, 20)
    logits_BV[2, 5] = math.nan
    scored = prompt_logprobs(logits_BV, [3, 1, 4, 1], [2, 0, 2, 3])
    logprobs_BV = logits_BV.double().log_softmax(-1)
    assert scored[2] == SamplingError(reason="the model's logits for the prompt are not finite")
    for i, next_id in ((0, 3), (1, 1), (3, 1)):
        entry = scored[i]
        assert isinstance(entry, Sampled)
        assert entry == prompt_logprobs(logits_BV[i : i + 1], [next_id], [(2, 0, 2, 3)[i]])[0]
        assert entry.logprob == pytest.approx(logprobs_BV[i, next_id].item(), abs=1e-5)


def test_no_rows() -> None:
    empty_BV = torch.empty(0, 20)
    assert sample(empty_BV, []) == []
    assert prompt_logprobs(empty_BV, [], []) == []
