"""Experts are loaded while a rank serves; whatever is wrong with a checkpoint leaves them out, by name, and no more."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kernels
from experts import ExpertBank, ExpertService, LocalCall
from mesh_config import load_model_config
from moemesh.checkpoint import Checkpoint
from moemesh.checksums import Checksums
from moemesh.ffn_loader import FfnLoader
from moemesh.take_over import SPARE_BYTES, Experts, TakenOver, TakeOver
from tests.oracle import write_random_checkpoint
from transport.dispatch import ExpertCall
from transport.messages import Hosting

CPU = torch.device("cpu")
FIRST, SECOND = 1, 2  # the MoE layers
HERE = (0, 1)


@dataclass
class _Rank:
    """A rank that hosts experts 0 and 1 of the first MoE layer, and can load all others."""

    folder: Path
    service: ExpertService
    checkpoint: Checkpoint
    ffns: FfnLoader
    take_over: TakeOver
    woken: threading.Semaphore

    def want(self, order: Experts, *, hosted: Experts | None = None) -> None:
        self.take_over.follow({FIRST: HERE} if hosted is None else hosted, order)

    def finish(self) -> TakenOver:
        while (taken := self.take_over.turn()) is None:
            assert self.woken.acquire(timeout=60), "the take-over does not end"
        return taken

    def slots(self, layer: int) -> tuple[int, ...]:
        bank = self.service.bank(layer)
        return () if bank is None else bank.logical_experts


def _rank(
    folder: Path,
    *,
    quantized: bool = False,
    free_memory: Callable[[], int] = lambda: 1 << 40,
    learn: Sequence[Path] = (),
) -> _Rank:
    config, checksums = load_model_config(folder), Checksums()
    checkpoint = Checkpoint(folder, config, checksums)
    checkpoint.open_all()
    ffns = FfnLoader(
        config, checkpoint.tensors, device=CPU, weight_dtype=None, quantized=quantized, arithmetic="float32"
    )
    packed = ffns.expert_bank(FIRST, len(HERE))
    for slot, expert in enumerate(HERE):
        ffns.load_experts(packed, [slot], checkpoint, FIRST, [expert])
    bank = ExpertBank(HERE, config.num_experts, packed)
    service = ExpertService({FIRST: bank}, rank=0, hidden=config.hidden_size, device=CPU)
    woken = threading.Semaphore(0)
    take_over = TakeOver(
        service, checkpoint, ffns, prepare=lambda: checksums.learn(learn), wake=woken.release, free_memory=free_memory
    )
    return _Rank(folder, service, checkpoint, ffns, take_over, woken)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "model", 1)


@pytest.fixture
def rank(folder: Path) -> Iterator[_Rank]:
    rank = _rank(folder)
    yield rank
    rank.take_over.close()


@pytest.mark.parametrize("held", ["bfloat16", "int8", "fp8"])
def test_what_is_taken_over_computes_as_at_home(tmp_path: Path, held: str) -> None:
    folder = write_random_checkpoint(tmp_path / "model", 1, fp8=held == "fp8", dtype="bfloat16")
    rank = _rank(folder, quantized=held == "int8")
    num_experts, hidden = rank.checkpoint.config.num_experts, rank.checkpoint.config.hidden_size
    rank.want({FIRST: (1, 3, 2), SECOND: (0,)})
    assert rank.take_over.busy
    assert rank.finish() == TakenOver(experts={FIRST: (1, 2, 3), SECOND: (0,)})
    assert rank.take_over.turn() is None
    assert not rank.take_over.busy
    assert (rank.slots(FIRST), rank.slots(SECOND)) == ((0, 1, 2, 3), (0,))
    packed = rank.ffns.expert_bank(FIRST, num_experts)
    for expert in range(4):
        rank.ffns.load_experts(packed, [expert], rank.checkpoint, FIRST, [expert])
    home = ExpertBank(range(4), num_experts, packed)
    rows = torch.randn(5, hidden)
    call = ExpertCall(
        rows, torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32), torch.tensor([3, 2, 0, 2, 1], dtype=torch.int32)
    )
    bank = rank.service.bank(FIRST)
    assert bank is not None
    assert torch.equal(bank.compute(call), home.compute(call))
    rank.take_over.close()


def test_what_is_here_already_is_not_loaded(rank: _Rank) -> None:
    rank.want({FIRST: HERE})
    assert not rank.take_over.busy
    assert rank.finish().experts == {FIRST: HERE}


def test_the_last_wish_counts(rank: _Rank) -> None:
    rank.want({FIRST: (2, 3)})
    rank.want({FIRST: (3,), SECOND: (1,)})
    assert rank.finish().experts == {FIRST: (3,), SECOND: (1,)}


def test_what_is_not_needed_any_more_is_dropped_once_nobody_waits_for_it(rank: _Rank) -> None:
    rank.want({FIRST: (2, 3), SECOND: (4, 5)})
    rank.finish()
    hidden = rank.checkpoint.config.hidden_size
    slot = torch.zeros(1, dtype=torch.int32)
    local = LocalCall(layer=FIRST, call=ExpertCall(torch.randn(1, hidden), slot, slot + 2))
    rank.service.submit_local(local)
    rank.want({}, hosted={FIRST: (0, 1, 3)})
    assert rank.take_over.turn() is None
    assert (rank.slots(FIRST), rank.slots(SECOND)) == ((0, 1, 2, 3), ())
    rank.service.step()
    assert local.answer is not None
    rank.take_over.turn()
    assert rank.slots(FIRST) == (0, 1, 3)
    rank.want({FIRST: (2, 4), SECOND: (4,)})
    assert rank.finish().experts == {FIRST: (2, 4), SECOND: (4,)}
    assert rank.slots(FIRST) == (0, 1, 2, 4)
    rank.service.submit_local(local)
    before, local.answer = local.answer, None
    rank.service.step()
    assert torch.equal(local.answer, before)


def test_what_was_loaded_is_kept_until_the_order_is_over(rank: _Rank) -> None:
    """A view may have been under way before the answer arrived: its placement does not name us yet."""
    rank.want({FIRST: (2,)})
    rank.finish()
    rank.want({FIRST: (2,)})
    assert rank.take_over.turn() is None, "the same order is answered once"
    assert rank.slots(FIRST) == (0, 1, 2)
    rank.want({}, hosted={FIRST: (0, 1, 2)})
    assert rank.take_over.turn() is None
    assert rank.slots(FIRST) == (0, 1, 2)
    rank.want({})
    rank.take_over.turn()
    assert rank.slots(FIRST) == HERE


def test_what_comes_after_its_order_was_taken_back_goes_again(rank: _Rank) -> None:
    rank.want({FIRST: (2, 3)})
    rank.want({})
    while rank.take_over.busy:
        assert rank.woken.acquire(timeout=60)
        assert rank.take_over.turn() is None
    assert rank.slots(FIRST) == HERE


def test_an_unlinked_checkpoint_can_still_be_read(rank: _Rank) -> None:
    shutil.rmtree(rank.folder)
    rank.want({SECOND: (5,)})
    assert rank.finish() == TakenOver(experts={SECOND: (5,)})


def test_a_flipped_byte_is_refused_by_name(rank: _Rank) -> None:
    name = f"model.layers.{SECOND}.mlp.experts.5.up_proj.weight"
    rank.checkpoint.weight(name)  # as the rank did that is lost
    info = rank.checkpoint.tensors[name]
    with info.path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little") + info.begin
        file.seek(start + 11)
        byte = file.read(1)[0]
        file.seek(start + 11)
        file.write(bytes([byte ^ 16]))
    rank.want({SECOND: (4, 5)})
    taken = rank.finish()
    assert (taken.experts, taken.refused) == ({SECOND: (4,)}, {SECOND: (5,)})
    assert len(taken.problems) == 1
    assert f"{name} is not what the mesh has loaded" in taken.problems[0]
    assert rank.slots(SECOND) == (4,)


def test_what_another_rank_has_read_is_known(folder: Path, tmp_path: Path) -> None:
    """The rank that was lost has left its checksums; this one has never read the tensor."""
    name = f"model.layers.{SECOND}.mlp.experts.5.down_proj.weight"
    config, checksums, saved = load_model_config(folder), Checksums(), tmp_path / "checksums.1"
    values = Checkpoint(folder, config, checksums).tensor(name)
    checksums.save(saved)
    saved.write_text(saved.read_text().replace(str(kernels.checksum(values)), "77"))
    rank = _rank(folder, learn=[saved])
    rank.want({SECOND: (4, 5)})
    taken = rank.finish()
    assert (taken.experts, taken.refused) == ({SECOND: (4,)}, {SECOND: (5,)})
    assert f"{name} is not what the mesh has loaded" in taken.problems[0]
    rank.take_over.close()


def test_a_truncated_file_is_refused_by_name(rank: _Rank) -> None:
    path = rank.folder / "model.safetensors"
    os.truncate(path, 5000)
    rank.want({SECOND: (4, 5)})
    taken = rank.finish()
    assert taken.experts == {}
    assert all("is truncated" in problem for problem in taken.problems)
    assert len(taken.problems) == 2
    assert taken.to_message() == Hosting({}, {SECOND: [4, 5]}, "; ".join(taken.problems))
    assert rank.slots(SECOND) == ()
    assert rank.slots(FIRST) == HERE


def test_the_last_of_the_memory_is_not_taken(folder: Path) -> None:
    free = [SPARE_BYTES + (1 << 20)]
    rank = _rank(folder, free_memory=lambda: free[0])
    rank.want({FIRST: (2,)})
    assert rank.finish().experts == {FIRST: (2,)}
    free[0] = SPARE_BYTES
    rank.want({FIRST: (2, 3)})
    taken = rank.finish()
    assert taken.experts == {FIRST: (2,)}
    assert "expert 3 of layer 1 cannot be taken over" in taken.problems[0]
    assert "256.00 MiB free" in taken.problems[0]
    rank.take_over.close()


def test_closing_leaves_the_rest(rank: _Rank) -> None:
    rank.want({FIRST: tuple(range(rank.checkpoint.config.num_experts))})
    rank.take_over.close()
    rank.take_over.close()
