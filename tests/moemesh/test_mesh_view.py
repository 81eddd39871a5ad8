"""The controller's view: ranks, their states, and what /mesh says."""

from __future__ import annotations

from mesh_config import MeshConfig, even_placement
from moemesh.mesh_view import MeshView
from transport import messages


def _view() -> MeshView:
    mesh = MeshConfig(num_ranks=3, attention_ranks=2, attention_tp=2, max_model_len=64)
    return MeshView(mesh, even_placement(4, (1, 2), mesh.expert_ranks, 3), expert_bytes=10, frontend_pid=11)


def _hello(rank: int, isa: str = "avx2") -> messages.Hello:
    return messages.Hello(rank=rank, pid=100 + rank, incarnation=0, host="h", num_threads=1, isa=isa)


def test_it_is_ready_when_every_rank_is_up_and_each_change_is_an_epoch() -> None:
    view = _view()
    assert view.known_ranks() == []
    for rank in range(3):
        assert not view.ready
        view.note_hello(_hello(rank))
        view.note_ready(rank, 9)
    assert view.ready
    assert view.epoch == 3
    view.note_failed(1)
    assert (view.ready, view.epoch) == (False, 4)


def test_mesh_describes_every_rank() -> None:
    view = _view()
    view.note_hello(_hello(2))
    view.note_progress(2, "loading", 3, 10)
    assert view.loading_progress() == (3, 10)
    assert "rank 0" in view.loading_detail()
    described = view.describe()
    assert (described["epoch"], described["frontend_pid"]) == (0, 11)
    assert described["attention_groups"] == [[0, 1]]
    first, _, last = described["ranks"]
    assert (first["pid"], first["roles"], first["attention_group"]) == (None, ["attention"], 0)
    assert (last["pid"], last["roles"], last["attention_group"]) == (102, ["expert"], None)
    assert [rank["loss"]["cover"] for rank in described["ranks"]] == ["none needed", "none needed", "nothing"]
    assert last["loss"]["experts_without_replica"] == 8
    assert described["placement"]["experts"] == {"1": [[2]] * 4, "2": [[2]] * 4}


def test_expert_load_adds_up() -> None:
    view = _view()
    view.note_expert_load({1: [1, 0, 2, 0]})
    view.note_expert_load({1: [1, 1, 0, 0], 2: [0, 0, 0, 5]})
    assert view.describe()["expert_load"] == {"1": [2, 1, 2, 0], "2": [0, 0, 0, 5]}


def test_instruction_sets_are_those_of_the_ranks_that_came() -> None:
    view = _view()
    view.note_hello(_hello(0))
    view.note_hello(_hello(1, "avx512"))
    assert view.instruction_sets() == {0: "avx2", 1: "avx512"}
