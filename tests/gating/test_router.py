"""The router chooses as the oracle's does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kernels
from gating import Router
from mesh_config import load_model_config
from moemesh.checkpoint import Checkpoint
from tests.oracle import ORACLE_CASES, OracleCase, oracle_model

CASES = [case for case in ORACLE_CASES if case.name in ("v3_plain", "v3_kimi_like", "v2_lite_like", "v2_group_limited")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_choices_and_weights_equal_the_oracles(case: OracleCase, tmp_path: Path) -> None:
    folder = case.write(tmp_path / "model")
    config = load_model_config(folder)
    layer = config.moe_layers[0]
    prefix = f"model.layers.{layer}.mlp.gate."
    checkpoint = Checkpoint(folder, config)
    bias = checkpoint.float32(f"{prefix}e_score_correction_bias") if config.scoring == "sigmoid" else None
    router = Router(config, kernels.pack_linear(checkpoint.float32(f"{prefix}weight")), bias)
    x_TH = torch.randn(50, config.hidden_size, generator=torch.Generator().manual_seed(3))
    ids, weights = router.route(x_TH)
    with torch.no_grad():
        _, their_weights, their_ids = oracle_model(folder).model.layers[layer].mlp.gate(x_TH)
    order, theirs = ids.argsort(dim=1), their_ids.argsort(dim=1)
    assert torch.equal(ids.long().gather(1, order), their_ids.gather(1, theirs))
    torch.testing.assert_close(weights.gather(1, order), their_weights.gather(1, theirs), atol=1e-5, rtol=1e-5)
