"""A single rank that tries to have rank 1 spawned, and says what came of it: `run_meetings.py`.

`run_meetings.py newcomer RUN`: the process that it spawns, which believes to belong to the mesh RUN.
"""

import contextlib
import sys
import time

from tests.mpi.launch import end_run, linger
from transport.mpi_meetings import MpiMeetings, SpawnError
from transport.mpi_runtime import init_mpi


def main() -> None:
    world = init_mpi().COMM_WORLD
    meetings = MpiMeetings(run_id="ours", rank=0, num_ranks=2)
    meetings.spawn(1, 1, [sys.executable, __file__, "newcomer", sys.argv[1]])
    while not (failed := meetings.take_failed()):
        assert not meetings.take_met()
        world.Iprobe()
        time.sleep(0.001)
    print(f"failed {failed}", flush=True)
    linger(world.Iprobe)


def newcomer(run: str) -> None:
    meetings = MpiMeetings(run_id=run, rank=1, num_ranks=2, incarnation=1)
    with contextlib.suppress(SpawnError):
        meetings.meet_parent(0, 0)
    linger(init_mpi().COMM_WORLD.Iprobe)


if __name__ == "__main__":
    try:
        newcomer(sys.argv[2]) if sys.argv[1] == "newcomer" else main()
    except BaseException:
        end_run()
