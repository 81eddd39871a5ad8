"""Where frames wait for the work that needs them.

Fencing is by generation, which changes only with the membership of the receiver's own group: a frame of an older
generation is dropped, one of a newer one waits until the rank has got there. Within a generation steps only grow. Pure.
"""

from collections.abc import Iterable
from typing import NamedTuple

from transport.frame import Frame, Kind


class MailKey(NamedTuple):
    """What a waiting computation asks for. The attempt is not in it: whichever answer comes first is the answer."""

    kind: Kind
    generation: int
    step: int
    layer: int
    micro_batch: int
    phase: int
    sender: int


def key_of(frame: Frame) -> MailKey:
    """The key under which a frame is kept."""
    header = frame.header
    return MailKey(
        header.kind,
        header.generation,
        header.step,
        header.layer,
        header.micro_batch,
        header.phase,
        header.sender,
    )


class Mailbox:
    """Frames by key; each key is accepted once. `dropped` and `duplicates` count what was refused."""

    def __init__(self) -> None:
        self._frames: dict[MailKey, Frame] = {}
        self._taken: set[MailKey] = set()
        self._floor = (0, 0)
        self.dropped = 0
        self.duplicates = 0

    @property
    def num_waiting(self) -> int:
        """Frames that nobody took yet."""
        return len(self._frames)

    def deliver(self, frame: Frame) -> None:
        """Keep the frame until it is taken. Late frames and duplicates are dropped, never an error."""
        key = key_of(frame)
        if (key.generation, key.step) < self._floor:
            self.dropped += 1
        elif key in self._frames or key in self._taken:
            self.duplicates += 1
        else:
            self._frames[key] = frame

    def take(self, key: MailKey) -> Frame | None:
        """The frame under `key`, once; None while it is not there."""
        frame = self._frames.pop(key, None)
        if frame is not None:
            self._taken.add(key)
        return frame

    def has(self, keys: Iterable[MailKey]) -> bool:
        """All of them are there."""
        return all(key in self._frames for key in keys)

    def missing(self, keys: Iterable[MailKey]) -> list[MailKey]:
        """Those that are not there."""
        return [key for key in keys if key not in self._frames]

    def discard(self, generation: int, step: int = 0) -> None:
        """Everything before (generation, step) is over: drop it, and refuse it from now on.

        To be called whenever a step ends: the memory of what was taken is kept until then.
        """
        floor = (generation, step)
        if floor < self._floor:
            raise ValueError(f"mailbox is at (generation, step) {self._floor} and cannot go back to {floor}")
        self._floor = floor
        if not self._frames and not self._taken:
            return
        stale = [key for key in self._frames if (key.generation, key.step) < floor]
        for key in stale:
            del self._frames[key]
        self.dropped += len(stale)
        self._taken = {key for key in self._taken if (key.generation, key.step) >= floor}
