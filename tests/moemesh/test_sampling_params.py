from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moemesh.sampling_params import SamplingParams, SamplingParamsError

REFUSED: list[tuple[str, Any]] = [
    *[
        (name, value)
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        for value in (math.nan, math.inf, -math.inf, -3, "1", True, None, 10**400)
    ],
    ("top_p", 0),
    ("top_p", 1.01),
    ("min_p", 1.01),
    ("presence_penalty", 2.01),
    ("repetition_penalty", 0),
    ("n", 0),
    ("n", 129),
    ("n", 1.0),
    ("n", True),
    ("max_tokens", -1),
    ("min_tokens", 17),
    ("top_k", -2),
    ("seed", 2**63),
    ("logprobs", 21),
    ("logprobs", -1),
    ("prompt_logprobs", 21),
    ("stop", ("",)),
    ("stop", (1,)),
    ("stop", 5),
    ("stop", tuple("abc") * 22),
    ("stop", ("x" * 1025,)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", ("a",)),
    ("stop_token_ids", tuple(range(1025))),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: 101}),
    ("logit_bias", {-1: 1}),
    ("logit_bias", {"1": 1}),
    ("logit_bias", [1]),
    ("logit_bias", dict.fromkeys(range(1025), 0)),
    ("ignore_eos", 1),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(SamplingParamsError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert len(str(caught.value)) < 300


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.temperature, params.top_p, params.top_k) == (1, 16, 1.0, 1.0, 0)
    assert params.to_wire() == {}
    assert not params.greedy


def test_greedy_is_below_what_float32_can_divide_by() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_lists_and_a_single_stop_become_tuples() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1, 2])  # type: ignore[arg-type]
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()  # type: ignore[arg-type]


def test_no_limit_on_tokens() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=5).max_tokens is None
    assert SamplingParams(max_tokens=0).max_tokens == 0


PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 128),
    max_tokens=st.none() | st.integers(10, 100),
    min_tokens=st.integers(0, 10),
    temperature=st.floats(0, 10),
    top_k=st.integers(-1, 100),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 1000), st.floats(-100, 100), max_size=5),
    stop=st.lists(st.text(min_size=1), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 1000), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)


@given(PARAMS)
def test_the_wire_keeps_everything(params: SamplingParams) -> None:
    wire = params.to_wire()
    assert all(type(name) is str for name in wire)
    assert SamplingParams.from_wire(wire) == params


@pytest.mark.parametrize(
    "wire", [{"unknown": 1}, {"logit_bias": {"1": 2}}, {"logit_bias": [[1]]}, {"logit_bias": [["a", 1]]}, {"n": "x"}]
)
def test_the_wire_is_checked(wire: dict[str, Any]) -> None:
    with pytest.raises(SamplingParamsError, match=next(iter(wire))):
        SamplingParams.from_wire(wire)
