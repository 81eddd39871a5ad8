"""The engine of a rank: a loop over ready work. One thread; nothing in it waits for a peer.

    control messages -> frames that have arrived -> expert calls -> the step under way, or a new one -> outputs

Expert calls come before the rank's own step: they never wait for anybody, hence there is no deadlock.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import kernels
from experts import ExpertClient, ExpertService, answer_frame
from gating import ExpertLoad
from mesh_config.placement import Placement
from moemesh.group_seat import GroupSeat
from moemesh.heart import Pulse
from moemesh.idle import IdleWait
from moemesh.membership_records import LIVING
from moemesh.neighbours import Neighbours
from moemesh.rank_counters import dispatch_counters, frame_counters
from moemesh.take_over import TakeOver
from transport import messages
from transport.errors import ProtocolError
from transport.frame import Frame, Kind
from transport.life import Life
from transport.links import Link
from transport.mailbox import Mailbox

STATS_SECONDS = 0.5
PULSE_SECONDS = 0.05
_MEMBERS = LIVING | {"loading"}

logger = logging.getLogger(__name__)


class ControlPort(Protocol):
    """A rank's end of the control plane; `ControlClient` is the real one."""

    def send(self, message: messages.Message) -> None: ...

    def receive_all(self) -> list[messages.Message]: ...

    def wait(self, timeout_s: float) -> bool: ...

    def begin_life(self, life: Life) -> None: ...


class HeartBeat(Protocol):
    """The rank's heart; `Heart` is the real one."""

    @property
    def pulse(self) -> Pulse: ...

    def lease_holds(self) -> bool:
        """The frontend is there: a step may begin."""
        ...

    def begin_life(self, life: Life) -> None: ...


class RankEngine:
    """Everything one rank does between Ready and Stop."""

    def __init__(
        self,
        *,
        link: Link,
        mailbox: Mailbox,
        control: ControlPort,
        experts: ExpertService,
        client: ExpertClient | None,
        take_over: TakeOver | None,
        load: ExpertLoad,
        placement: Placement,
        seat: GroupSeat | None,
        num_blocks: int,
        idle: IdleWait,
        heart: HeartBeat,
        neighbours: Neighbours,
        clock: Callable[[], float],
    ) -> None:
        self._link = link
        self._mailbox = mailbox
        self._control = control
        self._experts = experts
        self._client = client
        self._take_over = take_over
        self._load = load
        self._seat = seat
        self._num_blocks = num_blocks
        self._idle = idle
        self._heart = heart
        self._neighbours = neighbours
        self._clock = clock
        self._placement = placement
        self._order: Mapping[int, list[int]] = {}
        self._followed = (placement.version, dict.fromkeys(range(link.num_ranks), 0))
        self._view: messages.View | None = None
        self._incarnations = [0] * link.num_ranks
        # A new life that has not met everybody yet.
        self._joining = link.incarnation > 0
        # The peers that the link talks with, each with its life.
        peers = [] if self._joining else [peer for peer in range(link.num_ranks) if peer != link.rank]
        self._linked = dict.fromkeys(peers, 0)
        self.stopping = False
        self._next_stats = 0.0
        self._next_pulse = 0.0
        self._busy_seconds = 0.0
        self._num_malformed = 0
        self._reported: dict[str, float] = {}

    def run(self) -> None:
        """Serve until told to stop. Raises whatever goes wrong."""
        while not self.stopping:
            self.cycle()

    def cycle(self) -> None:
        """A turn, and where it found nothing to do a moment's rest."""
        self._heart.pulse.progress += 1
        began = self._clock()
        busy = self.turn()
        ended = self._clock()
        self._heart.pulse.note_turn(ended - began, ended)
        self._heart.pulse.working = busy or (self._seat is not None and self._seat.member.busy)
        if busy:
            self._busy_seconds += ended - began
            self._idle.worked()
        else:
            self._idle.wait(self._longest_wait(), arriving=self._link.arriving())
            if self._seat is not None:
                self._seat.member.waited(self._clock() - began)
        now = self._clock()
        self._link.tick(now)
        self._show_pulse(now)
        self._send_stats(now)

    def _show_pulse(self, now: float) -> None:
        """What is half received need not be waited for much longer."""
        if now >= self._next_pulse and self._seat is not None:
            self._next_pulse = now + PULSE_SECONDS
            self._heart.pulse.group = None if self._link.arriving() else self._seat.member.pulse()

    def _longest_wait(self) -> float:
        longest = max(0.0, self._next_stats - self._clock())
        held_for = self._experts.held_for()
        if held_for is not None:
            longest = min(longest, held_for)
        return longest if self._client is None else min(longest, max(0.0, self._client.due() - self._clock()))

    def turn(self) -> bool:
        """One turn of the loop; whether there was anything to do."""
        busy = self._read_control()
        if self._link.num_ranks > 1:
            self._meet_newcomers()
            busy |= self._read_frames()
        busy |= self._answer_experts()
        if self._take_over is not None and (taken := self._take_over.turn()) is not None:
            self._control.send(taken.to_message())
        if self._client is not None:
            self._report("late", self._client.check_deadlines(self._clock()))
        if self._seat is not None:
            busy |= self._seat.turn(may_begin=self._heart.lease_holds())
        return busy

    def announce(self) -> None:
        """Tell the frontend that this rank can compute, and what. One that joins a mesh which serves says so by
        itself."""
        self._control.send(messages.Hosting(self._experts.hosted()))
        self._control.send(messages.Ready(rank=self._link.rank, num_blocks=self._num_blocks))

    def leftovers(self) -> dict[str, int]:
        """What this rank holds for requests; all zero when there are none."""
        asked = 0 if self._client is None else self._client.pending
        held = {"frames": self._mailbox.num_waiting, "expert_calls": int(self._experts.pending) + asked}
        if self._seat is not None:
            held |= self._seat.leftovers()
        return held

    def _read_control(self) -> bool:
        received = self._control.receive_all()
        self.hear(received)
        return bool(received)

    def hear(self, received: Iterable[messages.Message]) -> None:
        """Do what the frontend says."""
        for message in received:
            match message:
                case messages.Submit() | messages.Cancel() | messages.Regroup():
                    self._require_seat().hear(message)
                case messages.Place(version=version, hosts=hosts, order=order):
                    self._order = order
                    self._placement = Placement(
                        version=version,
                        num_ranks=self._link.num_ranks,
                        hosts={layer: tuple(map(tuple, experts)) for layer, experts in hosts.items()},
                    )
                case messages.View():
                    self._follow(message)
                case messages.Respawn():
                    self._neighbours.spawn(message)
                case messages.Readmit(incarnation=incarnation):
                    self._begin_life(incarnation)
                case messages.Stop():
                    self.stopping = True
                case _:
                    logger.warning(
                        "the frontend sent a %s, which a serving rank does not expect", type(message).__name__
                    )

    def _follow(self, view: messages.View) -> None:
        """What the frontend says of the mesh."""
        if self._seat is not None:
            rank = self._link.rank
            self._seat.follow(view, reborn=view.incarnations[rank] != self._incarnations[rank])
        self._view = view
        self._incarnations = view.incarnations
        self._neighbours.follow(view)
        self._adopt(view)

    def _adopt(self, view: messages.View) -> None:
        """Do as the view says, as far as we have met whom it names.

        Who was not met cannot be asked. A group's new generation waits for us to meet its members.
        """
        self._incarnations = view.incarnations
        present = {rank: view.incarnations[rank] for rank, state in enumerate(view.states) if state in _MEMBERS}
        living = {rank: life for rank, life in present.items() if self._reaches(view, rank)}
        self._link_with(living)
        if self._joining and living == present:
            self._joining = False
            self.announce()
        news = (self._placement.version, living)
        if self._client is not None and news != self._followed:
            self._client.follow(self._placement, living)
        self._followed = news
        if self._take_over is not None and view.states[self._link.rank] in _MEMBERS:
            self._take_over.follow(self._placement.experts_of(self._link.rank), self._order)
        if self._seat is not None:
            self._seat.begin_generation(met=set(living))

    def _reaches(self, view: messages.View, rank: int) -> bool:
        return rank == self._link.rank or self._neighbours.reaches(rank, view.born[rank])

    def _meet_newcomers(self) -> None:
        """What has come of meetings since we looked last."""
        joined = self._link.take_joined()
        self._neighbours.joined(joined)
        if joined and self._view is not None:
            self._adopt(self._view)
        for not_spawned in self._neighbours.take_not_spawned():
            self._control.send(not_spawned)

    def _link_with(self, living: Mapping[int, int]) -> None:
        """Talk with these lives of our peers, and with no others."""
        for peer, incarnation in list(self._linked.items()):
            if living.get(peer) != incarnation:
                self._link.forget(peer)
                del self._linked[peer]
        for peer, incarnation in living.items():
            if peer != self._link.rank and peer not in self._linked:
                self._link.admit(peer, incarnation)
                self._linked[peer] = incarnation

    def _begin_life(self, incarnation: int) -> None:
        """We had been given up. The next view tells of a new generation of our group: what we knew of it is void."""
        logger.warning("rank %d had been given up and goes on as life %d", self._link.rank, incarnation)
        life = Life(self._link.rank, incarnation)
        self._control.begin_life(life)
        self._heart.begin_life(life)
        self._link.renew(incarnation)
        self._joining, self._view = True, None
        if self._seat is not None:
            self._seat.forget_view()
        if self._take_over is not None:
            self._order = {}
            self._take_over.follow(self._experts.hosted(), self._order)
        # A view comes when this is heard, with those who came while we were away.
        self._control.send(messages.Hosting(self._experts.hosted()))

    def _require_seat(self) -> GroupSeat:
        if self._seat is None:
            raise ProtocolError(f"rank {self._link.rank} has no attention and was sent a request")
        return self._seat

    def _read_frames(self) -> bool:
        frames = self._link.poll()
        for frame in frames:
            self._route(frame)
        lost = self._link.take_lost()
        if lost and self._client is not None:
            for peer in lost:
                self._client.suspect(peer)
        self._report("failed", lost)
        return bool(frames)

    def _report(self, evidence: str, peers: Iterable[int]) -> None:
        for peer in peers:
            self._control.send(messages.PeerReport(peer, self._incarnations[peer], evidence))

    def _route(self, frame: Frame) -> None:
        match frame.header.kind:
            case Kind.DISPATCH:
                self._take_call(frame)
            case Kind.PLAN:
                self._require_seat().receive_plan(frame)
            case Kind.ANSWER | Kind.NOT_HERE:
                if self._client is not None:
                    self._client.receive(frame)
            case _:
                self._mailbox.deliver(frame)

    def _take_call(self, frame: Frame) -> None:
        try:
            refusal = self._experts.submit(frame)
        except ProtocolError as error:  # the caller asks again when its patience is over
            self._num_malformed += 1
            logger.warning("a call of rank %d was dropped: %s", frame.header.sender, error)
            return
        if refusal is not None:
            self._link.post(frame.header.sender, refusal)

    def _answer_experts(self) -> bool:
        answers = self._experts.step()
        if answers is None:
            return False
        for call, answer in answers:
            self._link.post(call.sender, answer_frame(call, answer, self._link.rank))
        return True

    # --- counters

    def _send_stats(self, now: float) -> None:
        if now < self._next_stats:
            return
        self._next_stats = now + STATS_SECONDS
        counters = self.counters()
        load = self._load.take_changes()
        if counters != self._reported or load:
            self._reported = counters
            self._control.send(messages.Stats(rank=self._link.rank, counters=counters, expert_load=load))

    def counters(self) -> dict[str, float]:
        """What `Stats` reports: see RANK_COUNTERS and RANK_GAUGES in metrics."""
        counters = frame_counters(self._link.stats(), self._mailbox, self._num_malformed)
        counters["busy_seconds"] = self._busy_seconds
        counters["kernel_seconds"] = kernels.native_seconds()
        for layer, tokens in self._experts.stats.tokens_by_layer.items():
            counters[f"dispatched_tokens:{layer}"] = tokens
        if self._client is not None:
            counters.update(dispatch_counters(self._client.stats))
        if self._seat is not None:
            counters |= self._seat.counters()
        return counters
