"""One life of a rank: its number, and which process (or which of a process's lives) bears it."""

from typing import NamedTuple


class Life(NamedTuple):
    """`incarnation` counts the lives of `rank` from 0. Who is replaced, or comes back after a stop, has a new one."""

    rank: int
    incarnation: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.incarnation == 0 else f"rank {self.rank} (life {self.incarnation})"
