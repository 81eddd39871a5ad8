"""A checkpoint in which the embedding of one token is no number: who meets it gets an error, nobody else notices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.end_to_end.harness import Mesh, eventually, running_server
from tests.end_to_end.probes import alone, probes, substance
from tests.random_checkpoint import write_random_checkpoint

POISON = 9
VOCAB = 320


CASES = {"nan, 1 rank": (torch.nan, ()), "inf, 4 ranks": (torch.inf, ("--ranks", "4", "--attention-tp", "2"))}


@pytest.fixture(scope="module", params=CASES)
def mesh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    bad, shape = CASES[request.param]
    folder = write_random_checkpoint(tmp_path_factory.mktemp("model"), seed=5, num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = bad
    save_file(tensors, folder / "model.safetensors")
    with running_server(str(folder), *shape) as mesh:
        yield mesh


def healthy(count: int) -> list[dict[str, Any]]:
    """Requests that neither have the poisoned token nor may draw it."""
    return [
        request
        | {
            "prompt": [token for token in request["prompt"] if token != POISON],
            "logit_bias": {str(POISON): -100},
        }
        for request in probes(VOCAB, [20 + 13 * index for index in range(count)], ignore_eos=True)
    ]


def poisoned(**fields: Any) -> dict[str, Any]:
    return {"prompt": [*range(20, 60), POISON, *range(60, 80)], "max_tokens": 8, "temperature": 0} | fields


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 1.0, "seed": 1}, {"logprobs": 2}, {"prompt_logprobs": 1}, {"echo": True}, {"n": 3, "seed": 2}],
    ids=str,
)
def test_who_has_it_in_the_prompt_gets_an_error(mesh: Mesh, fields: dict[str, Any]) -> None:
    before = mesh.total("moemesh_nonfinite_logits_total")
    answer = mesh.post("/v1/completions", poisoned(**fields))
    assert (answer.status, answer.body["error"]["code"]) == (500, "engine_failed")
    assert "not finite" in answer.body["error"]["message"]
    eventually(lambda: mesh.total("moemesh_nonfinite_logits_total") > before, what="it is counted")


def test_a_stream_that_draws_it_ends_with_an_error(mesh: Mesh) -> None:
    fields = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "logit_bias": {str(POISON): 100}}
    with mesh.stream(**fields, return_token_ids=True) as events:
        found = list(events)
    assert found[0] is not None
    assert found[0]["choices"][0]["token_ids"] == [POISON]
    assert found[-1] is not None, "[DONE] is for whole answers"
    assert "not finite" in found[-1]["error"]["message"]


def test_neighbours_do_not_notice(mesh: Mesh) -> None:
    requests = healthy(6)
    expected = alone(mesh, requests)
    poison = [poisoned(), poisoned(temperature=1.0, seed=3), poisoned(logprobs=1), poisoned(echo=True, logprobs=1)]
    answers = mesh.post_all([request for pair in zip(requests, [*poison, *poison], strict=False) for request in pair])
    assert [substance(answer.body) for answer in answers[0::2]] == expected
    assert [answer.status for answer in answers[1::2]] == [500] * 6
    eventually(lambda: mesh.total("moemesh_cache_used_blocks") == 0, what="no block is kept")
