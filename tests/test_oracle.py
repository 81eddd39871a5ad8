"""The oracle itself against transformers' own loading, of plain checkpoints and of both RoPE spellings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from tests.oracle import ORACLE_CONFIGS, dequantize, oracle_greedy, oracle_logprobs
from tests.random_checkpoint import quantize_blocks

PROMPT = list(range(5, 29))

LOADED_AS_THEY_ARE = [
    "v3_plain", "v3_yarn_mscale_old_spelling", "v3_kimi_like", "v3_attention_bias_no_shared", "v3_halves_rotated_tied",
    "v2_lite_like", "v2_group_limited",
]  # fmt: skip


def logprobs_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([PROMPT]), use_cache=False).logits[0].float(), dim=-1)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", LOADED_AS_THEY_ARE)
def test_the_oracle_is_what_from_pretrained_gives(name: str, tmp_path: Path) -> None:
    case = ORACLE_CONFIGS[name]
    folder = case.write(tmp_path)
    loader: Any = DeepseekV3ForCausalLM if case.arch == "v3" else DeepseekV2ForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(oracle_logprobs(folder, PROMPT), logprobs_of(model), atol=2e-5, rtol=0)


def test_fp8_blocks() -> None:
    """One scale per 128x128 block, smaller at the edges; the values are off by at most half a step of e4m3."""
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    values, scale = quantize_blocks(weight)
    assert scale.shape == (2, 3)
    assert values.dtype == torch.float8_e4m3fn
    assert values.float().abs().amax() == 448
    restored = dequantize({"w": values, "w_scale_inv": scale})["w"]
    assert ((restored - weight).abs() <= weight.abs() / 16 + scale.max() * 2**-9).all()
    expected = values[130:, 260:].float() * scale[1, 2]
    assert torch.equal(restored[130:, 260:], expected)


def test_logits_are_neither_flat_nor_peaked(tmp_path: Path) -> None:
    for name, case in ORACLE_CONFIGS.items():
        logprobs = oracle_logprobs(case.write(tmp_path / name), PROMPT)
        assert 0.8 < logprobs.std(dim=-1).mean() < 1.3, name


def test_greedy_follows_the_logprobs(tmp_path: Path) -> None:
    folder = ORACLE_CONFIGS["v3_plain"].write(tmp_path)
    first, second = oracle_greedy(folder, PROMPT, 2)
    logprobs = oracle_logprobs(folder, [*PROMPT, first])
    assert (first, second) == (int(logprobs[-2].argmax()), int(logprobs[-1].argmax()))
