"""The controller between fake ranks and those who ask: admission, delivery, cancelling, failure, draining."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from mesh_config import even_placement, make_mesh
from moemesh import controller as controller_module
from moemesh.admission import AdmissionLimits
from moemesh.controller import Controller
from moemesh.engine_client import (
    EngineFailed,
    GenerationRequest,
    InvalidRequest,
    NotReady,
    Overloaded,
    TokenOutput,
)
from moemesh.membership_records import MembershipSettings
from moemesh.metrics import Metrics
from moemesh.random_numbers import choice_seed
from moemesh.sampling_params import SamplingParams
from tests.moemesh.gateway.fake_engine import model_config
from transport import messages
from transport.control import Channel
from transport.errors import Overloaded as TransportOverloaded
from transport.life import Life

BLOCKS = 4  # of 32 tokens


class FakeRanks:
    """The control plane without sockets: what the ranks would say is put in, what they are told is kept."""

    def __init__(self) -> None:
        self.sent: list[tuple[Life, messages.Message]] = []
        self.said: asyncio.Queue[tuple[Life, messages.Message]] = asyncio.Queue()
        self.full = False
        self.metrics = Metrics()

    def send(self, life: Life, message: messages.Message, channel: Channel = "rank") -> None:
        if self.full:
            raise TransportOverloaded("its queue is full")
        self.sent.append((life, message))

    async def receive(self) -> tuple[Life, messages.Message]:
        return await self.said.get()

    async def say(self, *said: messages.Message, by: Life | None = None) -> None:
        """Each of them has been dealt with when this returns. Said by the rank that it names, else by rank 0."""
        for message in said:
            self.said.put_nowait((by or Life(getattr(message, "rank", 0)), message))
        while not self.said.empty():
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    def told(self, kind: type[Any]) -> list[Any]:
        return [message for _, message in self.sent if isinstance(message, kind)]


def hello(
    rank: int, isa: str = "avx2", *, host: str = "elsewhere", pid: int = 100, arithmetic: str = "auto"
) -> messages.Hello:
    return messages.Hello(rank=rank, pid=pid, incarnation=0, host=host, num_threads=1, isa=isa, arithmetic=arithmetic)


def tokens(request_id: int, position: int, *ids: int, generation: int = 0, **fields: Any) -> messages.Outputs:
    item = messages.OutputItem(request_id=request_id, position=position, token_ids=list(ids), **fields)
    return messages.Outputs(rank=0, generation=generation, items=[item])


def request(*prompt: int, choice: int = 0, **params: Any) -> GenerationRequest:
    return GenerationRequest(prompt_token_ids=prompt or (5, 6), params=SamplingParams(**params), choice=choice)


@asynccontextmanager
async def loading(
    num_ranks: int = 1,
    *,
    attention_ranks: int | None = None,
    attention_tp: int = 1,
    arithmetic: str = "float32",
    queue_timeout: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> AsyncIterator[tuple[Controller, FakeRanks]]:
    """A mesh of ranks that have not said anything yet."""
    model = model_config()
    mesh = make_mesh(
        model,
        num_ranks=num_ranks,
        attention_ranks=attention_ranks,
        attention_tp=attention_tp,
        max_model_len=512,
        num_cache_blocks=BLOCKS,
        arithmetic=arithmetic,
    )
    placement = even_placement(model.num_experts, model.moe_layers, mesh.expert_ranks, num_ranks)
    ranks = FakeRanks()
    controller = Controller(
        ranks,
        model_config=model,
        mesh=mesh,
        placement=placement,
        expert_bytes=1,
        # No test here lasts as long: none of these ranks has a heart.
        settings=MembershipSettings(**({"suspect_after": 1000.0} | settings)),
        limits=AdmissionLimits(max_num_seqs=8, restart_tokens=64, max_queued_requests=2, queue_timeout=queue_timeout),
        metrics=ranks.metrics,
        frontend_pid=1,
        clock=clock,
    )
    serving = asyncio.create_task(controller.run())
    try:
        yield controller, ranks
    finally:
        serving.cancel()


@asynccontextmanager
async def ready(
    num_ranks: int = 1, *, host: str = "elsewhere", pid: int = 100, **fields: Any
) -> AsyncIterator[tuple[Controller, FakeRanks]]:
    async with loading(num_ranks, **fields) as (controller, ranks):
        for rank in range(num_ranks):
            await ranks.say(hello(rank, host=host, pid=pid), messages.Ready(rank=rank, num_blocks=BLOCKS))
        yield controller, ranks


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await test

    asyncio.run(limited())


async def collect(controller: Controller, asked: GenerationRequest) -> list[TokenOutput]:
    async with aclosing(controller.generate(asked)) as outputs:
        return [output async for output in outputs]


async def started(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = asyncio.create_task(coroutine)
    await asyncio.sleep(0)
    return task


def test_ranks_get_the_plan_and_requests_are_taken_when_all_are_ready() -> None:
    async def check() -> None:
        async with loading(2) as (controller, ranks):
            await ranks.say(hello(0), messages.Progress(rank=0, stage="loading", done=3, total=9))
            assert "rank 0: loading 3/9" in controller.status().detail
            with pytest.raises(NotReady, match="2 of 2 ranks are not up"):
                await collect(controller, request())
            await ranks.say(hello(1), messages.Ready(rank=0, num_blocks=1), messages.Ready(rank=1, num_blocks=1))
            await controller.wait_ready()
            assert controller.status().ready
            assert [message.config["num_ranks"] for message in ranks.told(messages.Start)] == [2, 2]

    run(check())


def test_ranks_of_different_arithmetic_are_no_mesh() -> None:
    async def check() -> None:
        async with loading(2) as (controller, ranks):
            await ranks.say(hello(0, "avx2"), hello(1, "torch"))
            with pytest.raises(EngineFailed, match="some ranks compute with the C kernels, others without"):
                await controller.wait_ready()
            assert controller.status().state == "failed"
        async with loading(2) as (controller, ranks):
            await ranks.say(hello(0), hello(1, arithmetic="bf16x3"))
            with pytest.raises(EngineFailed, match=r"rank 1 was started to compute in bf16x3, the mesh in float32"):
                await controller.wait_ready()

    run(check())


@pytest.mark.parametrize(("second", "settled"), [("amx", "bf16x3"), ("avx512", "float32")])
def test_an_open_arithmetic_is_settled_by_all_ranks_before_any_starts(second: str, settled: str) -> None:
    async def check() -> None:
        async with loading(2, arithmetic="auto") as (controller, ranks):
            await ranks.say(hello(0, "amx"))
            assert not ranks.told(messages.Start)
            assert controller.mesh()["arithmetic"] == "auto"
            await ranks.say(hello(1, second))
            assert [message.config["arithmetic"] for message in ranks.told(messages.Start)] == [settled, settled]
            assert controller.mesh()["arithmetic"] == settled

    run(check())


def test_tokens_come_once_and_in_order() -> None:
    async def check() -> None:
        async with ready() as (controller, ranks):
            asked = await started(collect(controller, request(7, 8, 9, max_tokens=4)))
            (submit,) = ranks.told(messages.Submit)
            assert (submit.prompt, submit.params["max_tokens"]) == ([7, 8, 9], 4)
            await ranks.say(tokens(1, 3, 20, cached_tokens=2), tokens(1, 4, 21, 22), tokens(99, 0, 1))
            # A rank that starts the request again says known tokens again: only the new one counts.
            await ranks.say(tokens(1, 3, 20, 21, 22, 23, finish_reason="length"))
            outputs = await asked
            assert [token for output in outputs for token in output.token_ids] == [20, 21, 22, 23]
            assert (outputs[0].cached_tokens, outputs[-1].finish_reason) == (2, "length")
            assert controller.num_requests == 0
            assert not ranks.told(messages.Cancel)

    run(check())


def test_a_stop_token_is_named_and_logprobs_are_read() -> None:
    async def check() -> None:
        async with ready() as (controller, ranks):
            asked = await started(collect(controller, request(max_tokens=4, logprobs=1)))
            await ranks.say(tokens(1, 2, 20, finish_reason="stop", logprobs=[[20, -0.5, 1, [20], [-0.5]]]))
            (output,) = await asked
            assert output.stop_token == 20
            assert output.logprobs is not None
            assert (output.logprobs[0].token_id, output.logprobs[0].top_ids) == (20, (20,))

    run(check())


def test_each_choice_has_its_seed_and_the_longest_answer_that_fits() -> None:
    async def check() -> None:
        async with ready() as (controller, ranks):
            requests = [request(seed=7, choice=choice, max_tokens=None) for choice in (0, 1)]
            asked = [await started(collect(controller, asking)) for asking in requests]
            submits = ranks.told(messages.Submit)
            assert [submit.params["seed"] for submit in submits] == [choice_seed(7, 0), choice_seed(7, 1)]
            # What the cache holds beside the two tokens of the prompt, and one more, which is never cached.
            assert {submit.params["max_tokens"] for submit in submits} == {BLOCKS * 32 - 2 + 1}
            for task in asked:
                task.cancel()

    run(check())


def test_requests_go_to_the_group_with_the_least_to_do() -> None:
    async def check() -> None:
        async with ready(2) as (controller, ranks):
            asked = [await started(collect(controller, request(max_tokens=count))) for count in (50, 10, 10)]
            assert [life.rank for life, message in ranks.sent if isinstance(message, messages.Submit)] == [0, 1, 1]
            for task in asked:
                task.cancel()

    run(check())


def test_who_leaves_early_is_cancelled_at_the_rank() -> None:
    async def check() -> None:
        async with ready() as (controller, ranks):
            stream = controller.generate(request(max_tokens=9))
            first = await started(anext(stream))
            await ranks.say(tokens(1, 2, 20))
            assert (await first).token_ids == [20]
            await stream.aclose()
            assert ranks.told(messages.Cancel) == [messages.Cancel(request_id=1)]
            assert controller.num_requests == 0
            await ranks.say(tokens(1, 3, 21))  # they crossed: nobody is there to take it

    run(check())


@pytest.mark.parametrize(("refused", "kind"), [(True, InvalidRequest), (False, EngineFailed)])
def test_what_a_rank_cannot_compute_ends_with_its_reason(refused: bool, kind: type[Exception]) -> None:
    async def check() -> None:
        async with ready() as (controller, ranks):
            asked = await started(collect(controller, request()))
            await ranks.say(tokens(1, 0, error="too long for the cache", refused=refused))
            with pytest.raises(kind, match="too long for the cache"):
                await asked
            assert controller.num_requests == 0

    run(check())


def test_a_request_waits_for_a_rank_that_takes_no_messages() -> None:
    async def check() -> None:
        async with ready() as (controller, ranks):
            ranks.full = True
            asked = await started(collect(controller, request(max_tokens=1)))
            assert not ranks.told(messages.Submit)
            ranks.full = False
            while not ranks.told(messages.Submit):
                await asyncio.sleep(0)
            await ranks.say(tokens(1, 2, 20, finish_reason="length"))
            assert (await asked)[0].token_ids == [20]

    run(check())


def test_no_more_may_wait_than_the_limit_says() -> None:
    async def check() -> None:
        async with ready() as (controller, ranks):
            asked = [await started(collect(controller, request())) for _ in range(14)]
            assert len(ranks.told(messages.Submit)) == 12
            with pytest.raises(Overloaded, match="2 requests are waiting, at most 2 may") as refused:
                await collect(controller, request())
            assert refused.value.retry_after >= 1.0
            await ranks.say(tokens(1, 2, 20, finish_reason="length"))
            await asked[0]
            assert len(ranks.told(messages.Submit)) == 13
            for task in asked:
                task.cancel()

    run(check())


def test_ranks_are_told_which_model_it_is() -> None:
    """Who finds another config.json than the frontend did does not join."""

    async def check() -> None:
        async with ready(2) as (_, ranks):
            other = replace(model_config(), rms_norm_eps=1e-3)
            assert {start.model for start in ranks.told(messages.Start)} == {model_config().fingerprint}
            assert other.fingerprint != model_config().fingerprint

    run(check())


def test_a_failed_rank_ends_every_stream() -> None:
    async def check() -> None:
        async with ready(2, attention_ranks=1, respawn=False) as (controller, ranks):
            asked = [await started(collect(controller, request())) for _ in range(2)]
            await ranks.say(messages.Failed(rank=0, error="out of memory"))
            for task in asked:
                with pytest.raises(
                    EngineFailed, match="the mesh has failed: rank 0, with the last attention group: out of memory"
                ):
                    await task
            with pytest.raises(NotReady):
                await collect(controller, request())
            await controller.wait_failed()
            assert controller.mesh()["ranks"][0]["state"] == "dead"

    run(check())


def test_a_mesh_in_which_no_token_moves_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with ready() as (controller, _):
            asked = await started(collect(controller, request()))
            assert controller.status().ready
            monkeypatch.setattr(controller_module, "STALL_SECONDS", -1.0)
            status = controller.status()
            assert (status.state, status.ready) == ("ready", False)
            assert "1 requests in flight, but no step" in status.detail
            asked.cancel()

    run(check())


def test_draining_lets_requests_finish_and_takes_no_new_ones() -> None:
    async def check() -> None:
        async with ready() as (controller, ranks):
            asked = await started(collect(controller, request(max_tokens=1)))
            draining = await started(controller.drain(timeout=20))
            assert controller.status().state == "draining"
            with pytest.raises(NotReady, match="draining 1 requests"):
                await collect(controller, request())
            await ranks.say(tokens(1, 2, 20, finish_reason="length"))
            assert await draining == 0
            assert (await asked)[0].token_ids == [20]
            controller.stop_ranks()
            assert ranks.told(messages.Stop) == [messages.Stop()]

    run(check())


def test_who_does_not_finish_while_draining_is_told() -> None:
    async def check() -> None:
        async with ready() as (controller, _):
            asked = await started(collect(controller, request()))
            assert await controller.drain(timeout=0.01) == 1
            with pytest.raises(EngineFailed, match="shutting down"):
                await asked

    run(check())


def test_what_a_client_has_not_read_yet_takes_no_place() -> None:
    async def check() -> None:
        async with ready(2, attention_ranks=1) as (controller, ranks):
            slow = [controller.generate(request(max_tokens=1)) for _ in range(12)]  # all that a group is given at most
            asked = [await started(anext(stream)) for stream in slow]
            waiting = await started(collect(controller, request(max_tokens=1)))
            assert len(ranks.told(messages.Submit)) == 12
            await ranks.say(*(tokens(number, 2, 20) for number in range(1, 13)))
            assert [(await each).token_ids for each in asked] == [[20]] * 12
            await ranks.say(*(tokens(number, 3, 21, finish_reason="length") for number in range(1, 13)))
            assert len(ranks.told(messages.Submit)) == 13, "the last one's turn, though nobody has read the others' end"
            await ranks.say(tokens(13, 2, 20, finish_reason="length"))
            await waiting
            assert controller.num_requests == 12
            for stream in slow:
                assert [output.finish_reason async for output in stream] == ["length"]
            assert controller.num_requests == 0
            assert not ranks.told(messages.Cancel)

    run(check())
