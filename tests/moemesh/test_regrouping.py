"""What the members of a group tell each other before it goes on."""

from __future__ import annotations

import torch

from attention.block_pool import BlockPool
from attention.latent_cache import BLOCK_SIZE, LatentCache
from moemesh.kept_cache import KeptCache, KeptSequence
from moemesh.regrouping import Regrouping
from moemesh.sampling_params import SamplingParams
from moemesh.scheduler import Scheduler
from moemesh.scheduler_records import SchedulerLimits
from moemesh.sequence import Sequence
from transport.local_link import LocalNetwork
from transport.mailbox import Mailbox
from transport.tasks import Task

LIMITS = SchedulerLimits(max_num_batched_tokens=64, max_num_seqs=8, max_model_len=256)


class Told:
    """What the frontend is waited for."""

    def __init__(self, told: bool) -> None:
        self.told = told

    def ready(self) -> bool:
        return self.told


class Members:
    """One scheduler, and as many members as there are things known; each with a cache of its own number."""

    def __init__(self, *known: KeptCache | None, told: bool = True) -> None:
        network = LocalNetwork(len(known))
        self.links, self.mailboxes = network.links, [Mailbox() for _ in known]
        self.caches = [LatentCache(num_layers=2, num_blocks=8, width=3, device=torch.device("cpu")) for _ in known]
        for number, cache in enumerate(self.caches, start=1):
            for layer in range(2):
                cache.layer(layer).fill_(10 * number + layer)
        self.regroupings = [
            Regrouping(
                members=tuple(range(len(known))),
                generation=3,
                link=link,
                mailbox=mailbox,
                cache=cache,
                kept=kept,
            )
            for link, mailbox, cache, kept in zip(self.links, self.mailboxes, self.caches, known, strict=True)
        ]
        self.scheduler = Scheduler(BlockPool(8, BLOCK_SIZE), LIMITS)
        self.told = Told(told)
        leader, *others = self.regroupings
        self.tasks = [Task(leader.lead(self.scheduler, self.told)), *(Task(other.follow()) for other in others)]

    def add(self, seq_id: int, num_prompt: int, num_output: int = 1) -> None:
        self.scheduler.add(
            Sequence(
                seq_id=seq_id,
                prompt_ids=tuple(range(num_prompt)),
                params=SamplingParams(max_tokens=9),
                seed=1,
                output_ids=[5] * num_output,
            )
        )

    def run(self) -> None:
        for _ in range(100):
            for task, link, mailbox in zip(self.tasks, self.links, self.mailboxes, strict=True):
                for frame in link.poll():
                    mailbox.deliver(frame)
                task.advance()

    def resumed(self) -> dict[int, list[int]]:
        kept = self.regroupings[0].kept
        assert kept is not None
        return {sequence.seq_id: list(sequence.block_ids) for sequence in kept.sequences}


def first(*, step: int = 4) -> KeptCache:
    """Two sequences; nothing of them is being computed."""
    return KeptCache(2, step, (whole(1, 2, 5), whole(2, 3)))


def whole(seq_id: int, *blocks: int) -> KeptSequence:
    return KeptSequence(seq_id, blocks, 40 if len(blocks) > 1 else 10, 41 if len(blocks) > 1 else 11, sample=False)


def test_the_leader_believes_who_has_seen_most() -> None:
    """The lost leader had told only the second member that the blocks of sequence 1 are another one's now."""
    later = KeptCache(2, 5, (whole(2, 3), whole(7, 5, 2)))
    for known in ((first(), later, first()), (later, first(), first())):
        members = Members(*known)
        for seq_id, num_prompt in ((1, 45), (2, 12)):
            members.add(seq_id, num_prompt)
        members.run()
        assert all(task.done for task in members.tasks)
        assert members.resumed() == {2: [3]}
        assert members.scheduler.stats().num_blocks_used == 1


def test_a_step_of_a_later_generation_is_later() -> None:
    members = Members(first(step=90), KeptCache(3, 0, (whole(1, 6, 7),)))
    members.add(1, 45)
    members.run()
    assert members.resumed() == {1: [6, 7]}


def test_a_member_without_a_cache_gets_what_the_sequences_need() -> None:
    members = Members(first(), None, first(), None)
    members.add(1, 45)
    members.run()
    assert all(task.done for task in members.tasks)
    for newcomer in (1, 3):
        cache, kept = members.caches[newcomer], members.regroupings[newcomer].kept
        assert kept == members.regroupings[0].kept
        for layer in range(2):
            assert (cache.layer(layer)[[2, 5]] == 10 + layer).all()
            assert (cache.layer(layer)[[0, 1, 3, 4, 6, 7]] == 10 * (newcomer + 1) + layer).all()
    assert (members.caches[2].layer(0) == 30).all(), "who has it needs nothing"
    assert not any(mailbox.num_waiting for mailbox in members.mailboxes)


def test_where_the_leader_has_nothing_all_begin_anew() -> None:
    members = Members(None, None)
    members.add(1, 45)
    members.run()
    assert all(task.done for task in members.tasks)
    assert members.resumed() == {}
    assert [regrouping.kept for regrouping in members.regroupings] == [KeptCache(3), KeptCache(3)]


def test_the_leader_waits_for_the_frontend() -> None:
    members = Members(first(), None, told=False)
    members.run()
    assert not members.tasks[0].done
    members.add(1, 45)
    members.told.told = True
    members.run()
    assert members.resumed() == {1: [2, 5]}
    assert members.tasks[1].done
