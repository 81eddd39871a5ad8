"""The controller's view: ranks, their states, and what /mesh says."""

from __future__ import annotations

from typing import Literal

from mesh_config import MeshConfig, even_placement
from moemesh.membership import Membership
from moemesh.membership_records import MembershipSettings
from moemesh.mesh_view import MeshView
from transport import messages


def _view(arithmetic: Literal["auto", "float32"] = "float32") -> MeshView:
    mesh = MeshConfig(num_ranks=3, attention_ranks=2, attention_tp=2, max_model_len=64, arithmetic=arithmetic)
    placement = even_placement(4, (1, 2), mesh.expert_ranks, 3)
    membership = Membership(mesh, placement, MembershipSettings())
    return MeshView(mesh, membership, expert_bytes=10, frontend_pid=11)


def _hello(rank: int, isa: str = "avx2") -> messages.Hello:
    return messages.Hello(rank=rank, pid=100 + rank, incarnation=0, host="h", num_threads=1, isa=isa)


def test_mesh_describes_every_rank() -> None:
    view = _view()
    view.note_hello(_hello(2))
    view.note_progress(2, "loading", 3, 10)
    assert view.loading_progress() == (3, 10)
    assert "rank 0" in view.loading_detail()
    described = view.describe()
    assert (described["epoch"], described["frontend_pid"]) == (0, 11)
    assert described["attention_groups"] == [[0, 1]]
    assert described["groups"] == [{"generation": 0, "members": [0, 1]}]
    first, _, last = described["ranks"]
    assert (first["state"], first["incarnation"], first["reason"]) == ("loading", 0, "starting")
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


def test_the_arithmetic_stays_as_it_was_settled() -> None:
    view = _view("auto")
    for rank in range(3):
        assert view.describe()["arithmetic"] == "auto"
        view.note_hello(_hello(rank, "amx"))
    view.note_hello(_hello(1, "avx2"))  # another life, on another machine
    assert view.describe()["arithmetic"] == "bf16x3"
