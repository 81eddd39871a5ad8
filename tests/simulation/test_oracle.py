"""Every config against transformers' numbers, without a server; end_to_end/test_oracle.py asks over HTTP."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from mesh_config import load_model_config
from moemesh.sampling_params import SamplingParams
from tests.oracle import ORACLE_CASES, OracleCase, oracle_logprobs
from tests.simulation.local_mesh import LocalMesh

PARAMS = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, prompt_logprobs=0, ignore_eos=True)


UNQUANTISED = [case for case in ORACLE_CASES if not case.options.get("fp8")]


@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case.name)
def test_logprobs_equal_the_oracles(case: OracleCase, tmp_path: Path) -> None:
    check_logprobs(case.write(tmp_path, seed=6), int8=False)


def check_logprobs(folder: Path, *, int8: bool) -> None:
    token_ids = random.Random(3).choices(range(2, load_model_config(folder).vocab_size), k=80)
    (result,) = LocalMesh(folder, quantization="int8" if int8 else None).generate([token_ids], PARAMS)
    expected = oracle_logprobs(folder, token_ids, int8=int8)
    scored = [*(result.prompt_logprobs or [])[1:], result.logprobs[0]]
    ours = torch.tensor([entry[1] for entry in scored])
    theirs = expected[torch.arange(len(token_ids)), torch.tensor([entry[0] for entry in scored])]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("case", UNQUANTISED, ids=lambda case: case.name)
def test_int8_is_the_oracle_of_the_rounded_weights(case: OracleCase, tmp_path: Path) -> None:
    check_logprobs(case.write(tmp_path, seed=6), int8=True)
