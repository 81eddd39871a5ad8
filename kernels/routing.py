"""The choice of experts for each token.

Legend: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from kernels import reference
from kernels.linear import PackedLinear, linear
from kernels.runtime import native, require, runs_native

Scoring = Literal["sigmoid", "softmax"]
Method = Literal["greedy", "group_limited_greedy", "noaux_tc"]
_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")  # numbered as in csrc/kernels.h


def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    *,
    num_groups: int,
    topk_groups: int,
    top_k: int,
    scoring: Scoring,
    method: Method,
    normalize: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids_TK int32, weights_TK float32) of the chosen experts, in descending order of the score that chose them.

    Scores are the sigmoid or softmax of the logits; noaux_tc adds the bias for the choice alone. noaux_tc ranks a
    group by the sum of its two best, group_limited_greedy by its best, and experts outside the best topk_groups
    groups count as -inf or 0; greedy ignores groups. Of equals the lowest index comes first. Weights are the scores
    without bias, divided by their sum if `normalize`, times `scale`. Sources: DeepSeek-V2 (arXiv 2405.04434, 2.1.3)
    and DeepSeek-V3 (arXiv 2412.19437, 2.1.2).
    """
    require(logits_TE, "logits", (None, None))
    num_rows, num_experts = logits_TE.shape
    if bias_E is not None:
        require(bias_E, "bias", (num_experts,))
    _check_choice(num_experts, num_groups, topk_groups, top_k)
    _check_rule(method, scoring)
    bias_E = bias_E if method == "noaux_tc" else None
    if not runs_native(logits_TE):
        return reference.route(
            logits_TE,
            bias_E,
            num_groups=num_groups,
            topk_groups=topk_groups,
            top_k=top_k,
            scoring=scoring,
            method=method,
            normalize=normalize,
            scale=scale,
        )
    ids_TK = torch.empty((num_rows, top_k), dtype=torch.int32)
    weights_TK = torch.empty((num_rows, top_k))
    native.route(
        logits_TE.data_ptr(),
        0 if bias_E is None else bias_E.data_ptr(),
        ids_TK.data_ptr(),
        weights_TK.data_ptr(),
        num_rows,
        num_experts,
        num_groups,
        topk_groups,
        top_k,
        int(scoring == "softmax"),
        _METHODS.index(method),
        int(normalize),
        scale,
    )
    return ids_TK, weights_TK


@dataclass(frozen=True, kw_only=True, eq=False)
class Gate:
    """A router's weight [E, H] and its rule, as `route` has it; checked once, here. Raises ValueError."""

    weight: PackedLinear
    bias_E: torch.Tensor | None
    num_groups: int
    topk_groups: int
    top_k: int
    scoring: Scoring
    method: Method
    normalize: bool
    scale: float
    rule: tuple[int | float, ...] = field(init=False, repr=False)  # as csrc/kernels.h has it in Route

    def __post_init__(self) -> None:
        num_experts = self.weight.num_out
        _check_rule(self.method, self.scoring)
        _check_choice(num_experts, self.num_groups, self.topk_groups, self.top_k)
        if self.bias_E is not None:
            require(self.bias_E, "bias", (num_experts,))
        rule = (
            *(num_experts, self.num_groups, self.topk_groups, self.top_k),
            *(int(self.scoring == "softmax"), _METHODS.index(self.method), int(self.normalize), self.scale),
        )
        object.__setattr__(self, "rule", rule)

    def choose(self, x_TH: torch.Tensor, counts_E: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`route` of x W^T, the same bits; `counts_E` (int64, on the CPU) gets 1 for each choice of an expert."""
        num_rows = x_TH.shape[0]
        if counts_E is not None:
            require(counts_E, "counts", (self.weight.num_out,), torch.int64)
        if self.weight.matrix is None:
            return self._composed(x_TH, counts_E)
        require(x_TH, "x", (num_rows, self.weight.num_in))
        ids_TK = torch.empty((num_rows, self.top_k), dtype=torch.int32)
        weights_TK = torch.empty((num_rows, self.top_k))
        native.gate(
            self.weight.address,
            x_TH.data_ptr(),
            0 if self.bias_E is None or self.method != "noaux_tc" else self.bias_E.data_ptr(),
            ids_TK.data_ptr(),
            weights_TK.data_ptr(),
            0 if counts_E is None else counts_E.data_ptr(),
            num_rows,
            *self.rule,
        )
        return ids_TK, weights_TK

    def _composed(self, x_TH: torch.Tensor, counts_E: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        ids_TK, weights_TK = route(
            linear(x_TH, self.weight),
            self.bias_E,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            top_k=self.top_k,
            scoring=self.scoring,
            method=self.method,
            normalize=self.normalize,
            scale=self.scale,
        )
        if counts_E is not None:
            counts_E += ids_TK.cpu().flatten().bincount(minlength=counts_E.shape[0])
        return ids_TK, weights_TK


def _check_rule(method: str, scoring: str) -> None:
    if method not in _METHODS or scoring not in ("sigmoid", "softmax"):
        raise ValueError(f"method {method!r} with scoring {scoring!r} is not known; methods are {_METHODS}")


def _check_choice(num_experts: int, num_groups: int, topk_groups: int, top_k: int) -> None:
    if num_groups < 1 or num_experts % num_groups or not 1 <= topk_groups <= num_groups:
        raise ValueError(f"cannot take {topk_groups} of {num_groups} groups of {num_experts} experts")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, must be 1 to {num_experts}, the number of experts")
