"""From logits to tokens, a whole batch at once, each row by itself; and log-probabilities of given tokens.

Legend: B rows that are sampled, R rows that are scored, or have logits, V vocabulary, T rows, K inputs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from kernels import reference_sampling
from kernels.draw import BEST, Draw, TokenScore
from kernels.linear import PackedLinear, normed_linear
from kernels.runtime import native, require, runs_native

_BEST = BEST.pack()


def sample(logits_BV: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """A token, NOT_FINITE or NO_TOKEN for each row of logits, which are left as they were.

    Each row's token depends on that row and its draw alone. Raises ValueError on an id outside the vocabulary.
    """
    num_rows, vocab = len(draws), logits_BV.shape[1]
    require(logits_BV, "logits", (num_rows, None))
    if not runs_native(logits_BV):
        return reference_sampling.sample(logits_BV, draws)
    packed, tokens = _pack(draws), array("q", bytes(8 * num_rows))
    native.sample(logits_BV.data_ptr(), packed.buffer_info()[0], tokens.buffer_info()[0], num_rows, vocab)
    return tokens.tolist()


def sample_rows(
    x_TK: torch.Tensor,
    rows: Sequence[int],
    norm_K: torch.Tensor,
    packed: PackedLinear,
    draws: Sequence[Draw],
    *,
    eps: float,
    out: torch.Tensor,
) -> list[int]:
    """`normed_linear` of some rows of x, put into `out`, and `sample` of the first len(draws) of them; the same bits.

    Raises ValueError on a row that is not there (native only).
    """
    if packed.matrix is None:
        logits_RV = normed_linear(x_TK, rows, norm_K, packed, eps=eps, out=out)
        return sample(logits_RV[: len(draws)], draws)
    require(x_TK, "x", (None, packed.num_in))
    require(norm_K, "norm", (packed.num_in,))
    require(out, "out", (len(rows), packed.num_out))
    if len(draws) > len(rows):
        raise ValueError(f"{len(draws)} tokens are to be drawn from {len(rows)} rows")
    index, drawn, tokens = array("q", rows), _pack(draws), array("q", bytes(8 * len(draws)))
    native.sample_rows(
        packed.address,
        x_TK.data_ptr(),
        index.buffer_info()[0],
        len(rows),
        x_TK.shape[0],
        norm_K.data_ptr(),
        eps,
        out.data_ptr(),
        drawn.buffer_info()[0],
        len(draws),
        tokens.buffer_info()[0],
    )
    return tokens.tolist()


def _pack(draws: Sequence[Draw]) -> array[int]:
    return array("b", b"".join(_BEST if draw is BEST else draw.pack() for draw in draws))


def score(logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenScore | None]:
    """The token's score and the `num_top` best under log_softmax of each row; None where logits are not finite.

    Raises ValueError on an id outside the vocabulary.
    """
    num_rows, most = len(token_ids), max(num_top, default=0)
    require(logits_RV, "logits", (num_rows, None))
    if not runs_native(logits_RV):
        return reference_sampling.score(logits_RV, token_ids, num_top)
    given, wanted = array("q", token_ids), array("q", num_top)
    logprobs, ranks = array("f", bytes(4 * num_rows)), array("q", bytes(8 * num_rows))
    top_ids, top_logprobs = array("q", bytes(8 * num_rows * most)), array("f", bytes(4 * num_rows * most))
    native.score(
        logits_RV.data_ptr(),
        given.buffer_info()[0],
        wanted.buffer_info()[0],
        num_rows,
        logits_RV.shape[1],
        most,
        *(out.buffer_info()[0] for out in (logprobs, ranks, top_ids, top_logprobs)),
    )
    scores: list[TokenScore | None] = []
    for row, (logprob, rank, count) in enumerate(zip(logprobs, ranks, num_top, strict=True)):
        top = slice(row * most, row * most + min(count, logits_RV.shape[1]))
        entry = TokenScore(logprob, rank, tuple(top_ids[top]), tuple(top_logprobs[top]))
        scores.append(entry if logprob == logprob else None)
    return scores
