"""How a row of logits is sampled, and what is said of a token: records that both twins of sampling share."""

from __future__ import annotations

import struct
from array import array
from typing import NamedTuple

NOT_FINITE, NO_TOKEN = -1, -2
"""In place of a token: the row's logits are not all finite; masks, bias and penalties leave none that is."""

_DRAW = struct.Struct("=7d9q")  # struct Draw of csrc/kernels.h


class Draw(NamedTuple):
    """How one row is sampled; everything in double. What is done, in vLLM's order:

    - the logits of `masked` ids become -inf; `bias` is added to those of `bias_ids`;
    - `repetition` divides the positive logits of all ids in `tokens` and multiplies the others; `frequency` times its
      count among the output (`tokens` from `num_prompt` on), and `presence`, are subtracted from each id of the output;
    - temperature 0: the best token, the lowest id of equals, and that is all;
    - a token's weight is exp((logit - the greatest) / `temperature`); `min_p` keeps those of at least min_p, `top_k`
      (0: all) the k best of them (the lower id among equals), `top_p` the shortest run of best tokens whose share of
      what is left reaches it;
    - the inverse of the cumulative distribution of what is left, in the order of ids, at `random` in [0, 1).

    Arrays of ids hold int32 ("i"), `bias` doubles.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    random: float = 0.0
    top_k: int = 0
    tokens: array[int] | None = None
    num_prompt: int = 0
    masked: array[int] | None = None
    bias_ids: array[int] | None = None
    bias: array[float] | None = None

    @property
    def penalises(self) -> bool:
        """Whether the history plays a part."""
        return self.repetition != 1.0 or self.frequency != 0.0 or self.presence != 0.0

    def pack(self) -> bytes:
        """For the C kernels; the arrays must outlive it."""
        tokens_at, num_tokens = _place(self.tokens)
        bias_ids_at, num_bias = _place(self.bias_ids)
        history = tokens_at, self.num_prompt, num_tokens
        return _DRAW.pack(*self[:8], *history, *_place(self.masked), bias_ids_at, _place(self.bias)[0], num_bias)


def _place(values: array[int] | array[float] | None) -> tuple[int, int]:
    return (0, 0) if values is None else values.buffer_info()


BEST = Draw()
"""The best logit as it stands."""


class TokenScore(NamedTuple):
    """A token's log-probability, its rank (1 + the number of greater ones) and the best tokens, best first, the lower
    id first among equals."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]
