"""Which life of which rank a process begins as, who started it, and whom it shares its host with."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moemesh.mpi_launch import mpi_launch
from moemesh.run_directory import RunDirectory
from transport.doorbell import Doorbell
from transport.life import Life


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Life `incarnation` of rank `rank` of the `num_ranks` of `run`: the `local_rank`-th of its host's.

    `parent`: the process that spawned it, by the life that it began as; None for one that mpirun started.
    """

    run: RunDirectory
    rank: int
    num_ranks: int
    local_rank: int
    ranks_on_host: int
    incarnation: int = 0
    parent: Life | None = None

    @classmethod
    def of_launch(cls, run: RunDirectory, environment: Mapping[str, str], incarnation: int = 0) -> RankPlace:
        """What the launcher says in the environment."""
        rank, num_ranks = mpi_launch(environment) or (0, 1)
        return cls(
            run=run,
            rank=rank,
            num_ranks=num_ranks,
            local_rank=int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", 0)),
            ranks_on_host=int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", num_ranks)),
            incarnation=incarnation,
        )

    @classmethod
    def of_newcomer(cls, run: RunDirectory, document: Sequence[int]) -> RankPlace:
        """The inverse of `newcomer_command`."""
        rank, num_ranks, local_rank, ranks_on_host, incarnation, parent, parent_incarnation = document
        return cls(
            run=run,
            rank=rank,
            num_ranks=num_ranks,
            local_rank=local_rank,
            ranks_on_host=ranks_on_host,
            incarnation=incarnation,
            parent=Life(parent, parent_incarnation),
        )

    @property
    def life(self) -> Life:
        """The life that the process begins as."""
        return Life(self.rank, self.incarnation)

    def newcomer_command(self, life: Life, *, local_rank: int, ranks_on_host: int) -> list[str]:
        """What to spawn, that it may begin as `life` of another rank."""
        place = (life.rank, self.num_ranks, local_rank, ranks_on_host, life.incarnation, *self.life)
        module = [sys.executable, "-P", "-m", "moemesh.rank_process"]
        return [*module, "--run-directory", str(self.run.path), "--newcomer", *map(str, place)]

    def crowded(self, num_threads: int) -> bool:
        """The ranks of this host, with so many threads each, have more than it has cores."""
        return self.ranks_on_host * num_threads > len(os.sched_getaffinity(0))

    def doorbell(self) -> Doorbell | None:
        """None where there is no peer, or one that could not ring it."""
        if not 1 < self.num_ranks == self.ranks_on_host:
            return None
        return Doorbell(self.run.path, self.rank, self.num_ranks)
