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


class RowSampler:
    """Makes of hidden states x [T, K], T = `num_rows`, `normed_linear` of some rows, put into `out`, and `sample` of
    the first len(draws) of these; the same bits. What does not need x is done at once, while x is still to be computed.
    """

    def __init__(
        self,
        rows: Sequence[int],
        norm_K: torch.Tensor,
        packed: PackedLinear,
        draws: Sequence[Draw],
        *,
        num_rows: int,
        eps: float,
        out: torch.Tensor,
    ) -> None:
        if len(draws) > len(rows):
            raise ValueError(f"{len(draws)} tokens are to be drawn from {len(rows)} rows")
        require(norm_K, "norm", (packed.num_in,))
        require(out, "out", (len(rows), packed.num_out))
        self._rows, self._norm_K, self._packed, self._draws = rows, norm_K, packed, draws
        self._eps, self._out = eps, out
        self._shape_x = num_rows, packed.num_in
        if packed.matrix is None:
            return
        self._index, self._drawn, self._tokens = array("q", rows), _pack(draws), array("q", bytes(8 * len(draws)))
        drawn_at, tokens_at = self._drawn.buffer_info()[0], self._tokens.buffer_info()[0]
        places = *self._index.buffer_info(), num_rows
        self._words = *places, norm_K.data_ptr(), eps, out.data_ptr(), drawn_at, len(draws), tokens_at

    def run(self, x_TK: torch.Tensor) -> list[int]:
        """The tokens, as `sample` gives them. Raises ValueError on a row that is not there (native only)."""
        packed = self._packed
        require(x_TK, "x", self._shape_x)
        if packed.matrix is None:
            logits_RV = normed_linear(x_TK, self._rows, self._norm_K, packed, eps=self._eps, out=self._out)
            return sample(logits_RV[: len(self._draws)], self._draws)
        native.sample_rows(packed.address, x_TK.data_ptr(), *self._words)
        return self._tokens.tolist()


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
