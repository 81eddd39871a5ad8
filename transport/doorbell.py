"""How the ranks of one host wake each other.

A frame raises no signal: somebody has to look for it. A rank that looks again and again takes processor time from the
very rank whose frame it waits for, wherever ranks outnumber cores. So it lies down instead:

    who waits    says so in memory that all ranks share, looks once more, sleeps on its own pipe
    who sends    sends, and where the receiver has lain down, unsays it and writes a byte into that pipe

On processors that let a load overtake an older store, nothing here keeps the sender's look at the flag behind its
frame but the locks that MPI takes in between. A sleep is therefore never long.
"""

import contextlib
import mmap
import os
from pathlib import Path

_LINE = 64


class Doorbell:
    """A rank's own bell, and its hand at those of the others. The folder is theirs alone."""

    def __init__(self, folder: Path, rank: int, num_ranks: int) -> None:
        self._folder = folder
        self._own = rank * _LINE
        self._pipes: dict[int, int] = {}
        with contextlib.suppress(FileExistsError):
            os.mkfifo(self._path(rank), 0o600)
        self._pipe = os.open(self._path(rank), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        flags = os.open(folder / "asleep", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(flags, num_ranks * _LINE)
        self._asleep = mmap.mmap(flags, num_ranks * _LINE)
        os.close(flags)

    def fileno(self) -> int:
        """What to sleep on: readable once somebody has rung."""
        return self._pipe

    def lie_down(self) -> None:
        """From here on peers ring. Look once more before sleeping: a frame may have come just before."""
        self._asleep[self._own] = 1

    def get_up(self) -> None:
        """Peers need not ring any more."""
        self._asleep[self._own] = 0
        with contextlib.suppress(BlockingIOError):
            os.read(self._pipe, 4096)

    def ring(self, peer: int) -> None:
        """Wake the peer if it sleeps, or is about to. A peer that is gone hears nothing."""
        if not self._asleep[peer * _LINE]:
            return
        self._asleep[peer * _LINE] = 0
        with contextlib.suppress(OSError):
            os.write(self._open(peer), b"!")

    def close(self) -> None:
        """Hear no more."""
        for pipe in (self._pipe, *self._pipes.values()):
            os.close(pipe)
        self._pipes.clear()
        self._asleep.close()

    def _open(self, peer: int) -> int:
        pipe = self._pipes.get(peer)
        if pipe is None:
            pipe = os.open(self._path(peer), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._pipes[peer] = pipe
        return pipe

    def _path(self, rank: int) -> Path:
        return self._folder / f"bell.{rank}"
