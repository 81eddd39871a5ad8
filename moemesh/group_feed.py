"""Tells the leaders of attention groups what to compute: who has got its turn, who goes on, who is not wanted any more.

What cannot be told now, because a leader's queue is full or the group is coming together, is told at the next call.
"""

from __future__ import annotations

from collections.abc import Callable

from moemesh.admission import Admission
from moemesh.ledger import Ledger, LedgerEntry
from moemesh.mesh_control import MeshControl
from moemesh.metrics import Metrics
from moemesh.request_messages import submit_message
from transport import messages

MAX_REGROUP_TOKENS = 8 << 20
"""In one message; of more, the rest begins again."""


class GroupFeed:
    """Between the requests that admission lets go and the groups that membership knows."""

    def __init__(
        self,
        control: MeshControl,
        ledger: Ledger,
        admission: Admission,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._control = control
        self._ledger = ledger
        self._admission = admission
        self._metrics = metrics
        self._clock = clock
        # Groups that go on with other members, and whose leader has not been told their sequences yet.
        self._regrouping: set[int] = set()

    def serving_groups(self) -> tuple[int, ...]:
        """Groups that can compute: none of them can while experts are missing."""
        membership = self._control.membership
        return () if membership.missing_experts() else membership.serving_groups()

    def regroup(self, group: int) -> None:
        """The group goes on with other members: its leader is to be told all of its sequences before anything else."""
        self._regrouping.add(group)

    def lose(self, group: int) -> None:
        """The group has no sequences any more."""
        self._regrouping.discard(group)

    def give_out(self) -> None:
        """Send what waits to the groups that have room."""
        for group in sorted(self._regrouping):
            self._tell_sequences(group)
        if not self._admission.num_waiting:
            return
        groups = [group for group in self.serving_groups() if group not in self._regrouping]
        for entry in self._admission.take(groups, self._clock()):
            assert entry.group is not None
            if not self._control.send_leader(entry.group, submit_message(entry)):
                self._admission.put_back(entry)  # the next tick tries again
                return
            if entry.restarting:
                self._metrics.restarts.inc()

    def cancel(self, entry: LedgerEntry) -> None:
        """Nobody wants it any more."""
        if entry.group is not None:
            self._control.send_leader(entry.group, messages.Cancel(request_id=entry.request_id))

    def _tell_sequences(self, group: int) -> None:
        """Tell the leader of a group that has other members which sequences go on."""
        entries, room = self._ledger.entries_of(group), MAX_REGROUP_TOKENS
        for entry in entries:
            room -= entry.num_tokens
            if room < 0:
                entry.group, entry.restarting = None, True
                self._admission.restart([entry])
        sequences = [submit_message(entry) for entry in entries if entry.group == group]
        generation = self._control.membership.view.groups[group].generation
        if self._control.send_leader(group, messages.Regroup(generation, sequences)):
            self._regrouping.discard(group)
