"""What a scheduler is told once, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """Rows of one step, sequences that hold cache at a time, and tokens (prompt and output) of one sequence."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerStats:
    """The state now, and counters since the start.

    `num_prefix_queries`: tokens of sequences that were looked up in the prefix cache, `num_prefix_hits`: those of them
    that were found; each sequence counts once, when it is first admitted. `num_not_finite`: sequences that ended
    because their logits were not finite.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_blocks_used: int
    num_preemptions: int
    num_prefix_queries: int
    num_prefix_hits: int
    num_not_finite: int
