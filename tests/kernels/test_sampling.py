"""Sampling: the filters against a slow reference, and the C kernels against their twin.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from array import array

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import reference_sampling
from kernels.reference_sampling import inverse_cumulative, kept_ids
from tests.kernels.weights import needs_native, normal, seeded


def reference_kept(scores: list[float], draw: kernels.Draw) -> list[int]:
    """Slow twin of kept_ids, a token at a time over a sorted list."""
    best = max(scores)
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    weights = {i: math.exp(scores[i] - best) for i in ranked}
    left = [i for i in ranked if weights[i] >= draw.min_p]
    if draw.top_k > 0:
        left = left[: draw.top_k]
    if draw.top_p == 1.0:
        return sorted(left)
    needed = draw.top_p * math.fsum(weights[i] for i in left)
    kept: list[int] = []
    while math.fsum(weights[i] for i in kept) < needed:
        kept.append(left[len(kept)])
    return sorted(kept)


def kept(scores: npt.NDArray[np.float64], draw: kernels.Draw) -> list[int]:
    shifted = scores - scores.max()
    return [int(i) for i in kept_ids(shifted, np.exp(shifted), draw)]


@given(
    st.lists(st.integers(-12, 12).map(lambda n: n / 2), min_size=1, max_size=30),
    st.integers(-1, 12),
    st.floats(0.01, 1.0),
    st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
)
@settings(deadline=None)
def test_the_filters_keep_what_the_reference_keeps(scores: list[float], top_k: int, top_p: float, min_p: float) -> None:
    draw = kernels.Draw(top_k=top_k, top_p=top_p, min_p=min_p)
    # A share that is exactly top_p may fall either side of it by rounding: move off such a tie.
    for nearby in (top_p, top_p * (1 - 1e-9)):
        draw = draw._replace(top_p=nearby)
        expected = reference_kept(scores, draw)
        if expected == reference_kept(scores, draw._replace(top_p=min(1.0 - 1e-12, nearby * (1 + 1e-10)))):
            assert kept(np.array(scores), draw) == expected


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_the_nucleus_of_a_large_vocabulary(top_p: float, spread: float) -> None:
    # Flat distributions need more of the vocabulary than the first cut has.
    scores = (normal(1, 3000, seed=1)[0] * 3).double().numpy() * spread
    draw = kernels.Draw(top_p=top_p)
    assert kept(scores, draw) == reference_kept(scores.tolist(), draw)


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    weights = np.array([0.5, 0.0, 1.0, 0.5, 0.0])
    drawn = [inverse_cumulative(weights, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1.0 - 2.0**-53)]
    assert drawn == [0, 0, 2, 2, 3, 3]


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=20))
@settings(deadline=None)
def test_the_largest_random_number_falls_on_the_last_token_with_a_weight(weights: list[float]) -> None:
    assert inverse_cumulative(np.array([1.0, *weights, 0.0]), 1.0 - 2.0**-53) == len(weights)


def test_min_p_keeps_equals_of_the_best() -> None:
    assert kept(np.array([1.0, 2.0, 2.0, 0.0]), kernels.Draw(min_p=1.0)) == [1, 2]


def draws() -> list[kernels.Draw]:
    """Every kind of row, several random numbers each."""
    history = {"tokens": array("i", [1, 2, 3, 4, 4, 9]), "num_prompt": 3}
    kinds = [
        kernels.BEST,
        kernels.Draw(repetition=1.3, frequency=0.2, **history),  # type: ignore[arg-type]
        kernels.Draw(masked=array("i", [6, 0])),
        kernels.Draw(temperature=1.0),
        kernels.Draw(temperature=0.7, top_p=0.9),
        kernels.Draw(temperature=3.0, top_p=0.99),
        kernels.Draw(temperature=1.0, top_k=4, min_p=0.05, presence=0.5, **history),  # type: ignore[arg-type]
        kernels.Draw(temperature=1.3, top_k=50, top_p=0.8, min_p=0.01),
        kernels.Draw(temperature=1e-3, bias_ids=array("i", [5, 6]), bias=array("d", [2.0, -100.0])),
    ]
    return [
        kind if kind == kernels.BEST else kind._replace(random=u) for kind in kinds for u in (0.0, 0.3, 0.71, 0.999)
    ]


@needs_native
@pytest.mark.parametrize("vocab", [11, 61, 3000])
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0])
def test_native_sampling_is_its_twin(vocab: int, spread: float) -> None:
    logits_BV = (normal(len(draws()), vocab) * spread).round(decimals=1)  # many equals
    assert kernels.sample(logits_BV, draws()) == reference_sampling.sample(logits_BV, draws())


@given(
    st.lists(st.integers(-12, 12), min_size=1, max_size=30),
    st.integers(0, 12),
    st.floats(0.01, 1.0),
    st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
)
@settings(deadline=None)
def test_native_filters_are_their_twin(scores: list[int], top_k: int, top_p: float, min_p: float) -> None:
    draw = kernels.Draw(temperature=2.0, top_k=top_k, top_p=top_p, min_p=min_p)
    rows = [draw._replace(random=i / 64) for i in range(64)]
    logits_BV = torch.tensor([scores] * 64, dtype=torch.float32)
    assert kernels.sample(logits_BV, rows) == reference_sampling.sample(logits_BV, rows)


@needs_native
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_a_row_depends_on_neither_company_threads_nor_instruction_set(isa: str) -> None:
    logits_BV, rows = normal(len(draws()), 61) * 2, draws()
    kernels.set_num_threads(1)
    alone = [kernels.sample(logits_BV[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    try:
        kernels.force_isa(isa)
    except ValueError:
        pytest.skip(f"this processor does not run {isa}")
    kernels.set_num_threads(2)
    order = torch.randperm(len(rows), generator=seeded()).tolist()
    assert kernels.sample(logits_BV[order], [rows[i] for i in order]) == [alone[i] for i in order]
    large_BV = normal(8, 40_000)
    assert kernels.sample(large_BV, rows[12:20]) == [
        kernels.sample(large_BV[i : i + 1], [row])[0] for i, row in enumerate(rows[12:20])
    ]


@pytest.mark.parametrize("vocab", [1, 7, 61, 1000])
def test_the_best_is_the_first_of_equals(vocab: int) -> None:
    logits_BV = torch.randint(0, 4, (20, vocab), generator=seeded()).float()
    assert kernels.sample(logits_BV, [kernels.BEST] * 20) == logits_BV.argmax(-1).tolist()


@pytest.mark.parametrize("vocab", [1, 7, 61, 1000, 40_000])
def test_log_probabilities_against_double(vocab: int) -> None:
    logits_RV = normal(3, vocab) * 8
    token_ids = [0, vocab // 2, vocab - 1]
    limit = 4e-6 if kernels.native_available() else 1e-5
    want = logits_RV.double().log_softmax(-1)[range(3), token_ids].tolist()
    scores = kernels.score(logits_RV, token_ids, [0, 0, 0])
    assert [score.logprob for score in scores if score is not None] == pytest.approx(want, abs=limit, rel=0)


@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_scores_are_their_twin(num_rows: int) -> None:
    logits_RV = (normal(num_rows, 61) * 3).round()
    logits_RV[3:4, 7] = math.inf
    token_ids, num_top = [3 * i for i in range(num_rows)], [0, 3, 61, 2, 99][:num_rows]
    got, want = kernels.score(logits_RV, token_ids, num_top), reference_sampling.score(logits_RV, token_ids, num_top)
    for left, right in zip(got, want, strict=True):
        assert (left is None) == (right is None)
        if left is not None and right is not None:
            assert (left.rank, left.top_ids) == (right.rank, right.top_ids)
            assert [left.logprob, *left.top_logprobs] == pytest.approx([right.logprob, *right.top_logprobs], abs=1e-5)


@needs_native
def test_ids_outside_the_vocabulary_are_refused() -> None:
    for draw in (
        kernels.Draw(masked=array("i", [11])),
        kernels.Draw(bias_ids=array("i", [-1]), bias=array("d", [1.0])),
        kernels.Draw(presence=1.0, tokens=array("i", [3, 11])),
    ):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            kernels.sample(normal(1, 11), [draw])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        kernels.score(normal(1, 11), [11], [0])
