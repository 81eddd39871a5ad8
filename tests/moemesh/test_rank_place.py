"""Who a process is, by its launcher's environment or its spawner's words."""

from pathlib import Path

from moemesh.rank_place import RankPlace
from moemesh.run_directory import RunDirectory
from transport.life import Life

RUN = RunDirectory(path=Path("/nowhere/moemesh-x"))


def test_mpirun_says_who_its_ranks_are() -> None:
    environment = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"}
    environment |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    place = RankPlace.of_launch(RUN, environment)
    assert (place.life, place.num_ranks, place.parent) == (Life(5, 0), 8, None)
    assert (place.local_rank, place.ranks_on_host) == (1, 4)


def test_without_mpirun_there_is_one_rank() -> None:
    place = RankPlace.of_launch(RUN, {}, incarnation=3)
    assert (place.life, place.num_ranks, place.ranks_on_host) == (Life(0, 3), 1, 1)


def test_a_newcomer_is_who_its_parent_says() -> None:
    environment = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
    parent = RankPlace.of_launch(RUN, environment)
    command = parent.newcomer_command(Life(2, 7), local_rank=2, ranks_on_host=4)
    assert command[-10:-7] == ["--run-directory", str(RUN.path), "--newcomer"]
    place = RankPlace.of_newcomer(RUN, [int(word) for word in command[-7:]])
    expected = RankPlace(run=RUN, rank=2, num_ranks=4, local_rank=2, ranks_on_host=4, incarnation=7, parent=Life(1, 0))
    assert place == expected
