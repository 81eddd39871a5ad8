"""A frontend without endpoint: `frontend.py NUM_RANKS`. Waits for its ranks or SIGTERM, then cleans up."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from moemesh.launcher import RankLauncher
from moemesh.options import EngineOptions
from moemesh.run_directory import RunDirectory


async def _wait(launcher: RankLauncher) -> str:
    waiting = asyncio.ensure_future(launcher.wait())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, waiting.cancel)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, waiting.cancel)
    try:
        return await waiting
    except asyncio.CancelledError:
        return "asked to stop"


def main(num_ranks: int) -> None:
    options = EngineOptions(ranks=num_ranks)
    run = RunDirectory.create(num_ranks=num_ranks)
    rank = [sys.executable, "-P", str(Path(__file__).with_name("rank.py")), str(run.path), str(num_ranks)]
    launcher = RankLauncher(options, run, rank_command=rank)
    launcher.start()
    told = {"frontend": os.getpid(), "keeper": launcher.pid, "run": str(run.path), "shm": str(run.shared_memory)}
    print(json.dumps(told), flush=True)
    ended = asyncio.run(_wait(launcher))
    launcher.stop(1.0)
    launcher.stop(1.0)
    run.remove()
    print(json.dumps({"ended": ended, "poll": launcher.poll()}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
