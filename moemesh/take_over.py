"""Experts that a rank takes over from one that is lost: loaded by a thread of their own while the rank serves.

The engine's thread says what is wanted, and makes what has come resident; slots of the banks belong to one of the two
at a time. Reading and packing run aside of the kernels' threads (see kernels.aside), but at no lower priority: while
an expert is missing most steps wait for it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import kernels
from experts import ExpertBank, ExpertService
from mesh_config.memory_plan import available_memory, format_bytes
from moemesh.checkpoint import Checkpoint, CheckpointError
from moemesh.ffn_loader import FfnLoader
from transport.messages import Hosting

BATCH_BYTES = 64 << 20
"""What is loaded in one call, and made resident in one turn of the engine."""
BUDGET_BYTES = 1 << 30
SPARE_BYTES = 256 << 20
"""Memory that is left free: a rank that took the last of it would be killed with all that it has."""
PROBLEMS_TOLD = 3

Experts = Mapping[int, Sequence[int]]
"""Logical experts by MoE layer."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Order:
    """One expert to be loaded into a slot."""

    layer: int
    expert: int
    packed: kernels.PackedExperts
    slot: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """Orders for one bank, done at once."""

    orders: list[_Order]
    unload: bool = False


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What has become of an order; `problem` where the slot is not loaded. `unload`: it was not to be, see `keep`."""

    order: _Order
    problem: str | None
    unload: bool = False


@dataclass(frozen=True, kw_only=True)
class TakenOver:
    """What has become of an order: experts by layer, those that are `refused`, and why."""

    experts: Mapping[int, tuple[int, ...]]
    refused: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def to_message(self) -> Hosting:
        """For the frontend."""
        experts, refused = (
            {layer: list(some) for layer, some in part.items()} for part in (self.experts, self.refused)
        )
        more = len(self.problems) - PROBLEMS_TOLD
        problem = "; ".join(self.problems[:PROBLEMS_TOLD]) + (f"; and {more} more" if more > 0 else "")
        return Hosting(experts, refused, problem)


@dataclass(kw_only=True)
class _Wanted:
    open: set[tuple[int, int]] = field(default_factory=set)
    experts: dict[int, set[int]] = field(default_factory=dict)
    refused: dict[int, set[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class TakeOver:
    """Loads experts for one rank's service.

    The loading thread calls `prepare` before it loads anything, and `wake` whenever a `turn` would find something new;
    `free_memory` says how many bytes may still be taken.
    """

    def __init__(
        self,
        service: ExpertService,
        checkpoint: Checkpoint,
        ffns: FfnLoader,
        *,
        prepare: Callable[[], object],
        wake: Callable[[], object],
        free_memory: Callable[[], int] = available_memory,
    ) -> None:
        """All files of the checkpoint are open; others may read it as well."""
        self._service = service
        self._checkpoint = checkpoint
        self._ffns = ffns
        self._prepare = prepare
        self._wake = wake
        self._free_memory = free_memory
        self._orders: SimpleQueue[_Batch | None] = SimpleQueue()
        self._outcomes: SimpleQueue[_Outcome] = SimpleQueue()
        self._wanted: _Wanted | None = None
        self._under_way: set[tuple[int, int]] = set()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._hosted: Experts = {}
        self._ordered: Experts = {}
        self._kept = True
        self._budget = 0  # bytes that may be taken before looking at the free memory again

    @property
    def busy(self) -> bool:
        """Whether something is being loaded."""
        return bool(self._under_way)

    def follow(self, hosted: Experts, order: Experts) -> None:
        """A view is in force: host these experts of each layer, load besides what is in the order, and drop the rest.
        An order that is new, and not empty, is answered by `turn`."""
        self._kept = False
        self._hosted = hosted
        if order != self._ordered:
            self._ordered = order
            self._want(order)

    def turn(self) -> TakenOver | None:
        """Make resident what has come, and drop what is not needed. The answer to the last order, once, when there is
        nothing left to wait for."""
        taken = self._take()
        self._kept = self._kept or self._keep()
        return taken

    def _want(self, order: Experts) -> None:
        """Those that are here are loaded already."""
        wanted = self._wanted = _Wanted() if order else None
        self._budget = 0
        for layer, experts in order.items():
            assert wanted is not None
            bank = self._service.bank(layer)
            here = set() if bank is None else set(bank.logical_experts)
            wanted.experts[layer] = set(experts) & here
            missing = sorted(set(experts) - here)
            wanted.open |= {(layer, expert) for expert in missing}
            self._order(layer, [expert for expert in missing if (layer, expert) not in self._under_way])

    def _order(self, layer: int, experts: Sequence[int]) -> None:
        """Have experts loaded that are neither here nor under way."""
        if not experts:
            return
        bank = self._service.bank(layer)
        if bank is None:
            bank = ExpertBank((), self._checkpoint.config.num_experts, self._ffns.expert_bank(layer, 1))
            self._service.host(layer, bank)
        self._start()
        orders = []
        for expert in experts:
            slot = bank.reserve()
            if slot is None:
                self._note(layer, expert, f"expert {expert} of layer {layer}: the bank has no slot left for it")
                continue
            self._under_way.add((layer, expert))
            orders.append(_Order(layer, expert, bank.packed, slot))
        # Each time that the other thread asks for Python's lock it may wait for milliseconds: it asks once for many.
        at_once = max(1, BATCH_BYTES // bank.packed.expert_bytes)
        for start in range(0, len(orders), at_once):
            self._orders.put(_Batch(orders[start : start + at_once]))

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._load_all, name="take-over", daemon=True)
            self._thread.start()

    def _take(self) -> TakenOver | None:
        while not self._outcomes.empty():
            outcome = self._outcomes.get()
            order = outcome.order
            bank = self._service.bank(order.layer)
            assert bank is not None
            if outcome.unload:
                bank.free(order.slot)
                continue
            self._under_way.discard((order.layer, order.expert))
            self._kept = False  # it may not be wanted any more
            if outcome.problem is None:
                bank.admit(order.expert, order.slot)
            else:
                bank.free(order.slot)
            self._note(order.layer, order.expert, outcome.problem)
        wanted = self._wanted
        if wanted is None or wanted.open:
            return None
        self._wanted = None
        return TakenOver(
            experts=_sorted(wanted.experts),
            refused=_sorted(wanted.refused),
            problems=tuple(wanted.problems),
        )

    def _keep(self) -> bool:
        """Drop what is resident and not needed; False where calls wait for a layer: try again."""
        whole = True
        for layer in self._checkpoint.config.moe_layers:
            bank = self._service.bank(layer)
            surplus = set() if bank is None else set(bank.logical_experts)
            surplus.difference_update(self._hosted.get(layer, ()), self._ordered.get(layer, ()))
            if bank is None or not surplus:
                continue
            if self._service.waits_for(layer):
                whole = False
                continue
            self._start()
            orders = [_Order(layer, expert, bank.packed, bank.drop(expert)) for expert in sorted(surplus)]
            self._orders.put(_Batch(orders, unload=True))
        return whole

    def _note(self, layer: int, expert: int, problem: str | None) -> None:
        wanted = self._wanted
        if wanted is None or (layer, expert) not in wanted.open:
            return
        wanted.open.discard((layer, expert))
        if problem is None:
            wanted.experts[layer].add(expert)
        else:
            logger.error("%s", problem)
            wanted.refused.setdefault(layer, set()).add(expert)
            wanted.problems.append(problem)

    def close(self) -> None:
        """Stop after what is being loaded, and wait for that."""
        if self._thread is not None:
            self._closing.set()
            self._orders.put(None)
            self._thread.join()

    # --- the other thread

    def _load_all(self) -> None:
        self._prepare()
        with kernels.aside():
            while (batch := self._orders.get()) is not None and not self._closing.is_set():
                for outcome in self._outcomes_of(batch):
                    self._outcomes.put(outcome)
                self._wake()

    def _outcomes_of(self, batch: _Batch) -> list[_Outcome]:
        """Load a batch; where that fails its experts one by one, to leave out those alone that cannot be loaded."""
        if batch.unload:
            for order in batch.orders:
                order.packed.unload(order.slot)
            return [_Outcome(order, None, unload=True) for order in batch.orders]
        problem = self._load(batch.orders)
        if problem is None or len(batch.orders) == 1:
            return [_Outcome(order, problem) for order in batch.orders]
        return [_Outcome(order, self._load([order])) for order in batch.orders]

    def _spend(self, num_bytes: int) -> None:
        """MemoryError where so much memory must not be taken. It is not looked at every time: that is many small files,
        and each may cost a wait for Python's lock."""
        if num_bytes > self._budget:
            free = self._free_memory()
            if num_bytes + SPARE_BYTES > free:
                raise MemoryError(f"{format_bytes(num_bytes)} are needed and {format_bytes(free)} free")
            self._budget = min(free - SPARE_BYTES, BUDGET_BYTES)
        self._budget -= num_bytes

    def _load(self, batch: Sequence[_Order]) -> str | None:
        """What is wrong, if so."""
        first = batch[0]
        slots, experts = [order.slot for order in batch], [order.expert for order in batch]
        try:
            self._spend(len(batch) * first.packed.expert_bytes)
            self._ffns.load_experts(first.packed, slots, self._checkpoint, first.layer, experts)
        except (CheckpointError, ValueError, OSError, MemoryError) as error:
            for order in batch:
                order.packed.unload(order.slot)
            return f"expert {first.expert} of layer {first.layer} cannot be taken over: {error}"
        return None


def _lists(experts: Experts) -> dict[int, list[int]]:
    return {layer: list(some) for layer, some in experts.items()}


def _sorted(experts: Mapping[int, set[int]]) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(sorted(some)) for layer, some in experts.items() if some}
