"""Requests whose answers must not depend on anything but themselves, and what of an answer is compared."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from tests.end_to_end.harness import Mesh

# Every way to draw a token: greedy, by temperature, cut in three ways, penalised, biased.
SAMPLINGS: tuple[Mapping[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "top_p": 1.0},
    {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0.9, "top_p": 0.95, "logit_bias": {"7": 2.5, "11": -100}},
    {"temperature": 0, "min_tokens": 3},
)


def probes(
    vocab_size: int, lengths: Sequence[int], *, seed: int = 0, new_tokens: tuple[int, int] = (4, 12), **fields: Any
) -> list[dict[str, Any]]:
    """One request for each length, its prompt random, its sampling the next of SAMPLINGS. `fields` go into all."""
    draw = random.Random(seed)
    return [
        {
            "prompt": draw.choices(range(3, vocab_size), k=length),
            "max_tokens": draw.randint(*new_tokens),
            "seed": 1000 + index,
            "echo": index % 2 == 0,
            "logprobs": 3,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        | dict(SAMPLINGS[index % len(SAMPLINGS)])
        | fields
        for index, length in enumerate(lengths)
    ]


def substance(body: Mapping[str, Any]) -> list[Any]:
    """All of an answer that the model decides: tokens, every float, and why it ended. Compared with ==."""
    return [[choice["token_ids"], choice["logprobs"], choice["finish_reason"]] for choice in body["choices"]]


def alone(mesh: Mesh, requests: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The answers to requests that have the mesh for themselves, one after another."""
    return [substance(mesh.complete(**request)) for request in requests]


def together(mesh: Mesh, requests: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The answers to requests sent all at once."""
    return [substance(body) for body in mesh.complete_all(requests)]
