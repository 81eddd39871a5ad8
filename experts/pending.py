"""A call for the experts of one layer while its answers come: in parts, each of which may be asked for again.

    part:   open --(a rank is asked: `asked` has an entry)--> under way --(its answer)--> answered
              ^                                                  |
              +---(the rank is gone, refuses, or is too slow)----+      under way may be several ranks at once

An answer is a pure function of what was asked, so the first one counts, whoever gave it. What comes for a part that has
its answer changes nothing. A part that is asked for again goes out slot by slot, since its experts may have different
hosts by then; its rows are put together in the order that the first host would have had.

Shape legend: T tokens, H hidden, K experts per token, S slots of a part, n its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experts.compact import weighted_rows
from transport.dispatch import Dispatch, ExpertCall, dispatch_tensors

Slots = NDArray[np.intp]
"""Which of a part's slots: indices into them."""


@dataclass(slots=True, eq=False)
class Asked:
    """A rank that was asked for a part (`slots` None: all of it, as the dispatch planned it) and has not answered."""

    rank: int
    incarnation: int
    part: int
    slots: Slots | None
    num_slots: int
    sent: float
    patience: float
    allowed: float = inf  # seconds
    deadline: float = inf
    late: bool = False  # missed its deadline, and was asked of somebody else, or again


@dataclass(slots=True, eq=False)
class _Part:
    """What has come for one part. `rows_SH` and `missing` only where it was asked for in pieces."""

    answer: Tensor | None = None
    rows_SH: Tensor | None = None
    missing: NDArray[np.bool_] | None = None


@dataclass(eq=False, kw_only=True)
class PendingCall:
    """The parts of one call, by the place of their rank in `dispatch.destinations`.

    `weights_TK` asks for compact answers (one weighted row per token) where a whole part is asked for.
    """

    layer: int
    x_TH: Tensor
    dispatch: Dispatch
    weights_TK: Tensor | None
    asked: dict[tuple[int, int], Asked] = field(default_factory=dict)
    retry_at: float = inf
    attempts: int = 0

    def __post_init__(self) -> None:
        self._parts = [_Part() for _ in self.dispatch.destinations]
        self._unanswered = len(self._parts)

    def ready(self) -> bool:
        """Whether every part has its answer."""
        return not self._unanswered

    def answers(self) -> list[Tensor]:
        """Of all parts in turn."""
        return [part.answer for part in self._parts if part.answer is not None]

    def question(self, part: int, slots: Slots | None) -> tuple[ExpertCall, Tensor | None]:
        """What to ask for a part or some slots of it, and the weights for a compact answer."""
        planned = self.dispatch.parts[part]
        if slots is None:
            return ExpertCall(*dispatch_tensors(self.x_TH, planned)), self._weights_S(part)
        tokens, slot_row = np.unique(planned.slot_row.numpy()[slots], return_inverse=True)
        rows = self.x_TH.index_select(0, planned.token_index[torch.from_numpy(tokens).long()])
        slot_expert = planned.slot_expert[torch.from_numpy(slots)]
        return ExpertCall(rows, torch.from_numpy(slot_row.astype(np.int32)), slot_expert), None

    def open_slots(self, part: int, *, of: Asked | None = None) -> Slots:
        """The slots of a part (or those that one rank was asked for) that have no answer, and that nobody is asked for
        who is in time."""
        state = self._parts[part]
        is_open = np.zeros(self.num_slots(part), dtype=np.bool_)
        if state.answer is None:
            is_open[slice(None) if of is None or of.slots is None else of.slots] = True
        if state.missing is not None:
            is_open &= state.missing
        for asked in self.asked_for(part):
            if not asked.late:
                is_open[slice(None) if asked.slots is None else asked.slots] = False
        return np.flatnonzero(is_open)

    def experts_of(self, part: int, slots: Slots) -> list[int]:
        """The logical expert of each of the slots."""
        experts: list[int] = self.dispatch.parts[part].slot_expert.numpy()[slots].tolist()
        return experts

    def num_slots(self, part: int) -> int:
        return self.dispatch.parts[part].slot_expert.shape[0]

    def asked_for(self, part: int) -> Iterable[Asked]:
        """Who is asked for something of a part."""
        return [asked for asked in self.asked.values() if asked.part == part]

    def next_attempt(self) -> int:
        """The number of the next question that is asked again."""
        self.attempts += 1
        return self.attempts

    def earliest(self) -> float:
        """When the first answer is late, or something is to be tried again."""
        return min(self.retry_at, min((asked.deadline for asked in self.asked.values()), default=inf))

    def take(self, name: tuple[int, int], answer: Tensor) -> None:
        """Take in an answer of this rank's own experts."""
        asked = self.asked.pop(name, None)
        if asked is not None:
            self.accept(asked, (answer,))

    def accept(self, asked: Asked, tensors: Sequence[Tensor]) -> bool:
        """Take an answer in; False where it is not what was asked for, or was there already."""
        part = self._parts[asked.part]
        if part.answer is not None or not self.fits(asked, tensors):
            return False
        rows = tensors[0]
        if asked.slots is None:
            part.answer = rows.to(self.x_TH.device)
        else:
            self._fill(part, asked, rows)
        self._unanswered -= part.answer is not None
        return True

    def fits(self, asked: Asked, tensors: Sequence[Tensor]) -> bool:
        """Whether an answer has the form of what was asked for."""
        compact = asked.slots is None and self.weights_TK is not None
        num_rows = self.dispatch.parts[asked.part].token_index.shape[0] if compact else asked.num_slots
        return (
            len(tensors) == 1
            and tensors[0].dtype is torch.float32
            and tuple(tensors[0].shape) == (num_rows, self.x_TH.shape[1])
        )

    def _fill(self, part: _Part, asked: Asked, rows: Tensor) -> None:
        assert asked.slots is not None
        if part.missing is None or part.rows_SH is None:
            part.missing = np.ones(self.num_slots(asked.part), dtype=np.bool_)
            part.rows_SH = self.x_TH.new_empty((self.num_slots(asked.part), self.x_TH.shape[1]))
        part.rows_SH[torch.from_numpy(asked.slots)] = rows.to(part.rows_SH.device)
        part.missing[asked.slots] = False
        if not part.missing.any():
            part.answer = self._finished(asked.part, part.rows_SH)

    def _finished(self, part: int, rows_SH: Tensor) -> Tensor:
        """The rows of all slots as the part's host would have answered them."""
        weights_S = self._weights_S(part)
        if weights_S is None:
            return rows_SH
        call, _ = self.question(part, None)
        return weighted_rows(rows_SH, call, weights_S)

    def _weights_S(self, part: int) -> Tensor | None:
        if self.weights_TK is None:
            return None
        return self.weights_TK.reshape(-1).cpu()[self.dispatch.parts[part].slot_pos.long()]
