"""Sampling: from logits to tokens, as a pure function of (logits, parameters, token history, seed, position).

Shape legend: B rows of a step that are sampled, R rows that want log-probabilities, V vocabulary.

What is done to the logits of a row, in vLLM's order: stop tokens are masked before `min_tokens`; logit bias;
repetition, frequency and presence penalty; then the best token, if greedy, else temperature, min-p, top-k, top-p and
a draw (`kernels.Draw` says it exactly). Reported log-probabilities are those of the unmodified logits.

All rows are sampled at once, and none sees its neighbours: a token depends neither on the batch nor on the machine's
load.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch

import kernels
from moemesh.random_numbers import uniform
from moemesh.sampling_params import SamplingParams
from moemesh.sequence import LOGITS_NOT_FINITE, PROMPT_LOGITS_NOT_FINITE, Sampled, SamplingError, Sequence

_ERRORS = {
    kernels.NOT_FINITE: LOGITS_NOT_FINITE,
    kernels.NO_TOKEN: SamplingError(
        reason="min_tokens, logit_bias and penalties together leave no token with a finite logit"
    ),
}


class SampleRow(NamedTuple):
    """What the sampling of one row depends on besides its logits: the sequence as it stands, which is only read, and
    the index that the new token will have in it."""

    sequence: Sequence
    position: int


def draws_of(rows: SequenceOf[SampleRow], vocab_size: int) -> list[kernels.Draw]:
    """How each row is sampled."""
    return [_draw(row, vocab_size) for row in rows]


def describe_samples(
    tokens: SequenceOf[int], logits_RV: torch.Tensor, rows: SequenceOf[SampleRow]
) -> list[Sampled | SamplingError]:
    """What was sampled from the first rows of logits, with log-probabilities where the row's parameters ask for them.

    A row whose logits are not all finite, or whose tokens are all masked, gets a SamplingError; the other rows do not
    notice.
    """
    results: list[Sampled | SamplingError] = []
    wanted: list[int] = []
    for i, (token_id, row) in enumerate(zip(tokens, rows, strict=True)):
        params = row.sequence.params
        if token_id < 0:
            results.append(_ERRORS[token_id])
        elif params.logit_bias and (outside := _biased_outside(params, logits_RV.shape[1])):
            results.append(outside)
        else:
            results.append(Sampled(token_id=token_id))
            if params.logprobs is not None:
                wanted.append(i)
    if wanted:
        _add_logprobs(results, logits_RV, rows, wanted)
    return results


def prompt_logprobs(
    logits_RV: torch.Tensor, next_ids: SequenceOf[int], num_top: SequenceOf[int]
) -> list[Sampled | SamplingError]:
    """Score the tokens that follow the rows: log-probability, rank and the row's `num_top` best."""
    scores = kernels.score(logits_RV, next_ids, num_top)
    return [
        PROMPT_LOGITS_NOT_FINITE if score is None else _scored(token_id, score)
        for token_id, score in zip(next_ids, scores, strict=True)
    ]


def _draw(row: SampleRow, vocab_size: int) -> kernels.Draw:
    sequence, params = row.sequence, row.sequence.params
    masks_stops = len(sequence.output_ids) < params.min_tokens
    penalises = params.penalises
    if params.greedy and not (masks_stops or penalises or params.logit_bias):
        return kernels.BEST
    bias = {i: value for i, value in (params.logit_bias or {}).items() if i < vocab_size}
    stops = [i for i in {*sequence.eos_ids, *params.stop_token_ids} if i < vocab_size] if masks_stops else []
    return kernels.Draw(
        temperature=0.0 if params.greedy else params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        frequency=params.frequency_penalty,
        presence=params.presence_penalty,
        random=0.0 if params.greedy else uniform(sequence.seed, row.position),
        top_k=max(params.top_k, 0),
        tokens=sequence.history() if penalises else None,
        num_prompt=len(sequence.prompt_ids) if penalises else 0,
        masked=array("i", stops) if stops else None,
        bias_ids=array("i", bias) if bias else None,
        bias=array("d", bias.values()) if bias else None,
    )


def _biased_outside(params: SamplingParams, vocab_size: int) -> SamplingError | None:
    outside = [token_id for token_id in params.logit_bias or () if token_id >= vocab_size]
    if not outside:
        return None
    return SamplingError(reason=f"logit_bias names token {outside[0]}, the vocabulary has {vocab_size}")


def _add_logprobs(
    results: list[Sampled | SamplingError],
    logits_RV: torch.Tensor,
    rows: SequenceOf[SampleRow],
    wanted: SequenceOf[int],
) -> None:
    """Replace the tokens of the rows at `wanted` by ones that have their log-probabilities."""
    token_ids = [result.token_id for i in wanted if isinstance(result := results[i], Sampled)]
    chosen_RV = logits_RV if len(wanted) == logits_RV.shape[0] else logits_RV[wanted]
    scores = kernels.score(chosen_RV, token_ids, [rows[i].sequence.params.logprobs or 0 for i in wanted])
    for i, token_id, score in zip(wanted, token_ids, scores, strict=True):
        assert score is not None, "a token was sampled from logits that are not finite"
        results[i] = _scored(token_id, score)


def _scored(token_id: int, score: kernels.TokenScore) -> Sampled:
    return Sampled(
        token_id=token_id,
        logprob=score.logprob,
        rank=score.rank,
        top_ids=score.top_ids,
        top_logprobs=score.top_logprobs,
    )
