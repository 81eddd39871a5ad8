"""`moemesh plan`: the sizes of a mesh on machines that are not here, and what the loss of a rank would cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mesh_config import ConfigError
from moemesh.options import OptionsError, PlanOptions
from moemesh.plan import PlanReport, plan_report
from tests.mesh_config.test_model_config import DEEPSEEK_V3
from tests.moemesh.test_check import line_of
from tests.oracle import write_random_checkpoint


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """DeepSeek-V3 without its weights: planning needs none."""
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    return tmp_path


def _report(folder: Path, **options: Any) -> PlanReport:
    return plan_report(PlanOptions(model=str(folder), **options))


def test_the_full_model_on_sixteen_gpus(full: Path) -> None:
    report = _report(full, gpus=16, gpu="H100-80GB", max_model_len=8192, read_bandwidth="1GB")
    text = str(report)
    assert report.ok
    assert "16 (H100-80GB each) on 2 hosts" in line_of(text, "ranks ")
    assert "2 groups of 8 ranks" in line_of(text, "attention")
    assert "experts 38.07 GiB" in line_of(text, "ranks 0-15")
    # A rank's 928 experts on 15 others: 62 of 44 MB each, 1 GB a second.
    assert "covered by reload: 928 experts without a replica, about 2.7 s" in text


def test_replicas_cover_a_loss_and_need_memory(full: Path) -> None:
    report = _report(full, gpus=8, gpu="H200-141GB", redundant_experts=256, max_model_len=8192)
    text = str(report)
    assert "ranks 0-7   covered by replicas" in text
    assert not report.ok
    assert "ranks 0-7: 39.37 GiB more than the 126.36 GiB there are" in report.problems[0]
    assert _report(full, gpus=16, gpu="H200-141GB", redundant_experts=256, max_model_len=8192).ok


def test_where_no_room_is_left_a_loss_is_not_covered(full: Path) -> None:
    text = str(_report(full, gpus=16, gpu="H100-80GB", max_model_len=8192, memory="59GiB"))
    assert "not covered: nobody has room for its 928 experts without a replica" in text


def test_cpu_ranks_share_the_memory_of_their_host(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", 1)
    report = _report(folder, ranks=4, ranks_per_host=2, attention_ranks=1, memory="2GiB")
    text = str(report)
    assert report.ok
    assert "4 (CPU) on 2 hosts" in line_of(text, "ranks ")
    assert line_of(text, "rank 0").split()[:2] == ["rank", "0"]
    assert "covered by reload" in text
    assert not _report(folder, ranks=4, ranks_per_host=2, memory="100MiB").ok


def test_the_cache_has_the_size_asked_for(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", 1)
    assert "224 tokens" in line_of(str(_report(folder, num_gpu_blocks_override=7)), "cache")


def test_what_cannot_be_is_refused(full: Path) -> None:
    with pytest.raises(OptionsError, match="--ranks 4, but --gpus 8"):
        PlanOptions(model=str(full), ranks=4, gpus=8)
    with pytest.raises(ConfigError, match="redundant-experts = 257: 2 ranks can hold at most 256 further copies"):
        _report(full, ranks=2, redundant_experts=257)
