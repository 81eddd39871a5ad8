"""Which rank of which run a process is, and whom it shares its host with."""

import os
from dataclasses import dataclass

import kernels
from moemesh.run_directory import RunDirectory
from transport.doorbell import Doorbell


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Rank `rank` of the `num_ranks` of `run`."""

    run: RunDirectory
    rank: int
    num_ranks: int

    @property
    def ranks_on_host(self) -> int:
        """As the launcher says."""
        return int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", self.num_ranks))

    @property
    def crowded(self) -> bool:
        """The ranks of this host have more threads than it has cores."""
        return self.ranks_on_host * kernels.num_threads() > len(os.sched_getaffinity(0))

    def doorbell(self) -> Doorbell | None:
        """None where there is no peer, or one that could not ring it."""
        if not 1 < self.num_ranks == self.ranks_on_host:
            return None
        return Doorbell(self.run.path, self.rank, self.num_ranks)
