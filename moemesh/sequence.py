"""A sequence: one prompt being continued, as the scheduler keeps it, and what a step says of it. No tensors, no time.

A sequence has no phases, only counters: `num_computed` of its `num_tokens` tokens are in the cache. A token sampled
last is not computed yet, so a decoding sequence is one that lacks one token, and a prompt is one that lacks many.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Literal

from moemesh.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One token and, where they were asked for, its log-probabilities under the unmodified logits.

    `rank` is 1 + the number of tokens with a strictly greater log-probability. `top_ids` are the best, best first,
    lower id first among equals; the token itself need not be among them. Without log-probabilities `logprob` and
    `rank` are None.
    """

    token_id: int
    logprob: float | None = None
    rank: int | None = None
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()

    def to_wire(self) -> list[Any]:
        """`[token_id, logprob, rank, [top ids], [top logprobs]]`, or `[token_id]` without log-probabilities."""
        if self.logprob is None:
            return [self.token_id]
        return [self.token_id, self.logprob, self.rank, list(self.top_ids), list(self.top_logprobs)]

    @classmethod
    def from_wire(cls, wire: SequenceOf[Any]) -> Sampled:
        """The inverse of to_wire; ValueError if it is neither form."""
        if len(wire) == 1:
            return cls(token_id=wire[0])
        if len(wire) != 5 or len(wire[3]) != len(wire[4]):
            raise ValueError(
                f"a sampled token has 1 or 5 fields and as many ids as log-probabilities, not {list(wire)!r}"
            )
        token_id, logprob, rank, top_ids, top_logprobs = wire
        return cls(
            token_id=token_id, logprob=logprob, rank=rank, top_ids=tuple(top_ids), top_logprobs=tuple(top_logprobs)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingError:
    """A row that has no token, say because its logits are not numbers. Its sequence ends, its neighbours do not."""

    reason: str

    @property
    def not_finite(self) -> bool:
        """Whether the arithmetic has failed, and not what the request asks for."""
        return self in (LOGITS_NOT_FINITE, PROMPT_LOGITS_NOT_FINITE)


LOGITS_NOT_FINITE = SamplingError(reason="the model's logits are not finite")
PROMPT_LOGITS_NOT_FINITE = SamplingError(reason="the model's logits for the prompt are not finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceOutput:
    """What one step gave one sequence.

    - `position`: index in the sequence (prompt first) of `sampled`, or of the token that would have come.
    - `sampled`: None when the sequence ends without a token (`max_tokens` 0, or an error). When `finish_reason` is
      "stop" its token is the one that stopped the sequence.
    - `prompt_logprobs`: with the first output only: one entry per prompt token, None for the first, which nothing
      precedes.
    - `cached_tokens`: with the first output only: so many tokens of the prompt came from the prefix cache.
    - `error`: the sequence has ended for this reason, with no finish_reason.
    """

    seq_id: int
    position: int
    sampled: Sampled | None = None
    prompt_logprobs: tuple[Sampled | None, ...] | None = None
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the sequence's last output."""
        return self.finish_reason is not None or self.error is not None


def _no_tokens() -> array[int]:
    return array("i")


@dataclass(kw_only=True, slots=True)
class Sequence:
    """One prompt being continued. Owned and changed by one Scheduler (or one PlanMirror).

    `output_ids` given at construction are tokens the client already has (a restarted request): they are computed
    again as prefix, and count for max_tokens, min_tokens and the penalties. `prompt_logprobs[i]` is that of prompt
    token i + 1. Sequences with different `cache_salt` share no cache.
    """

    seq_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    eos_ids: frozenset[int] = frozenset()
    output_ids: list[int] = field(default_factory=list)
    cache_salt: str = ""
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    prompt_logprobs: list[Sampled] = field(default_factory=list)
    _history: array[int] = field(default_factory=_no_tokens, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens not in the cache yet."""
        return self.num_tokens - self.num_computed

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens at positions start <= position < stop, prompt first."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : stop - num_prompt]
        return [*self.prompt_ids[start:stop], *self.output_ids[max(start - num_prompt, 0) : max(stop - num_prompt, 0)]]

    def history(self) -> array[int]:
        """All tokens as int32, prompt first: kept, and extended by what is new, so that a step costs no whole copy."""
        if len(self._history) < self.num_tokens:
            self._history.extend(self.token_ids(len(self._history), self.num_tokens))
        return self._history

    def max_num_tokens(self, max_model_len: int) -> int:
        """The length at which the sequence ends at the latest."""
        if self.params.max_tokens is None:
            return max_model_len
        return min(len(self.prompt_ids) + self.params.max_tokens, max_model_len)

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Whether the sequence ends as it stands: "stop" after a stop token, else "length" at its limit."""
        params = self.params
        if self.output_ids and len(self.output_ids) >= params.min_tokens:
            last = self.output_ids[-1]
            if last in params.stop_token_ids or (last in self.eos_ids and not params.ignore_eos):
                return "stop"
        return "length" if self.num_tokens >= self.max_num_tokens(max_model_len) else None


def validate(sequence: Sequence, max_model_len: int) -> None:
    """ValueError if the sequence has nothing to compute, is too long, or had ended before it began."""
    num_prompt, name = len(sequence.prompt_ids), f"sequence {sequence.seq_id}"
    if num_prompt == 0:
        raise ValueError(f"{name} has an empty prompt: at least 1 token is needed")
    scores_only = sequence.params.max_tokens == 0
    longest = max_model_len if scores_only else max_model_len - 1
    if num_prompt > longest:
        raise ValueError(
            f"{name}: the prompt has {num_prompt} tokens, at most {longest} fit a context of {max_model_len}: "
            f"shorten the prompt"
        )
    if sequence.output_ids and sequence.finish_reason(max_model_len) is not None:
        raise ValueError(
            f"{name} has ended already: {len(sequence.output_ids)} tokens of at most {sequence.params.max_tokens} "
            f"were generated"
        )
