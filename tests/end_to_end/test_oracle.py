"""Every config's numbers over HTTP against transformers' own classes, in float32; FP8 against the dequantised model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.harness import SMALL_CACHE, moemesh_command, started
from tests.oracle import ORACLE_CASES, OracleCase, oracle_model
from tests.random_checkpoint import one_thread

TOLERANCE = 2e-4
PROMPT_LENGTH = 61
NUM_NEW = 8
NUM_TOP = 5

# Every rank slices what it loads, by heads and by experts; these are the configs where that differs.
ON_TWO_RANKS = {
    "v3_no_q_lora_two_shared_unnormalised",
    "v3_awkward_sizes",
    "v3_fp8",
}


@torch.no_grad()
@one_thread()
def logprobs_of(model: Any, token_ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(model(torch.tensor([token_ids]), use_cache=False).logits[0].float(), dim=-1)


# A server for each takes its time to start; tests/simulation/test_oracle.py compares these, too, without one.
WITHOUT_A_SERVER = frozenset(
    {
        "v3_yarn_mscales_differ_no_truncate",
        "v3_yarn_attention_factor",
        "v3_all_dense",
        "v3_every_second_layer_sparse",
        "v3_float16",
        "v3_fp8_partial_blocks",
    }
)
OVER_HTTP = tuple(case for case in ORACLE_CASES if case.name not in WITHOUT_A_SERVER)


@pytest.mark.parametrize("case", OVER_HTTP, ids=lambda case: case.name)
def test_log_probabilities_and_greedy_tokens(case: OracleCase, tmp_path: Path) -> None:
    folder = case.write(tmp_path, seed=1)
    ranks = "2" if case.name in ON_TWO_RANKS else "1"
    with started(moemesh_command("serve", str(folder), "--ranks", ranks, "--port", "0", *SMALL_CACHE)) as mesh:
        model = oracle_model(folder)  # while the mesh starts
        prompt = random.Random(case.name).choices(range(2, model.config.vocab_size), k=PROMPT_LENGTH)
        mesh.wait_ready()
        body = mesh.complete(
            prompt=prompt,
            max_tokens=NUM_NEW,
            temperature=0,
            ignore_eos=True,
            echo=True,
            logprobs=NUM_TOP,
            return_tokens_as_token_ids=True,
        )
        mesh.stop()
    check_logprobs(model, prompt, body["choices"][0]["logprobs"])


def check_logprobs(model: Any, prompt: list[int], logprobs: dict[str, Any]) -> None:
    token_ids = [int(name.removeprefix("token_id:")) for name in logprobs["tokens"]]
    assert token_ids[:PROMPT_LENGTH] == prompt
    assert len(token_ids) == PROMPT_LENGTH + NUM_NEW
    assert logprobs["token_logprobs"][0] is None
    expected_TV = logprobs_of(model, token_ids)
    for position, token_id in enumerate(token_ids[1:], start=1):
        row_V = expected_TV[position - 1]
        assert logprobs["token_logprobs"][position] == pytest.approx(float(row_V[token_id]), abs=TOLERANCE)
        check_top(row_V, token_id, logprobs["top_logprobs"][position])
        if position >= PROMPT_LENGTH:
            # The best one, unless two are as good as each other within what either side may be off.
            assert row_V[token_id] >= row_V.max() - 2 * TOLERANCE


def check_top(row_V: torch.Tensor, token_id: int, top: dict[str, float]) -> None:
    found = {int(name.removeprefix("token_id:")): value for name, value in top.items()}
    assert token_id in found
    for other, value in found.items():
        assert value == pytest.approx(float(row_V[other]), abs=TOLERANCE)
    best = sorted(found.values(), reverse=True)[:NUM_TOP]
    assert best == pytest.approx(row_V.topk(NUM_TOP).values.tolist(), abs=TOLERANCE)
