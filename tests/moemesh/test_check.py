from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moemesh.check import check_model
from tests.oracle import ORACLE_CONFIGS, write_random_checkpoint


def line_of(text: str, label: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(label))


def test_a_sound_model(tmp_path: Path) -> None:
    report = check_model(ORACLE_CONFIGS["v3_fp8"].write(tmp_path))
    text = str(report)
    assert report.ok
    assert text.endswith("ok: this model can be served")
    assert "16 of width 128, 4 per token (noaux_tc, sigmoid, best 2 of 4 groups), 1 shared" in line_of(text, "experts")
    assert "5.14M, 2.70M active per token" in line_of(text, "parameters")
    assert "F8_E4M3" in line_of(text, "stored as")
    assert "in 2 file(s)" in line_of(text, "checkpoint")
    assert "none" in line_of(text, "tokenizer")
    assert [line_of(text, f"{ranks} rank").split()[0] for ranks in (1, 2, 4, 8, 16)] == ["1", "2", "4", "8", "16"]


def test_tokenizer_and_template(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "without chat template" in str(check_model(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert "with chat template" in str(check_model(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{")
    report = check_model(tmp_path)
    assert not report.ok
    assert "tokenizer_config.json: is not valid JSON" in report.problems[0]


def test_models_with_surplus_tensors_and_dense_models(tmp_path: Path) -> None:
    aside = str(check_model(write_random_checkpoint(tmp_path / "mtp", mtp=True)))
    assert "such as model.layers.3." in line_of(aside, "set aside")
    dense = check_model(ORACLE_CONFIGS["v3_all_dense"].write(tmp_path / "dense"))
    assert dense.ok
    assert "experts" not in [line.split()[0] for line in dense.lines]


def test_problems_are_collected(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del tensors["lm_head.weight"]
    save_file(tensors | {"model.norm.weight": torch.zeros(3)}, path)
    report = check_model(tmp_path)
    assert len(report.problems) == 2
    assert "2 problem(s):" in str(report)
    assert line_of(str(report), "memory")


def test_what_is_no_model(tmp_path: Path) -> None:
    report = check_model(tmp_path)
    assert not report.ok
    assert "has no config.json" in report.problems[0]
