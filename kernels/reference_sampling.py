"""Sampling in plain numpy, a row at a time: the oracle of the tests, and the path where the C kernels are not.

Same signatures as in kernels/sampling.py; see there, and kernels/draw.py, for the contracts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kernels.draw import BEST, NO_TOKEN, NOT_FINITE, Draw, TokenScore

Float64s = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def sample(logits_BV: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    finite = torch.isfinite(logits_BV).all(dim=1).tolist()
    best = logits_BV.argmax(dim=1).tolist()  # so that logits on a device are only fetched for a draw
    return [
        NOT_FINITE if not ok else token if draw == BEST else _sample_row(logits_V, draw)
        for ok, token, logits_V, draw in zip(finite, best, logits_BV, draws, strict=True)
    ]


def score(logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenScore | None]:
    scores: list[TokenScore | None] = []
    for logprobs, token_id, count in zip(logits_RV.log_softmax(-1), token_ids, num_top, strict=True):
        logprobs_V: npt.NDArray[np.float32] = logprobs.cpu().numpy()
        best = best_ids(logprobs_V, count)
        rank = 1 + int(np.count_nonzero(logprobs_V > logprobs_V[token_id]))
        entry = TokenScore(float(logprobs_V[token_id]), rank, tuple(best.tolist()), tuple(logprobs_V[best].tolist()))
        scores.append(entry if bool(np.isfinite(logprobs_V).all()) else None)
    return scores


def _sample_row(logits_V: torch.Tensor, draw: Draw) -> int:
    scores_V: Float64s = logits_V.cpu().numpy().astype(np.float64)
    _adjust(scores_V, draw)
    best = int(np.argmax(scores_V))
    if not np.isfinite(scores_V[best]):
        return NO_TOKEN
    if draw.temperature == 0.0:
        return best
    weights_V = np.exp((scores_V - scores_V[best]) / draw.temperature)
    ids = kept_ids(scores_V, weights_V, draw)
    return int(ids[inverse_cumulative(weights_V[ids], draw.random)])


def _adjust(scores_V: Float64s, draw: Draw) -> None:
    scores_V[list(draw.masked or ())] = -np.inf
    scores_V[list(draw.bias_ids or ())] += np.asarray(draw.bias or (), dtype=np.float64)
    if not draw.penalises:
        return
    tokens = np.asarray(draw.tokens or (), dtype=np.int64)
    seen = np.unique(tokens)
    with np.errstate(over="ignore"):  # an infinite logit is found by the caller
        penalised = np.where(scores_V[seen] > 0.0, scores_V[seen] / draw.repetition, scores_V[seen] * draw.repetition)
    if draw.repetition != 1.0:
        scores_V[seen] = penalised
    output, counts = np.unique(tokens[draw.num_prompt :], return_counts=True)
    scores_V[output] -= draw.frequency * counts + draw.presence


def kept_ids(scores_V: Float64s, weights_V: Float64s, draw: Draw) -> Ids:
    """The ids that min-p, then top-k, then top-p leave, ascending, at least one. Weights are in the scores' order."""
    ids: Ids = np.flatnonzero(weights_V >= draw.min_p)
    if 0 < draw.top_k < ids.size:
        ids = np.sort(ids[best_ids(scores_V[ids], draw.top_k)])
    if draw.top_p < 1.0:
        best = ids[best_ids(scores_V[ids], ids.size)]
        before = np.concatenate([[0.0], weights_V[best].cumsum()[:-1]])
        ids = np.sort(best[before < draw.top_p * weights_V[ids].cumsum()[-1]])
    return ids


def best_ids(scores: npt.NDArray[np.floating], count: int) -> Ids:
    """The indices of the `count` best scores, best first, the lower index first among equals."""
    best: Ids = np.argsort(-scores, kind="stable")[:count]
    return best


def inverse_cumulative(weights: Float64s, random: float) -> int:
    """The index at which the cumulative sum of unnormalised `weights` passes `random` of it. Never one of weight 0."""
    cumulative = weights.cumsum()
    # With 53 bits random is at most 1 - 2^-53, and its product with the total rounds to less than the total.
    return int(np.searchsorted(cumulative, random * cumulative[-1], side="right"))
