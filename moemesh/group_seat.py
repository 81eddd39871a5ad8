"""A rank's seat in its attention group, over all generations: the member of the one that it is in, and what concerns
those that are over or have not begun here."""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from mesh_config.model_config import ModelConfig
from moemesh.group_member import GroupMember
from moemesh.kept_cache import KeptCache
from moemesh.rank_counters import member_counters, scheduler_gauges
from moemesh.request_messages import output_item, submitted_sequence
from transport import messages
from transport.frame import Frame
from transport.mailbox import Mailbox

logger = logging.getLogger(__name__)


class MakeMember(Protocol):
    """Makes a rank's side of its attention group for a generation; see GroupMember."""

    def __call__(
        self, generation: int, members: tuple[int, ...], *, goes_on: bool, kept: KeptCache | None
    ) -> GroupMember: ...


class GroupSeat:
    """`members` are those of the start, `rank` among them or not. `send` takes what the frontend is to hear."""

    def __init__(
        self,
        make_member: MakeMember,
        members: tuple[int, ...],
        *,
        group: int,
        rank: int,
        config: ModelConfig,
        mailbox: Mailbox,
        send: Callable[[messages.Message], None],
    ) -> None:
        self._make_member = make_member
        self._group = group
        self._rank = rank
        self._config = config
        self._mailbox = mailbox
        self._send = send
        self.member = make_member(0, members, goes_on=False, kept=None)
        self._view: messages.GroupMembers | None = None
        # What was asked of a generation that we have not begun yet.
        self._held: list[messages.Submit | messages.Cancel | messages.Regroup] = []
        self._early_plans: list[Frame] = []
        self._reborn = False  # we are in another life than the member
        # What the members of earlier generations have counted.
        self._past: Counter[str] = Counter()

    def turn(self, *, may_begin: bool) -> bool:
        """One turn of the member; whether there was anything to do."""
        busy = self.member.turn(may_begin=may_begin)
        if outputs := self.member.take_outputs():
            self._send_outputs([output_item(output) for output in outputs])
        if (problem := self.member.take_problem()) is not None:
            logger.error("rank %d cannot be in its attention group: %s", self._rank, problem)
            self._send(messages.Unfit(self.member.generation, problem))
        return busy

    # --- what the frontend says

    def hear(self, message: messages.Submit | messages.Cancel | messages.Regroup) -> None:
        """Do what is asked of the generation that the last view names; later, where it has not begun here."""
        if self._view is not None and self._view.generation != self.member.generation:
            self._held.append(message)
            return
        match message:
            case messages.Submit():
                self._submit(message)
            case messages.Cancel(request_id=request_id):
                self.member.cancel(request_id)
            case messages.Regroup(generation=generation, sequences=sequences):
                self._resume(generation, sequences)

    def follow(self, view: messages.View, *, reborn: bool) -> None:
        """A view has come, which may name a new generation. `reborn`: and another life of this rank than before."""
        if self._view is not None and self._view != view.groups[self._group]:
            self._held.clear()  # asked of a generation that is over before it began: they are asked again
        self._view = view.groups[self._group]
        self._reborn |= reborn

    def forget_view(self) -> None:
        """We are in another life, which no view has named yet."""
        self._view = None

    def begin_generation(self, *, met: set[int]) -> None:
        """Begin the generation that the last view names, once all its members have been met.

        What we know of the cache counts in it, unless it or we begin with nothing.
        """
        view = self._view
        if view is None or view.generation == self.member.generation or not set(view.members) <= met:
            return
        self._past.update(member_counters(self.member))
        kept = self.member.leave()
        if self._reborn or kept is None or kept.generation < view.since or self._rank not in view.members:
            kept = None
        self._reborn = False
        members = tuple(view.members) if self._rank in view.members else ()
        self.member = self._make_member(view.generation, members, goes_on=view.since < view.generation, kept=kept)
        self._mailbox.discard(view.generation)
        early, self._early_plans = self._early_plans, []
        for frame in early:
            self.receive_plan(frame)
        held, self._held = self._held, []
        for message in held:
            self.hear(message)

    def receive_plan(self, frame: Frame) -> None:
        """The leader may have heard of a new generation before us, or not yet."""
        if frame.header.generation > self.member.generation:
            self._early_plans.append(frame)
        elif frame.header.generation == self.member.generation:
            self.member.receive_plan(frame)

    def _submit(self, message: messages.Submit) -> None:
        try:
            self.member.submit(submitted_sequence(message, self._config.eos_token_ids))
        except ValueError as error:
            refusal = messages.OutputItem(
                request_id=message.request_id, position=0, token_ids=[], error=str(error), refused=True
            )
            self._send_outputs([refusal])

    def _resume(self, generation: int, sequences: list[messages.Submit]) -> None:
        """A later view may have come meanwhile: then there will be another one of these."""
        if self.member.generation == generation:
            for sequence in sequences:
                self._submit(sequence)
            self.member.resume()

    def _send_outputs(self, items: list[messages.OutputItem]) -> None:
        self._send(messages.Outputs(self._rank, self.member.generation, items))

    # --- counters

    def counters(self) -> dict[str, float]:
        """What all generations have counted, and what a leader has to do now."""
        counters: dict[str, float] = {
            name: self._past[name] + count for name, count in member_counters(self.member).items()
        }
        if self.member.scheduler is not None:
            counters.update(scheduler_gauges(self.member.scheduler.stats()))
        return counters

    def leftovers(self) -> dict[str, int]:
        """What is held for requests."""
        held = {"sequences": self.member.num_sequences}
        if self.member.scheduler is not None:
            held["blocks"] = self.member.scheduler.stats().num_blocks_used
        return held
