"""Exchanges between ranks: every rank sends one frame to every other and waits for theirs, as in a layer's dispatch."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from transport.dispatch import plan_dispatch
from transport.frame import Frame, Header, Kind
from transport.links import Link
from transport.local_link import LocalNetwork

# A model of DeepSeek-V3's kind on sixteen ranks.
PLAN_EXPERTS, PLAN_TOP_K, PLAN_RANKS = 256, 8, 16
PLAN_TOKENS = (1, 32, 4096)

_FEWEST_REPEATS = 10


class PeerGone(RuntimeError):
    """A rank that takes part in an exchange has died."""


@dataclass(frozen=True, kw_only=True)
class ExchangeTime:
    """Median seconds of one exchange of frames of `num_bytes` between `num_ranks`."""

    link: str
    num_ranks: int
    num_bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        """Of all frames of the exchange together."""
        return self.num_ranks * (self.num_ranks - 1) * self.num_bytes / self.seconds


class Exchanger:
    """One rank's part in exchanges. All ranks make the same ones; one exchanger for the whole life of a link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._peers = [rank for rank in range(link.num_ranks) if rank != link.rank]
        # Below zero where a peer is ahead with its next exchange.
        self._missing = dict.fromkeys(self._peers, 0)

    def frame(self, num_bytes: int) -> Frame:
        """As dispatch sends it: float32 rows and a few indices."""
        rows = torch.zeros((1, max(1, num_bytes // 4)))
        return Frame(Header(Kind.DISPATCH, self._link.rank), (rows, torch.zeros(8, dtype=torch.int32)))

    def send(self, frame: Frame) -> None:
        """The frame to every peer."""
        for peer in self._peers:
            self._link.post(peer, frame)
            self._missing[peer] += 1

    def complete(self) -> bool:
        """Receive; whether as many frames have come from every peer as were sent to it. Raises PeerGone."""
        for frame in self._link.poll():
            self._missing[frame.header.sender] -= 1
        lost = self._link.take_lost()
        if lost:
            raise PeerGone(f"rank {lost[0]} has died")
        return all(missing <= 0 for missing in self._missing.values())


def measure_local(num_ranks: int, sizes: Sequence[int], repeats: int) -> list[ExchangeTime]:
    """Over the local link: all ranks in this thread, so that nothing but software is timed."""
    ranks = [Exchanger(link) for link in LocalNetwork(num_ranks).links]
    return [_timed("local", ranks, num_ranks, num_bytes, repeats) for num_bytes in sizes]


def measure_between_processes(link: Link, name: str, sizes: Sequence[int], repeats: int) -> list[ExchangeTime]:
    """Called by every rank, with the same arguments. What each rank times is the same, but for noise."""
    ranks = [Exchanger(link)]
    return [_timed(name, ranks, link.num_ranks, num_bytes, repeats) for num_bytes in sizes]


def _timed(link: str, ranks: Sequence[Exchanger], num_ranks: int, num_bytes: int, repeats: int) -> ExchangeTime:
    """`ranks` are those of this process."""
    frames = [rank.frame(num_bytes) for rank in ranks]
    # Fewer for large frames, and the same number everywhere.
    repeats = max(_FEWEST_REPEATS, repeats * 16384 // max(16384, num_bytes))
    seconds = median_seconds(lambda: _exchange(ranks, frames), repeats)
    return ExchangeTime(link=link, num_ranks=num_ranks, num_bytes=num_bytes, seconds=seconds)


def _exchange(ranks: Sequence[Exchanger], frames: Sequence[Frame]) -> None:
    for rank, frame in zip(ranks, frames, strict=True):
        rank.send(frame)
    waiting = [rank for rank in ranks if not rank.complete()]
    while waiting:
        os.sched_yield()  # a peer may need this core
        waiting = [rank for rank in waiting if not rank.complete()]


def measure_planning(repeats: int) -> dict[int, float]:
    """Median seconds, by number of tokens, to plan a dispatch and cut it into parts."""
    rank_of_expert = torch.arange(PLAN_EXPERTS, dtype=torch.int32) // (PLAN_EXPERTS // PLAN_RANKS)
    generator = torch.Generator().manual_seed(0)
    seconds = {}
    for num_tokens in PLAN_TOKENS:
        ids = torch.rand(num_tokens, PLAN_EXPERTS, generator=generator).topk(PLAN_TOP_K, dim=1).indices.int()

        def plan(ids: torch.Tensor = ids) -> None:
            dispatch = plan_dispatch(ids, rank_of_expert, PLAN_RANKS)
            for rank in dispatch.destinations:
                dispatch.part(rank)

        seconds[num_tokens] = median_seconds(plan, max(_FEWEST_REPEATS, repeats // num_tokens))
    return seconds


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """Median time of one call, after a tenth of the repeats to warm up."""
    for _ in range(max(1, repeats // 10)):
        action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
