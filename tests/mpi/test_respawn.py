"""A rank is killed and replaced, again and again, while the others go on talking."""

from tests.mpi.launch import await_lines, started_ranks


def test_lives_follow_each_other_and_leave_nothing_behind() -> None:
    lives = ["whole", "stillborn", "whole", "short", "whole", "stuck", "whole"]
    count = lives.count("whole")
    with started_ranks(3, ["tests/mpi/run_respawn.py", *lives], timeout_s=300) as process:
        lines = [line.split()[1:] for line in await_lines(process, "cycle", 2 * count)]
    for rank in ("0", "1"):
        mine = [[int(value) for value in line[1:]] for line in lines if line[0] == rank]
        assert [incarnation for incarnation, _, _ in mine] == [1, 3, 5, 7]
        descriptors = [descriptors for _, descriptors, _ in mine]
        assert max(descriptors) == descriptors[0]
        kilobytes = [kilobytes for _, _, kilobytes in mine]
        # A life costs 0.1 MB for good, in what the helper threads allocate; but the heap goes up and down by 5 MB and
        # more with the large frames of this test. Descriptors are the sharper measure.
        assert kilobytes[-1] < kilobytes[0] + 32 * 1024


def test_no_slot_is_reported_and_kills_nobody() -> None:
    with started_ranks(1, ["tests/mpi/run_meetings.py", "ours"], slots=1) as process:
        (line,) = await_lines(process, "failed", 1)
    assert "NotMet(rank=1, incarnation=1" in line
    assert "no slots, unless it was started with --oversubscribe" in line


def test_a_stranger_is_refused() -> None:
    with started_ranks(1, ["tests/mpi/run_meetings.py", "theirs"]) as process:
        (line,) = await_lines(process, "failed", 1)
    assert "hello of" in line
    assert "theirs" in line
