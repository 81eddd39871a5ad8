"""`moemesh bench dispatch`: how long the travel of tokens takes, and what planning it costs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from moemesh.bench.exchange import PLAN_EXPERTS, PLAN_RANKS, ExchangeTime, measure_local, measure_planning
from moemesh.bench.exchange_rank import RESULT
from moemesh.bench.options import BenchDispatchOptions
from moemesh.bench.results import result_document, table, write_result
from moemesh.launcher import RankLauncher, module_command
from moemesh.mpi_command import LaunchError
from moemesh.options import EngineOptions
from moemesh.run_directory import RunDirectory

_STOP_GRACE_SECONDS = 1.0


def bench_dispatch(options: BenchDispatchOptions) -> None:
    """Measure, print a table, write the result where it was asked for. Raises LaunchError."""
    times: list[ExchangeTime] = []
    for link in options.links:
        for num_ranks in options.ranks:
            if link == "local":
                times += measure_local(num_ranks, options.sizes, options.repeats)
            else:
                times += _measure_mpi(num_ranks, options)
    planning = measure_planning(options.repeats)
    print(describe(times, planning))
    if options.save_result is not None:
        write_result(options.save_result, result_document(options, _figures(times, planning)))


def describe(times: list[ExchangeTime], planning: dict[int, float]) -> str:
    """The figures as tables for people."""
    exchanges = [
        (
            time.link,
            str(time.num_ranks),
            str(time.num_bytes),
            f"{time.seconds * 1e6:.1f}",
            f"{time.bytes_per_s / 1e9:.3f}",
        )
        for time in times
    ]
    plans = [(str(num_tokens), f"{seconds * 1e6:.1f}") for num_tokens, seconds in planning.items()]
    return "\n".join(
        (
            table(("link", "ranks", "frame bytes", "exchange us", "GB/s in all"), exchanges),
            "",
            f"planning a dispatch, {PLAN_EXPERTS} experts on {PLAN_RANKS} ranks",
            table(("tokens", "us"), plans),
        )
    )


def _figures(times: list[ExchangeTime], planning: dict[int, float]) -> dict[str, Any]:
    exchanges = [
        {
            "link": time.link,
            "ranks": time.num_ranks,
            "frame_bytes": time.num_bytes,
            "seconds": time.seconds,
            "bytes_per_s": time.bytes_per_s,
        }
        for time in times
    ]
    return {"exchanges": exchanges, "planning_seconds_by_tokens": planning}


def _measure_mpi(num_ranks: int, options: BenchDispatchOptions) -> list[ExchangeTime]:
    """Under an mpirun of our own, as a mesh is started."""
    run = RunDirectory.create(num_ranks=num_ranks)
    sizes = ",".join(map(str, options.sizes))
    arguments = ("--run-directory", str(run.path), "--sizes", sizes, "--repeats", str(options.repeats))
    command = module_command("moemesh.bench.exchange_rank", *arguments)
    ranks = RankLauncher(EngineOptions(ranks=num_ranks), run, rank_command=command)
    try:
        ranks.start()
        ended = asyncio.run(ranks.wait())
        result = run.path / RESULT
        if not result.exists():
            raise LaunchError(f"{num_ranks} ranks did not exchange anything: {ended}")
        return [ExchangeTime(**time) for time in json.loads(result.read_text())]
    finally:
        ranks.stop(_STOP_GRACE_SECONDS)
        run.remove()
