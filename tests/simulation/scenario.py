"""What a seed draws: the mesh, who asks for what and when, and what goes wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mesh_config.model_shape import Quantization
from tests.simulation.control_plane import Weather
from tests.simulation.tiny_model import NUM_EXPERTS, requests
from transport.local_wire import CALM, FaultRates

HERE = "here"
DEADLY = frozenset({"kill", "unreadable", "no memory"})
"""Faults that may cost a rank its life, or a request its answer, though nothing else goes wrong."""
Variant = tuple[str, Quantization | None]
"""What decides which bits a request gives: the form of attention over prompts, and the format of weights."""
QUIET_FROM = 4.0
"""When whatever goes wrong has ended."""

KINDS = ("kill", "kill", "stop", "stop", "slow", "cut", "hold", "cut off", "lag", "freeze", "unreadable", "no memory")
SHAPES: tuple[dict[str, Any], ...] = (
    {"num_ranks": 2, "attention_tp": 1},
    {"num_ranks": 2, "attention_tp": 2},
    {"num_ranks": 3, "attention_tp": 1, "attention_ranks": 2},
    {"num_ranks": 3, "attention_tp": 2, "attention_ranks": 2},
    {"num_ranks": 3, "attention_tp": 1},
    {"num_ranks": 4, "attention_tp": 1, "attention_ranks": 2},
    {"num_ranks": 4, "attention_tp": 2, "attention_ranks": 2},
    {"num_ranks": 4, "attention_tp": 2},
    {"num_ranks": 4, "attention_tp": 4},
)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One client: what it asks for and when, after how many tokens it goes away, and how long it takes to read one."""

    request: int
    at: float
    leaves_after: int | None = None
    reads_in: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that befalls a rank or a wire, from `at` for `seconds`."""

    kind: str
    at: float
    seconds: float
    rank: int
    other: int = 0
    strength: float = 1.0

    def __str__(self) -> str:
        return (
            f"{self.at:.3f} {self.kind} rank={self.rank} other={self.other} {self.seconds:.3f} s x{self.strength:.3g}"
        )


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The frontend drains the mesh and ends, or is `killed`. Requests get `patience` seconds to be computed."""

    at: float
    killed: bool
    patience: float


@dataclass(kw_only=True)
class Scenario:
    """All that a seed decides before anything happens."""

    seed: int
    mesh_fields: dict[str, Any]
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...] = ()
    rates: FaultRates = CALM
    weather: Weather = field(default_factory=Weather)
    remote: frozenset[int] = frozenset()
    crowded: bool = False
    max_queued: int | None = None
    respawn: bool = False
    calm: bool = False
    dies_loading: int | None = None
    quantization: Quantization | None = None
    ending: Ending | None = None

    @property
    def variant(self) -> Variant | None:
        """None where a token's bits depend on which rank hosts which experts."""
        if self.mesh_fields.get("combine") == "compact":
            return None
        return self.mesh_fields.get("prefill_attention", "absorbed"), self.quantization

    def host_of(self, rank: int) -> str:
        """The frontend sees processes of its own host alone."""
        return "there" if rank in self.remote else HERE

    def group_of(self, rank: int) -> int | None:
        fields = self.mesh_fields
        attending = fields.get("attention_ranks") or fields["num_ranks"]
        return rank // fields["attention_tp"] if rank < attending else None

    def lines(self) -> Iterator[str]:
        """The scenario for people."""
        yield f"mesh {self.mesh_fields}, respawn={self.respawn}, crowded={self.crowded}, remote={sorted(self.remote)}"
        if self.dies_loading is not None:
            yield f"rank {self.dies_loading} dies while it loads"
        if self.quantization is not None:
            yield f"weights in {self.quantization}"
        if self.ending is not None:
            yield str(self.ending)
        yield f"frames {self.rates}; messages {self.weather}"
        yield from (str(ask) for ask in self.asks)
        yield from (str(fault) for fault in self.faults)


def draw(seed: int) -> Scenario:
    """The scenario of a seed. One in four is calm: everything may be late there, nothing is lost, and nobody dies."""
    rng = random.Random(f"scenario {seed}")
    shape = rng.choice(SHAPES)
    num_experts = NUM_EXPERTS if shape.get("attention_ranks") != shape["num_ranks"] - 1 else 0
    fields = shape | {
        "redundant_experts": rng.choice([0, num_experts, num_experts]),
        "num_cache_blocks": rng.choice([4, 5, 6, 32]),
        "credit_window": rng.choice([2, 4, 16]),
        "max_num_seqs": rng.choice([2, 4, 16]),
        "max_num_batched_tokens": rng.choice([16, 64]),
        "micro_batches": rng.choice(["auto", 1, 2]),
        "expert_hold": rng.choice(["off", "auto"]),
        "prefix_caching": rng.random() < 0.7,
        "combine": rng.choice(["exact"] * 9 + ["compact"]),
        "prefill_attention": rng.choice(["absorbed"] * 3 + ["expanded"]),
    }
    calm = rng.random() < 0.25
    num_ranks = shape["num_ranks"]
    scenario = Scenario(
        seed=seed,
        mesh_fields=fields,
        asks=tuple(_asks(rng)),
        rates=_rates(rng, calm=calm),
        weather=Weather(
            usual=rng.choice([0.002, 0.03]),
            slow=rng.choice([0.0, 0.05]),
            longest=0.15 if calm else rng.choice([0.1, 0.6]),
        ),
        remote=frozenset(rank for rank in range(num_ranks) if rng.random() < 0.3),
        crowded=rng.random() < 0.3,
        max_queued=rng.choice([None, None, 2]),
        respawn=rng.random() < 0.6,
        quantization="int8" if rng.random() < 0.15 else None,
        calm=calm,
        dies_loading=rng.randrange(num_ranks) if not calm and rng.random() < 0.02 else None,
    )
    kinds = ["lag", "slow"] if calm else [*KINDS]
    count = rng.choice([0, 1, 2, 3, 5, 8])
    scenario.faults = tuple(sorted((_fault(rng, rng.choice(kinds), scenario) for _ in range(count)), key=_when))
    if rng.random() < 0.1:
        at, patience = rng.uniform(0.1, 2.5), rng.choice([0.2, 2.0, 30.0])
        scenario.ending = Ending(at=at, killed=rng.random() < 0.4, patience=patience)
    return scenario


def _when(fault: Fault) -> float:
    return fault.at


def _asks(rng: random.Random) -> Iterator[Ask]:
    for _ in range(rng.randint(3, 9)):
        yield Ask(
            request=rng.randrange(len(requests())),
            at=rng.choice([0.0, rng.uniform(0.0, 2.0)]),
            leaves_after=rng.randint(0, 3) if rng.random() < 0.15 else None,
            reads_in=rng.uniform(0.05, 0.5) if rng.random() < 0.15 else 0.0,
        )


def _rates(rng: random.Random, *, calm: bool) -> FaultRates:
    if calm:
        return FaultRates(delay=rng.choice([0.0, 0.2]), max_delay=0.03, duplicate=rng.choice([0.0, 0.1]))

    def some(most: float) -> float:
        return rng.random() * most if rng.random() < 0.4 else 0.0

    return FaultRates(
        drop=some(0.1),
        duplicate=some(0.2),
        corrupt=some(0.05),
        reorder=some(0.3),
        delay=some(0.5),
        max_delay=rng.choice([0.02, 0.3, 0.6]),
    )


def _fault(rng: random.Random, kind: str, scenario: Scenario) -> Fault:
    num_ranks = scenario.mesh_fields["num_ranks"]
    at = rng.uniform(0.05, 2.0)
    rank = rng.randrange(num_ranks)
    other = rng.choice([peer for peer in range(num_ranks) if peer != rank])
    seconds = {
        "kill": 0.0,
        "stop": rng.choice([0.2, 1.0, 2.5]),
        "slow": rng.choice([0.3, 1.5]),
        "cut": rng.choice([0.1, 0.5, 1.5]),
        "hold": rng.choice([0.1, 0.5, 1.5]),
        "unreadable": rng.choice([0.5, 1.5, 3.0]),
        "no memory": rng.choice([0.5, 1.5, 3.0]),
        "cut off": rng.choice([0.3, 1.0, 2.5]),
        "lag": rng.choice([0.1, 0.3]) if scenario.calm else rng.choice([0.3, 1.0, 2.0]),
        "freeze": rng.choice([0.1, 0.5, 2.0]),
    }[kind]
    strength = rng.choice([2.0, 3.0]) if scenario.calm else rng.choice([3.0, 20.0])
    seconds = min(seconds, QUIET_FROM - at)
    return Fault(kind=kind, at=at, seconds=seconds, rank=rank, other=other, strength=strength)
