"""The attention groups: who computes together, and with which cache. Part of membership; no I/O, no clock.

    whole --a member is lost--> fewer, same cache --a rank has come--> more, same cache
      any of these --a frame between members is lost--> the same, same cache
      any of these --the last member is lost, or one cannot go on so--> nobody --all are there that may come--> whole

Each change is a new generation.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesh_config.mesh import MeshConfig
from moemesh.membership_records import GroupView, Instruction, Regroup, RestartGroup
from moemesh.rank_record import RankRecord

_LOST = ("dead", "joining")


class AttentionGroups:
    """The groups of a mesh whose `ranks` somebody else keeps; `comes_back`: a lost rank will be replaced."""

    def __init__(self, mesh: MeshConfig, ranks: Sequence[RankRecord], *, comes_back: bool) -> None:
        self._mesh = mesh
        self._ranks = ranks
        self._comes_back = comes_back
        self._views = [GroupView(generation=0, members=members) for members in mesh.groups]

    @property
    def views(self) -> tuple[GroupView, ...]:
        """The groups as they are now."""
        return tuple(self._views)

    def serving(self) -> tuple[int, ...]:
        """Groups that can compute sequences."""
        return tuple(
            group
            for group, view in enumerate(self._views)
            if view.members and all(self._ranks[member].living for member in view.members)
        )

    def compute_without(self, rank: int) -> bool:
        """Something is left that computes sequences when this rank is lost."""
        return any(set(view.members) - {rank} for view in self._views)

    def follow(self) -> list[Instruction]:
        """Adapt every group to the ranks' states."""
        return [instruction for group in range(len(self._views)) for instruction in self._follow(group)]

    def _follow(self, group: int) -> list[Instruction]:
        view = self._views[group]
        gone = [member for member in view.members if self._ranks[member].state in _LOST]
        staying = tuple(member for member in view.members if member not in gone)
        come = tuple(r for r in self._mesh.groups[group] if r not in view.members and self._ranks[r].living)
        if gone and not staying:
            return [self.restart(group, self._why(gone[0]))]
        if gone:
            return [self._regroup(group, staying, self._why(gone[0]), lost=True)]
        if view.members and come:
            return [self._regroup(group, view.members + come, f"{self._ranks[come[0]].life} has come", lost=False)]
        if come and self._none_to_come(group):
            generation = view.generation + 1
            self._views[group] = GroupView(generation=generation, members=come, since=generation)
        return []

    def restart(self, group: int, reason: str) -> RestartGroup:
        """The group's cache is void."""
        generation = self._views[group].generation + 1
        self._views[group] = GroupView(generation=generation, members=(), since=generation)
        return RestartGroup(group, reason)

    def run_again(self, group: int, reason: str) -> Regroup:
        """The same members run the step under way again."""
        return self._regroup(group, self._views[group].members, reason, lost=False)

    def _regroup(self, group: int, members: tuple[int, ...], reason: str, *, lost: bool) -> Regroup:
        view = self._views[group]
        self._views[group] = GroupView(generation=view.generation + 1, members=members, since=view.since)
        return Regroup(group, reason, lost)

    def _why(self, rank: int) -> str:
        return f"{self._ranks[rank].life}: {self._ranks[rank].reason}"

    def _none_to_come(self, group: int) -> bool:
        """A group that begins anew waits for all of its ranks but those that will never come back: each has the heads
        of the start then, and needs no others."""
        records = [self._ranks[rank] for rank in self._mesh.groups[group]]
        return all(record.living or (record.ended and not self._comes_back) for record in records)
