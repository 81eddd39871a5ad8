"""A running mesh as its frontend holds it: controller, control socket and rank processes, from start to end."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from mesh_config import MeshConfig
from moemesh.admission import AdmissionLimits
from moemesh.contact import ANY_ADDRESS
from moemesh.controller import Controller
from moemesh.launcher import RankLauncher, RankProcesses
from moemesh.membership_records import MembershipSettings
from moemesh.mesh_plan import MeshPlan
from moemesh.metrics import Metrics
from moemesh.mpi_command import LaunchError
from moemesh.options import EngineOptions, ServeOptions
from moemesh.run_directory import RunDirectory
from moemesh.trace_file import save_trace
from transport.control import ControlServer

logger = logging.getLogger(__name__)

STOP_SECONDS = 1.0
LAST_WORDS_SECONDS = 0.2
STOP_GRACE_SECONDS = 1.0
LINGER_SECONDS = 1.0
QUEUED_TURNS = 4
"""Requests that may wait by default, as a multiple of those that are computed at a time."""


@asynccontextmanager
async def started_mesh(options: EngineOptions, plan: MeshPlan, metrics: Metrics) -> AsyncIterator[Controller]:
    """`running_mesh` with ranks of its own, for a program that is its own frontend. Nothing is left behind."""
    run = RunDirectory.create(num_ranks=options.ranks)
    ranks = RankLauncher(options, run)
    try:
        run.write_options(options)
        ranks.start()
        async with running_mesh(options, plan, run, ranks, metrics) as controller:
            yield controller
    finally:
        ranks.stop(STOP_GRACE_SECONDS)
        save_trace(run)
        run.remove()


@asynccontextmanager
async def running_mesh(
    options: EngineOptions, plan: MeshPlan, run: RunDirectory, ranks: RankProcesses, metrics: Metrics
) -> AsyncIterator[Controller]:
    """The controller of a mesh whose ranks are being started; usable at once, ready when they have loaded.

    Leaving the block tells the ranks to stop and waits a moment for them; ending those that did not listen is the
    business of whoever started them.
    """
    server = _control_server(run)
    controller = Controller(
        server,
        model_config=plan.model,
        mesh=plan.mesh,
        placement=plan.placement,
        expert_bytes=plan.expert_bytes,
        settings=_settings(options, ranks),
        limits=_limits(options, plan.mesh),
        metrics=metrics,
        frontend_pid=os.getpid(),
    )
    serving = asyncio.create_task(_supervised(controller))
    watching = asyncio.create_task(_watch(ranks, controller))
    try:
        yield controller
        watching.cancel()
        controller.stop_ranks()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await ranks.wait()
    finally:
        for task in (serving, watching):
            task.cancel()
        await asyncio.gather(serving, watching, return_exceptions=True)
        server.close()


def _control_server(run: RunDirectory) -> ControlServer:
    """For the ranks of this host, and those of others where there are any."""
    contact = run.contact
    if contact.keys is None:
        return ControlServer(contact.endpoint)
    server = ControlServer(contact.endpoint, ANY_ADDRESS, keys=contact.keys)
    run.set_port(int(server.endpoints[-1].rpartition(":")[2]))
    return server


async def _supervised(controller: Controller) -> None:
    """Without the control plane nothing works: a fault there ends the mesh instead of leaving its clients to wait."""
    try:
        await controller.run()
    except Exception as error:
        logger.exception("the control plane has failed")
        controller.fail(f"the control plane has failed: {error}")


async def _watch(ranks: RankProcesses, controller: Controller) -> None:
    """When no rank is left, all may be started again, and with them everything that is lost."""
    while True:
        ended = await _end_of(ranks, controller)
        await asyncio.sleep(LAST_WORDS_SECONDS)  # a rank that failed has said why, on a socket still to be read
        if not (controller.may_restart and ranks.can_start):
            controller.fail(ended)
            return
        incarnation = await controller.next_start(ended)
        try:
            ranks.start(incarnation)
        except (LaunchError, OSError) as error:
            controller.fail(str(error))
            return


async def _end_of(ranks: RankProcesses, controller: Controller) -> str:
    """How the processes ended. A launcher that stays without its ranks is told to end."""
    waiting = asyncio.ensure_future(ranks.wait())
    without_ranks = 0
    try:
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=LINGER_SECONDS)
            without_ranks = without_ranks + 1 if controller.may_restart and controller.all_lost else 0
            if without_ranks > 1 and not waiting.done():
                logger.warning("all ranks are gone, and what started them stays: it is told to end")
                await asyncio.to_thread(ranks.stop, STOP_GRACE_SECONDS)
        return waiting.result()
    finally:
        waiting.cancel()


def _settings(options: EngineOptions, ranks: RankProcesses) -> MembershipSettings:
    return MembershipSettings(
        fault_tolerance=options.fault_tolerance == "on",
        respawn=options.respawn == "on",
        restarts=ranks.can_start,
        stop_grace=options.stop_grace,
    )


def _limits(options: EngineOptions, mesh: MeshConfig) -> AdmissionLimits:
    unlimited = AdmissionLimits(max_num_seqs=mesh.max_num_seqs, restart_tokens=mesh.max_num_batched_tokens)
    if not isinstance(options, ServeOptions):
        return unlimited
    return replace(
        unlimited,
        max_queued_requests=options.max_queued_requests or QUEUED_TURNS * mesh.max_num_seqs * len(mesh.groups),
        max_queued_tokens=options.max_queued_tokens,
        queue_timeout=options.queue_timeout,
    )
