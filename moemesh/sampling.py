"""Sampling: from logits to tokens, as a pure function of (logits, parameters, token history, seed, position).

Shape legend: B rows of a step that are sampled, R rows that want log-probabilities, V vocabulary.

What is done to the logits of a row, in vLLM's order: stop tokens are masked before `min_tokens`; logit bias;
repetition, frequency and presence penalty; then the best token, if greedy, else temperature, min-p, top-k, top-p and
a draw. Reported log-probabilities are those of the unmodified logits.

A row never sees its neighbours: everything but argmax and log_softmax (whose kernels are batch-invariant) is done row
by row, in float64, by numpy, which splits no row over threads. So a token depends neither on the batch nor on the
machine's load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

import kernels
from moemesh.random_numbers import uniform
from moemesh.sampling_params import SamplingParams
from moemesh.sequence import Sampled, SamplingError

Float64s = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRow:
    """What the sampling of one row depends on besides its logits. The id sequences are only read.

    `position` is the index that the new token will have in the sequence (prompt first); `seed` any integer, taken
    modulo 2^64.
    """

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    position: int
    seed: int
    eos_ids: frozenset[int] = frozenset()


def sample(
    logits_BV: torch.Tensor, logprobs_BV: torch.Tensor | None, rows: Sequence[SampleRow]
) -> list[Sampled | SamplingError]:
    """One token for each row of float32 logits; log-probabilities where the row's parameters ask for them.

    `logprobs_BV` is the raw log_softmax of the logits, or None to have it computed for the rows that need it. A row
    whose logits are not all finite, or whose tokens are all masked, gets a SamplingError; the other rows do not
    notice.
    """
    finite = _finite_rows(logits_BV)
    results: list[Sampled | SamplingError] = [SamplingError(reason="the model's logits are not finite")] * len(rows)
    plain = [i for i, row in enumerate(rows) if finite[i] and _takes_best_logit(row)]
    if plain:
        best = kernels.argmax(_select(logits_BV, plain)).tolist()
        for i, token_id in zip(plain, best, strict=True):
            results[i] = Sampled(token_id=token_id)
    for i, row in enumerate(rows):
        if finite[i] and not _takes_best_logit(row):
            results[i] = _sample_row(logits_BV[i], row)
    _add_logprobs(results, logits_BV, logprobs_BV, rows)
    return results


def prompt_logprobs(logits_RV: torch.Tensor, next_ids: Sequence[int], num_top: int) -> list[Sampled | SamplingError]:
    """Score the tokens that follow the rows (`next_ids`): log-probability, rank and the `num_top` best of each row."""
    finite = _finite_rows(logits_RV)
    scored = _token_logprobs(kernels.log_softmax(logits_RV), next_ids, [num_top] * len(next_ids))
    error = SamplingError(reason="the model's logits for the prompt are not finite")
    return [entry if ok else error for entry, ok in zip(scored, finite, strict=True)]


def _on_host(values: torch.Tensor) -> npt.NDArray[np.float32]:
    """The tensor as an array, without a copy if it is in main memory."""
    array: npt.NDArray[np.float32] = values.detach().cpu().numpy()
    return array


def _finite_rows(logits_BV: torch.Tensor) -> list[bool]:
    """Whether all logits of a row are numbers. Where they are: logits on a device are only fetched for a draw."""
    if logits_BV.device.type != "cpu":
        on_device: list[bool] = torch.isfinite(logits_BV).all(dim=1).tolist()
        return on_device
    finite_BV: npt.NDArray[np.bool_] = np.isfinite(_on_host(logits_BV))
    return [bool(finite_V.all()) for finite_V in finite_BV]


def _select(logits_BV: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """The rows at `indices` (ascending), without a copy if that is all of them."""
    return logits_BV if len(indices) == logits_BV.shape[0] else logits_BV[indices]


def _takes_best_logit(row: SampleRow) -> bool:
    return row.params.greedy and not _masks_stops(row) and not row.params.logit_bias and not _penalises(row.params)


def _masks_stops(row: SampleRow) -> bool:
    return len(row.output_ids) < row.params.min_tokens


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _sample_row(logits_V: torch.Tensor, row: SampleRow) -> Sampled | SamplingError:
    scores_V = _on_host(logits_V).astype(np.float64)
    error = _adjust(scores_V, row)
    if error is not None:
        return error
    if row.params.greedy:
        return Sampled(token_id=int(np.argmax(scores_V)))
    # The maximum becomes 0 before the division, so that a small temperature overflows nothing.
    scores_V -= scores_V.max()
    scores_V /= row.params.temperature
    weights_V = np.exp(scores_V)
    ids = kept_ids(scores_V, weights_V, row.params)
    u = uniform(row.seed, row.position)
    return Sampled(token_id=draw(weights_V, u) if ids is None else int(ids[draw(weights_V[ids], u)]))


def _adjust(scores_V: Float64s, row: SampleRow) -> SamplingError | None:
    """Mask, bias and penalties, in place."""
    vocab_size = scores_V.shape[0]
    if _masks_stops(row):
        stops = [i for i in {*row.eos_ids, *row.params.stop_token_ids} if i < vocab_size]
        scores_V[stops] = -np.inf
    for token_id, bias in (row.params.logit_bias or {}).items():
        if token_id >= vocab_size:
            return SamplingError(reason=f"logit_bias names token {token_id}, the vocabulary has {vocab_size}")
        scores_V[token_id] += bias
    if _penalises(row.params):
        _penalise(scores_V, row)
    if not np.isfinite(scores_V.max()):
        return SamplingError(reason="min_tokens, logit_bias and penalties together leave no token with a finite logit")
    return None


def _penalise(scores_V: Float64s, row: SampleRow) -> None:
    """vLLM's penalties: repetition over prompt and output, frequency and presence over the output alone."""
    output_ids, counts = np.unique(np.asarray(row.output_ids, dtype=np.int64), return_counts=True)
    if row.params.repetition_penalty != 1.0:
        seen = np.union1d(np.asarray(row.prompt_ids, dtype=np.int64), output_ids)
        penalty = row.params.repetition_penalty
        with np.errstate(over="ignore"):  # an infinite logit is found by the caller
            scores_V[seen] = np.where(scores_V[seen] > 0.0, scores_V[seen] / penalty, scores_V[seen] * penalty)
    scores_V[output_ids] -= row.params.frequency_penalty * counts + row.params.presence_penalty


def kept_ids(scores_V: Float64s, weights_V: Float64s, params: SamplingParams) -> Ids | None:
    """The token ids that min-p, then top-k, then top-p leave, ascending, at least one; None for all of them.

    `weights_V` are the unnormalised probabilities exp(scores_V), 1 for the best token. Min-p keeps weights of at least
    min_p; top-k the k best (the lower id among equals); top-p the shortest run of best tokens whose share of what is
    left reaches top_p.
    """
    top_k = params.top_k if params.top_k > 0 else scores_V.size
    if params.min_p == 0.0 and top_k >= scores_V.size and params.top_p == 1.0:
        return None
    ids: Ids = np.flatnonzero(weights_V >= params.min_p)
    if top_k < ids.size:
        ids = ids[_best(scores_V[ids], top_k)]
    if params.top_p < 1.0:
        ids = ids[_nucleus(scores_V[ids], weights_V[ids], params.top_p)]
    return np.sort(ids)


def _best(scores: npt.NDArray[np.floating], count: int) -> Ids:
    """The indices of the `count` best of 1 or more scores, best first, the lower index first among equals."""
    count = min(count, scores.size)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(scores, scores.size - count)[scores.size - count]
    # Ascending, and a few too many when others equal the last; a stable sort keeps equals in that order.
    indices = np.flatnonzero(scores >= threshold)
    best: Ids = indices[np.argsort(-scores[indices], kind="stable")[:count]]
    return best


def _nucleus(scores: Float64s, weights: Float64s, top_p: float) -> Ids:
    """The indices that top-p leaves. Sorts no more than it needs: a few hundred tokens mostly hold the nucleus."""
    needed = top_p * weights.cumsum()[-1]
    count = 256
    while True:
        best = _best(scores, count)
        before = np.concatenate([[0.0], weights[best].cumsum()])
        if before[-1] >= needed or best.size == scores.size:
            nucleus: Ids = best[before[:-1] < needed]
            return nucleus
        count *= 16


def draw(weights: Float64s, u: float) -> int:
    """The inverse of the cumulative distribution of unnormalised `weights`, in their order, at u in [0, 1): an index.

    Tokens stand in the order of their ids, not of their weights: that is cheaper, and a near tie between two of them
    cannot swap their places. A weight of 0 is never drawn.
    """
    cumulative = weights.cumsum()
    # With 53 bits u is at most 1 - 2^-53, and u * total rounds to less than the total: the index is never past the end.
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


def _add_logprobs(
    results: list[Sampled | SamplingError],
    logits_BV: torch.Tensor,
    logprobs_BV: torch.Tensor | None,
    rows: Sequence[SampleRow],
) -> None:
    """Replace the results of the rows that asked for log-probabilities by ones that have them."""
    wanted: list[int] = []
    token_ids: list[int] = []
    num_top: list[int] = []
    for i, (result, row) in enumerate(zip(results, rows, strict=True)):
        if isinstance(result, Sampled) and row.params.logprobs is not None:
            wanted.append(i)
            token_ids.append(result.token_id)
            num_top.append(row.params.logprobs)
    if not wanted:
        return
    if logprobs_BV is None:
        logprobs_RV = kernels.log_softmax(_select(logits_BV, wanted))
    else:
        logprobs_RV = _select(logprobs_BV, wanted)
    for i, entry in zip(wanted, _token_logprobs(logprobs_RV, token_ids, num_top), strict=True):
        results[i] = entry


def _token_logprobs(logprobs_RV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[Sampled]:
    """Log-probability, rank and best tokens for one token of each row. Only compares: exact whatever the batch."""
    entries: list[Sampled] = []
    for logprobs_V, token_id, count in zip(_on_host(logprobs_RV), token_ids, num_top, strict=True):
        best = _best(logprobs_V, count)
        entries.append(
            Sampled(
                token_id=token_id,
                logprob=float(logprobs_V[token_id]),
                rank=1 + int(np.count_nonzero(logprobs_V > logprobs_V[token_id])),
                top_ids=tuple(best.tolist()),
                top_logprobs=tuple(logprobs_V[best].tolist()),
            )
        )
    return entries
