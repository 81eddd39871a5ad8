"""What happened in one run: the story for people, and what the checker judges."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moemesh.controller import Controller
from moemesh.engine_client import GenerationRequest, TokenLogprob
from tests.simulation.virtual_time import VirtualTime
from transport import messages
from transport.life import Life

if TYPE_CHECKING:
    from tests.simulation.control_plane import VirtualServer


@dataclass(kw_only=True)
class Stream:
    """What one client has got, and how it ended: `finish` says why it was complete, `error` what it was told."""

    name: str
    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    cancelled: bool = False

    @property
    def endings(self) -> int:
        """In how many ways it has ended: exactly one is right."""
        return (self.finish is not None) + (self.error is not None) + self.cancelled


class History:
    """The record of one run."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        self.story: list[tuple[float, str]] = []
        self.streams: list[Stream] = []
        self.complaints: list[str] = []
        self.deaths: list[str] = []
        self._epochs: dict[Life, int] = {}
        self._last_epoch = 0
        # By (request, position): the lives and generations of the group whose token for it was believed.
        self._believed: dict[tuple[int, int], set[tuple[Life, object]]] = defaultdict(set)

    def tell(self, event: str) -> None:
        self.story.append((self._time.now, event))

    def complain(self, complaint: str) -> None:
        self.tell(f"!!! {complaint}")
        self.complaints.append(complaint)

    def view_sent(self, life: Life, view: messages.View) -> None:
        """Epochs grow, and for each recipient one by one."""
        if view.epoch < self._last_epoch or view.epoch <= self._epochs.get(life, -1):
            self.complain(f"epoch {view.epoch} is sent to {life} after epoch {self._last_epoch}")
        self._last_epoch = self._epochs[life] = view.epoch

    def believed(self, life: Life, generation: object, item: messages.OutputItem) -> None:
        """The frontend has taken an output for true."""
        for offset in range(len(item.token_ids)):
            key = (item.request_id, item.position + offset)
            self._believed[key].add((life, generation))
            if len(self._believed[key]) > 1:
                self.complain(f"position {key[1]} of request {key[0]} is believed of {sorted(self._believed[key])}")

    def controller_type(self, server: VirtualServer, **arguments: Any) -> WatchedController:
        """The production controller, and what is to be recorded of it."""
        return WatchedController(server, self, **arguments)


class WatchedController(Controller):
    """The production controller; what it believes goes into a history."""

    def __init__(self, server: VirtualServer, history: History, **arguments: Any) -> None:
        super().__init__(server, **arguments)
        self._virtual, self._history = server, history
        self._speaker = Life(0)

    def present(self, rank: int) -> Life:
        """The rank's present life."""
        return self._control.membership.present(rank)

    def believes(self, life: Life) -> bool:
        return self._control.membership.believes(life)

    def state(self, rank: int) -> str:
        return self._control.membership.view.ranks[rank].state

    def leftovers(self) -> dict[str, int]:
        """What the frontend holds for requests."""
        waiting = self._admission.num_waiting
        return {"ledger": len(self._ledger), "streams": len(self._streams), "waiting": waiting}

    def _handle(self, life: Life, message: messages.Message) -> None:
        self._speaker = life
        super()._handle(life, message)

    def _deliver(self, item: messages.OutputItem, group: int | None) -> None:
        entry = self._ledger.get(item.request_id)
        if entry is not None and item.request_id in self._streams and entry.group == group:
            self._history.believed(self._speaker, self._virtual.note, item)
        super()._deliver(item, group)
