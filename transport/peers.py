"""What a link knows of each peer: which of its lives it talks with, and how far the two have got."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transport.flow_control import CreditWindow

if TYPE_CHECKING:
    from transport.buffers import WireBuffer
    from transport.frame import Kind, Label

Window = CreditWindow[tuple["Kind", "WireBuffer"]]

NEVER = -1
"""The incarnation of a peer that was never admitted."""


@dataclass(slots=True)
class Peer:
    """One peer. Its life is admitted (frames go both ways), lost (found dead: nothing is sent) or forgotten."""

    window: Window
    incarnation: int = NEVER
    admitted: bool = False
    lost: bool = False
    early: list[memoryview] = field(default_factory=list)
    """Frames of a life that is not admitted yet: peers learn of it at different moments."""

    @property
    def sendable(self) -> bool:
        return self.admitted and not self.lost

    def admit(self, incarnation: int, window: Window) -> None:
        """Talk with this life from here on."""
        if incarnation <= self.incarnation:
            raise ValueError(f"life {incarnation} cannot be admitted: life {self.incarnation} was")
        self.incarnation, self.window = incarnation, window
        self.admitted, self.lost = True, False

    def forget(self) -> int:
        """Talk with it no more; the number of frames that never left. What a later life sent stays."""
        self.admitted = False
        return len(self.window.clear())

    def hears(self, label: Label, own_incarnation: int) -> bool:
        """The frame goes between the two lives that talk."""
        return self.admitted and label.incarnation == self.incarnation and label.receiver_incarnation == own_incarnation

    def keep_early(self, label: Label, own_incarnation: int, data: memoryview, limit: int) -> bool:
        """Keep a frame of a later life for when that is admitted; False where it is to be dropped."""
        later = label.incarnation > self.incarnation and label.receiver_incarnation == own_incarnation
        if not later or len(self.early) >= limit:
            return False
        self.early.append(data)
        return True

    def take_early(self) -> list[memoryview]:
        """What was kept so far."""
        early, self.early = self.early, []
        return early
