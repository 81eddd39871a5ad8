"""A caller and the expert services of four ranks with scripted wires and a clock, for tests of the client.

Rank 0 calls and hosts experts itself; every rank's experts are the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kernels
from experts import ExpertBank, ExpertClient, ExpertService, WorkId, answer_frame
from mesh_config import even_placement
from transport.errors import Overloaded
from transport.frame import Frame, Kind
from transport.tasks import Task

HIDDEN, WIDTH, NUM_EXPERTS, TOP_K, LAYER = 24, 16, 12, 3, 3
NUM_RANKS = 4
CPU = torch.device("cpu")


def make_bank(experts: tuple[int, ...]) -> ExpertBank:
    """A bank with these experts, and room for all others."""
    packed = kernels.PackedExperts.empty(NUM_EXPERTS, HIDDEN, WIDTH, dtype=torch.float32)
    for slot, expert in enumerate(experts):
        load_expert(packed, slot, expert)
    return ExpertBank(experts, NUM_EXPERTS, packed)


def load_expert(packed: kernels.PackedExperts, slot: int, expert: int) -> None:
    generator = torch.Generator().manual_seed(expert)
    gate, up = (torch.randn(WIDTH, HIDDEN, generator=generator) for _ in range(2))
    packed.load(slot, gate, up, torch.randn(HIDDEN, WIDTH, generator=generator))


@dataclass
class ScriptedLink:
    """Keeps what is posted until the test says what becomes of it."""

    rank: int = 0
    num_ranks: int = NUM_RANKS
    full: bool = False
    posted: list[tuple[int, Frame]] = field(default_factory=list)

    def post(self, peer: int, frame: Frame) -> None:
        if self.full:
            raise Overloaded(f"rank {peer} takes no more")
        self.posted.append((peer, frame))


class World:
    """`wire` are the frames under way: to a service (rank, DISPATCH) or back to the caller (0, ANSWER or NOT_HERE)."""

    def __init__(self, *, redundant: int = 0, compact: bool = False) -> None:
        self.time = 0.0
        self.placement = even_placement(NUM_EXPERTS, (LAYER,), range(NUM_RANKS), NUM_RANKS, redundant=redundant)
        self.living = dict.fromkeys(range(NUM_RANKS), 0)
        self.banks = [make_bank(self.placement.experts_on(LAYER, rank)) for rank in range(NUM_RANKS)]
        self.services = [
            ExpertService({LAYER: bank}, rank=rank, hidden=HIDDEN, device=CPU) for rank, bank in enumerate(self.banks)
        ]
        self.link = ScriptedLink()
        self.client = ExpertClient(
            self.link,  # type: ignore[arg-type]
            self.services[0],
            placement=self.placement,
            living=self.living,
            compact=compact,
            clock=lambda: self.time,
        )
        self.wire: list[tuple[int, Frame]] = []

    def begin(self, *, step: int = 0, num_tokens: int = 9) -> Task[Tensor]:
        """A call that has been sent."""
        generator = torch.Generator().manual_seed(step)
        x_TH = torch.randn(num_tokens, HIDDEN, generator=generator)
        ids_TK = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(num_tokens)])
        weights_TK = torch.rand(num_tokens, TOP_K, generator=generator)
        work = WorkId(generation=0, step=step, micro_batch=0)
        task = Task(self.client.call(work, LAYER, x_TH, (ids_TK.int(), weights_TK), lambda: x_TH * 2))
        task.advance()
        return task

    def collect(self) -> list[tuple[int, Frame]]:
        """What is on the wire, with what was posted since."""
        self.wire += self.link.posted
        self.link.posted = []
        return self.wire

    def deliver(self, index: int, *, keep: bool = False) -> None:
        """One frame arrives, and stays on the wire as well if it is doubled; a service answers at once."""
        rank, frame = self.wire[index] if keep else self.wire.pop(index)
        if frame.header.kind is not Kind.DISPATCH:
            self.client.receive(frame)
            return
        refusal = self.services[rank].submit(frame)
        if refusal is not None:
            self.wire.append((0, refusal))
        self.answer(rank)

    def answer(self, rank: int) -> None:
        for header, answer in self.services[rank].step() or ():
            self.wire.append((0, answer_frame(header, answer, rank)))

    def deliver_all(self) -> None:
        while self.collect():
            self.deliver(0)
        self.answer(0)

    def pass_time(self, seconds: float) -> list[int]:
        self.time += seconds
        return self.client.check_deadlines(self.time)

    def lose(self, *ranks: int) -> None:
        """They are gone, with what is on its way to them or from them."""
        self.living = {rank: life for rank, life in self.living.items() if rank not in ranks}
        self.placement = self.placement.without(ranks)
        self.drop(*ranks)

    def drop(self, *ranks: int) -> None:
        self.wire = [
            (to, frame) for to, frame in self.collect() if to not in ranks and frame.header.sender not in ranks
        ]

    def load(self, plan: Mapping[int, Mapping[int, tuple[int, ...]]]) -> None:
        """Ranks take experts over: from now on they have them."""
        for rank, layers in plan.items():
            self.placement = self.placement.hosting(rank, layers)
            for expert in layers[LAYER]:
                slot = self.banks[rank].reserve()
                assert slot is not None
                load_expert(self.banks[rank].packed, slot, expert)
                self.banks[rank].admit(expert, slot)

    def publish(self) -> None:
        self.client.follow(self.placement, self.living)


def expected(*, step: int = 0, compact: bool = False, redundant: int = 0) -> Tensor:
    """What a call gives when nothing happens."""
    world = World(compact=compact, redundant=redundant)
    task = world.begin(step=step)
    world.deliver_all()
    assert task.advance()
    return task.result
