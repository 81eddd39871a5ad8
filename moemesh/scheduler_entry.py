"""What a scheduler keeps of each sequence, and a plan in the making."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from moemesh.cached_prefix import CachedPrefix
from moemesh.sequence import Sequence
from moemesh.step_plan import AdmittedSequence, ScheduledSequence


class State(Enum):
    """See the drawing in scheduler.py."""

    WAITING = "waiting"
    RUNNING = "running"
    IN_FLIGHT = "in flight"
    CANCELLED = "cancelled"


@dataclass(kw_only=True, slots=True, eq=False)
class Entry:
    """A sequence and what only the scheduler knows of it. `told`: the mirrors know it, `num_*_told`: so much of it.

    `num_cached`: how much of the sequence the prefix cache had when it was first admitted; None until then.
    """

    sequence: Sequence
    prefix: CachedPrefix
    priority: tuple[bool, int]
    max_blocks: int
    wants_prompt_logprobs: bool
    state: State = State.WAITING
    told: bool = False
    num_blocks_told: int = 0
    num_tokens_told: int = 0
    num_cached: int | None = None

    @property
    def looks_up(self) -> bool:
        """Whether it may begin with cached blocks."""
        return self.prefix.enabled and not self.wants_prompt_logprobs

    def wanted_prompt_logprobs(self, start: int, stop: int) -> tuple[int, int]:
        """Positions start <= p < stop whose rows score a prompt token not scored before; (0, 0) if there is none."""
        if not self.wants_prompt_logprobs:
            return 0, 0
        first = max(start, len(self.sequence.prompt_logprobs))
        last = min(stop, len(self.sequence.prompt_ids) - 1)
        return (first, last) if first < last else (0, 0)

    def __str__(self) -> str:
        s = self.sequence
        return (
            f"sequence {s.seq_id} ({self.state.value}, {s.num_computed} of {s.num_tokens} tokens computed, "
            f"{len(s.block_table)} blocks)"
        )


@dataclass(slots=True)
class Draft:
    """A plan in the making: the rows still to be given away, and the items so far."""

    budget: int
    items: list[ScheduledSequence] = field(default_factory=list)
    admitted: list[AdmittedSequence] = field(default_factory=list)


def priority_of(entry: Entry) -> tuple[bool, int]:
    """Older ones first."""
    return entry.priority
