"""What was loaded once is recognised, and anything else refused by name."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mesh_config import load_model_config
from moemesh.checkpoint import Checkpoint, CheckpointError
from moemesh.checksums import Checksums
from tests.moemesh.test_checkpoint import EXPERT, Q_B, rewrite
from tests.oracle import write_random_checkpoint


def _open(folder: Path, checksums: Checksums) -> Checkpoint:
    return Checkpoint(folder, load_model_config(folder), checksums)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "model", 1)


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Path:
    """What a rank has left that read an expert whole and some rows of a projection."""
    first = Checksums()
    checkpoint = _open(folder, first)
    checkpoint.weight(EXPERT)
    checkpoint.rows(Q_B, 2, 5)
    first.save(tmp_path / "checksums.0")
    return tmp_path / "checksums.0"


def test_the_same_bytes_are_accepted(folder: Path, saved: Path) -> None:
    checksums = Checksums()
    checksums.learn([saved])
    checkpoint = _open(folder, checksums)
    checkpoint.weight(EXPERT)
    checkpoint.rows(Q_B, 2, 5)
    assert checksums.unknown == 0
    checkpoint.rows(Q_B, 2, 6)
    assert checksums.unknown == 1


def test_a_changed_tensor_is_refused_by_name(folder: Path, saved: Path) -> None:
    rewrite(folder, lambda tensors: tensors[EXPERT][3, 1:2].neg_())
    checksums = Checksums()
    checksums.learn([saved])
    checkpoint = _open(folder, checksums)
    checkpoint.rows(Q_B, 2, 5)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {EXPERT} is not what the mesh has loaded"):
        checkpoint.weight(EXPERT)


def test_what_changes_between_two_reads_is_refused_too(folder: Path) -> None:
    checkpoint = _open(folder, Checksums())
    checkpoint.weight(EXPERT)
    rewrite(folder, lambda tensors: tensors[EXPERT].neg_())
    checkpoint.close()
    with pytest.raises(CheckpointError, match=EXPERT):
        checkpoint.weight(EXPERT)


def test_what_cannot_be_kept_or_read_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checksums = Checksums()
    (tmp_path / "broken").write_text("[1]")
    with caplog.at_level(logging.WARNING):
        checksums.save(tmp_path / "missing" / "file")
        checksums.learn([tmp_path / "broken", tmp_path / "nothing"])
    assert "cannot be kept" in caplog.text
    assert caplog.text.count("holds no checksums") == 2


def test_ranks_that_save_at_the_same_time_are_not_in_each_others_way(tmp_path: Path) -> None:
    paths = [tmp_path / f"checksums.{rank}" for rank in range(4)]
    with ThreadPoolExecutor(len(paths)) as threads:
        for _ in range(50):
            list(threads.map(Checksums().save, paths))
            assert sorted(tmp_path.iterdir()) == paths
