"""One run: a scenario played to its end, and what is to be complained of."""

from __future__ import annotations

import asyncio
import gc
import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from mesh_config.model_shape import Quantization
from moemesh.engine_client import RequestError
from moemesh.mesh import STOP_SECONDS
from tests.simulation.checker import check
from tests.simulation.faults import play_faults
from tests.simulation.history import History, Stream
from tests.simulation.mesh import SimulatedMesh
from tests.simulation.scenario import Ask, Scenario, Variant
from tests.simulation.tiny_model import Model, requests
from tests.simulation.virtual_time import VirtualLoop, VirtualTime

PATIENCE_SECONDS = 120.0
"""By then every client must have been told something."""
SETTLE_SECONDS = 100.0
"""By then everybody has put down what it held, and whoever can be readmitted is."""

Expected = dict[Variant, dict[int, Stream]]
"""What each of the requests gives where nothing goes wrong."""


@dataclass
class Outcome:
    """What is wrong with a run, and its story."""

    scenario: Scenario
    history: History
    seconds: float

    @property
    def complaints(self) -> list[str]:
        return self.history.complaints

    def __str__(self) -> str:
        told = [f"{at:9.4f}  {event}" for at, event in self.history.story]
        return "\n".join([f"seed {self.scenario.seed}", *self.scenario.lines(), *told, *self.history.complaints])


def play(model: Model, scenario: Scenario, expected: Expected | None) -> Outcome:
    """Play a scenario in a world of its own and check what has happened."""
    time = VirtualTime()
    loop = VirtualLoop(time)
    history = History(time)
    with _logged(history), asyncio.Runner(loop_factory=lambda: loop) as runner:
        mesh = SimulatedMesh(model, scenario, history, time, loop)
        try:
            runner.run(_play(mesh))
        except Exception:
            history.complain(f"the frontend has crashed: {traceback.format_exc()}")
        else:
            check(mesh, None if expected is None or scenario.variant is None else expected[scenario.variant])
    return Outcome(scenario, history, time.now)


async def _play(mesh: SimulatedMesh) -> None:
    mesh.loop.set_exception_handler(lambda loop, context: mesh.history.complain(_crash(context)))
    serving = asyncio.ensure_future(mesh.controller.run())
    if mesh.scenario.dies_loading is None:
        await _ready(mesh)
    else:
        mesh.time.after(0.01, lambda: mesh.end_process(mesh.scenario.dies_loading, "is killed while it loads"))
    play_faults(mesh)
    began = mesh.time.now
    clients = [asyncio.ensure_future(_ask(mesh, ask, began)) for ask in mesh.scenario.asks]
    ending = asyncio.ensure_future(_end(mesh, began, [serving, *clients]))
    done, late = await asyncio.wait(clients, timeout=PATIENCE_SECONDS)
    for client in (client for client in done if not client.cancelled()):
        client.result()
    for client in late:
        client.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    if mesh.scenario.ending is not None:
        await ending
    ending.cancel()
    await _settle(mesh)
    if mesh.controller.failure is not None and not mesh.frontend_gone:
        await _leave(mesh)
        await _settle(mesh)
    serving.cancel()
    await asyncio.wait({serving})
    if not serving.cancelled():
        mesh.history.complain(f"the frontend has crashed: {serving.exception()!r}")


async def _end(mesh: SimulatedMesh, began: float, tasks: Sequence[asyncio.Task[None]]) -> None:
    """The frontend's end, if the scenario has one: `tasks` end with its process."""
    ending = mesh.scenario.ending
    if ending is None:
        return
    await asyncio.sleep(began + ending.at - mesh.time.now)
    if ending.killed:
        mesh.end_frontend()
        for task in tasks:
            task.cancel()
    else:
        mesh.tell("the mesh is to be drained")
        await mesh.controller.drain(ending.patience)
        await _leave(mesh)


async def _leave(mesh: SimulatedMesh) -> None:
    """What a frontend does before it ends: see `running_mesh`."""
    mesh.controller.stop_ranks()
    await asyncio.sleep(STOP_SECONDS)
    mesh.end_frontend()


def _crash(context: dict[str, Any]) -> str:
    error = context.get("exception")
    where = "" if error is None else "".join(traceback.format_exception(error))
    return f"the frontend has crashed: {context['message']}\n{where}"


async def _ready(mesh: SimulatedMesh) -> None:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await mesh.controller.wait_ready()
    except (RequestError, TimeoutError) as error:
        mesh.history.complain(f"the mesh does not start: {error!r}")


async def _ask(mesh: SimulatedMesh, ask: Ask, began: float) -> None:
    request = requests()[ask.request]
    await asyncio.sleep(began + ask.at - mesh.time.now)
    stream = Stream(name=f"request {ask.request}", request=request)
    mesh.history.streams.append(stream)
    mesh.tell(f"{stream.name} is asked for")
    try:
        async with aclosing(mesh.controller.generate(request)) as outputs:
            async for output in outputs:
                stream.tokens += output.token_ids
                stream.logprobs += output.logprobs or []
                stream.prompt_logprobs += output.prompt_logprobs or []
                stream.finish = output.finish_reason
                if ask.leaves_after is not None and len(stream.tokens) > ask.leaves_after and stream.finish is None:
                    stream.cancelled = True
                    break
                await asyncio.sleep(ask.reads_in)
    except RequestError as error:
        stream.error = f"{type(error).__name__}: {error}"
    except asyncio.CancelledError:
        if not mesh.frontend_gone:
            raise
        if not stream.endings:
            stream.error = "the connection has been closed"
    mesh.tell(f"{stream.name} ends with {len(stream.tokens)} tokens: {stream.finish or stream.error or 'cancelled'}")


async def _settle(mesh: SimulatedMesh) -> None:
    """Until nothing is left, or for long enough."""
    until = mesh.time.now + SETTLE_SECONDS
    while mesh.time.now < until and not mesh.settled():
        await asyncio.sleep(0.2)


@contextmanager
def _logged(history: History) -> Iterator[None]:
    """What production code logs is part of the story."""
    handler = _StoryHandler(history)
    logger = logging.getLogger("moemesh")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


class _StoryHandler(logging.Handler):
    def __init__(self, history: History) -> None:
        super().__init__()
        self._history = history

    def emit(self, record: logging.LogRecord) -> None:
        self._history.tell(record.getMessage())


def expectations(model: Model) -> Expected:
    """What each request gives on a mesh of one rank, where nothing can go wrong."""
    forms: tuple[Quantization | None, ...] = (None, "int8")
    return {(prefill, form): _expect(model, prefill, form) for prefill in ("absorbed", "expanded") for form in forms}


def _expect(model: Model, prefill: str, quantization: Quantization | None) -> dict[int, Stream]:
    asks = tuple(Ask(request=index, at=0.0) for index in range(len(requests())))
    fields = {"num_ranks": 1, "num_cache_blocks": 256, "prefill_attention": prefill}
    scenario = Scenario(seed=0, mesh_fields=fields, asks=asks, calm=True, quantization=quantization)
    outcome = play(model, scenario, None)
    assert not outcome.complaints, str(outcome)
    return {int(stream.request.request_id): stream for stream in outcome.history.streams}
