"""The expert service: what arrives together is computed together, and each caller gets its own rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kernels
from experts import ExpertBank, ExpertService, HoldRule, LocalCall, answer_frame
from experts.compact import weighted_rows
from transport.dispatch import ExpertCall
from transport.errors import ProtocolError
from transport.frame import Frame, Header, Kind

HIDDEN, WIDTH, NUM_EXPERTS = 24, 16, 6
RESIDENT = (1, 2, 4, 5)
LAYER = 3


@pytest.fixture
def bank() -> ExpertBank:
    generator = torch.Generator().manual_seed(0)
    packed = kernels.PackedExperts.empty(len(RESIDENT), HIDDEN, WIDTH, dtype=torch.float32)
    for slot in range(len(RESIDENT)):
        gate, up = (torch.randn(WIDTH, HIDDEN, generator=generator) for _ in range(2))
        packed.load(slot, gate, up, torch.randn(HIDDEN, WIDTH, generator=generator))
    return ExpertBank(RESIDENT, NUM_EXPERTS, packed)


@pytest.fixture
def service(bank: ExpertBank) -> ExpertService:
    return ExpertService({LAYER: bank}, rank=9, hidden=HIDDEN, device=torch.device("cpu"))


def _answers(service: ExpertService) -> list[tuple[Header, torch.Tensor]]:
    answers = service.step()
    assert answers is not None
    return answers


def _call(seed: int, experts: list[int], rows: list[int]) -> ExpertCall:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(max(rows) + 1, HIDDEN, generator=generator)
    return ExpertCall(x, torch.tensor(rows, dtype=torch.int32), torch.tensor(experts, dtype=torch.int32))


def _frame(call: ExpertCall, sender: int, *, layer: int = LAYER, **fields: int) -> Frame:
    header = Header(Kind.DISPATCH, sender, layer=layer, **fields)
    return Frame(header, (call.rows_nH, call.slot_row, call.slot_expert))


def _expected(bank: ExpertBank, call: ExpertCall) -> torch.Tensor:
    rows = []
    for row, expert in zip(call.slot_row.tolist(), call.slot_expert.tolist(), strict=True):
        gate, up, down = bank.packed.dense(RESIDENT.index(expert))
        x = call.rows_nH[row]
        rows.append(down @ (torch.nn.functional.silu(gate @ x) * (up @ x)))
    return torch.stack(rows)


CALLS = [_call(1, [1, 4, 4], [0, 0, 1]), _call(2, [2], [0]), _call(3, [1, 2, 4, 5], [2, 0, 1, 2])]


def test_calls_of_one_layer_are_one_batch_and_answered_apart(service: ExpertService, bank: ExpertBank) -> None:
    assert service.submit(_frame(CALLS[0], 7, step=5, micro_batch=1)) is None
    assert service.submit(_frame(CALLS[1], 8)) is None
    local = LocalCall(layer=LAYER, call=CALLS[2])
    service.submit_local(local)
    answers = _answers(service)
    assert service.stats.batches == 1
    assert service.stats.calls == 3
    assert [header.sender for header, _ in answers] == [7, 8]
    assert local.answer is not None
    for (_, answer), call in zip([*answers, (None, local.answer)], CALLS, strict=True):
        torch.testing.assert_close(answer, _expected(bank, call), atol=1e-4, rtol=1e-4)
    frame = answer_frame(answers[0][0], answers[0][1], sender=0)
    assert frame.header == Header(Kind.ANSWER, 0, layer=LAYER, step=5, micro_batch=1)
    assert not service.pending
    assert service.step() is None


def test_company_does_not_change_a_bit(service: ExpertService) -> None:
    alone = []
    for call in CALLS:
        service.submit(_frame(call, 1))
        alone.append(_answers(service)[0][1])
    for call in CALLS:
        service.submit(_frame(call, 1))
    for (_, answer), expected in zip(_answers(service), alone, strict=True):
        assert torch.equal(answer, expected)


def test_the_layer_that_waits_longest_goes_first(bank: ExpertBank) -> None:
    service = ExpertService({1: bank, 2: bank}, rank=9, hidden=HIDDEN, device=torch.device("cpu"))
    for layer in (2, 1, 2):
        service.submit(_frame(CALLS[0], 0, layer=layer))
    assert [[header.layer for header, _ in _answers(service)] for _ in range(2)] == [[2, 2], [1]]


@pytest.mark.parametrize(("layer", "expert"), [(LAYER, 0), (LAYER + 1, 1)])
def test_what_is_not_here_is_said_at_once(service: ExpertService, layer: int, expert: int) -> None:
    frame = _frame(_call(1, [expert], [0]), 4, layer=layer)
    refusal = service.submit(frame)
    assert refusal is not None
    assert refusal.header == replace(frame.header, kind=Kind.NOT_HERE, sender=9)
    assert not service.pending


def test_a_call_that_does_not_fit_the_model_is_refused(service: ExpertService) -> None:
    wrong = ExpertCall(torch.zeros(1, HIDDEN + 1), torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32))
    with pytest.raises(ProtocolError, match=str(HIDDEN)):
        service.submit(_frame(wrong, 0))


def test_compact_answers_are_the_weighted_sums(bank: ExpertBank) -> None:
    call = CALLS[2]
    weights = torch.tensor([0.5, 0.25, 2.0, 1.0])
    answer = _expected(bank, call)
    expected = torch.stack([answer[1] * 0.25, answer[2] * 2.0, answer[0] * 0.5 + answer[3]])
    torch.testing.assert_close(weighted_rows(answer, call, weights), expected)


def test_a_held_layer_waits_for_who_is_about_to_come(bank: ExpertBank) -> None:
    """Two callers, the second of them a little late; reading the weights takes longer than that."""
    time = [0.0]
    rule = HoldRule([1, 2], len(RESIDENT))
    service = ExpertService(
        {1: bank, 2: bank}, rank=9, hidden=HIDDEN, device=torch.device("cpu"), hold=rule, clock=lambda: time[0]
    )
    service.submit(_frame(CALLS[0], 7, layer=1))
    _answers(service)
    rule.computed(1, 1, 1e6)
    batches = []
    for step, layer in [(step, layer) for step in range(1, 8) for layer in (1, 2)]:
        time[0] += 10
        service.submit(_frame(CALLS[0], 7, layer=layer, step=step))
        first = service.step()
        held_for = service.held_for()
        time[0] += 1
        service.submit(_frame(CALLS[1], 8, layer=layer, step=step))
        batches.append((len(first or []), held_for, len(_answers(service))))
    assert batches[0] == (1, None, 1)
    assert batches[-1] == (0, 1.0, 2)
    assert not service.pending
    assert service.held_for() is None
