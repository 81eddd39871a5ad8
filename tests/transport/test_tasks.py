"""Tasks: generators that wait, alone and side by side."""

from transport.tasks import AnyOf, Steps, Task, together


class Flag:
    """Ready once raised."""

    def __init__(self) -> None:
        self.raised = False

    def ready(self) -> bool:
        return self.raised


def waiting_for(flags: list[Flag], result: str, trace: list[str]) -> Steps[str]:
    for number, flag in enumerate(flags):
        yield flag
        trace.append(f"{result}{number}")
    return result


def test_task_advances_only_when_its_wait_is_over() -> None:
    flags, trace = [Flag(), Flag()], list[str]()
    task = Task(waiting_for(flags, "a", trace))
    assert task.advance()
    assert not task.advance()
    assert task.wait is flags[0]
    flags[0].raised = True
    assert task.advance()
    assert trace == ["a0"]
    assert not task.done
    flags[1].raised = True
    assert task.advance()
    assert task.done
    assert task.result == "a"
    assert not task.advance()


def test_any_of_is_ready_when_one_is() -> None:
    flags = [Flag(), Flag()]
    both = AnyOf(flags)
    assert not both.ready()
    flags[1].raised = True
    assert both.ready()


def test_tasks_side_by_side_overtake_each_other_and_keep_their_order_of_results() -> None:
    trace: list[str] = []
    slow, quick = [Flag()], [Flag(), Flag()]
    task = Task(together([waiting_for(slow, "s", trace), waiting_for(quick, "q", trace)]))
    task.advance()
    for flag in (*quick, *slow):
        assert not task.advance()
        flag.raised = True
        assert task.advance()
    assert trace == ["q0", "q1", "s0"]
    assert task.result == ["s", "q"]


def test_nothing_to_run_ends_at_once() -> None:
    nothing: list[Steps[str]] = []
    task = Task(together(nothing))
    assert task.advance()
    assert task.result == []
