"""The frontend: gateway and controller in one process outside MPI, which survives any rank."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

from tqdm import tqdm

from moemesh import __version__
from moemesh.chat_template import load_chat_template
from moemesh.controller import Controller
from moemesh.engine_client import EngineFailed
from moemesh.gateway import GatewayOptions, create_app, load_sampling_defaults, run_gateway
from moemesh.gateway.options import SamplingDefaults
from moemesh.launcher import RankProcesses
from moemesh.mesh import running_mesh
from moemesh.mesh_plan import MeshPlan
from moemesh.metrics import Metrics
from moemesh.options import ServeOptions
from moemesh.run_directory import RunDirectory
from moemesh.tokenizer import load_tokenizer

PROGRESS_SECONDS = 0.2

logger = logging.getLogger(__name__)


def run_frontend(
    options: ServeOptions,
    plan: MeshPlan,
    *,
    run_directory: RunDirectory,
    ranks: RankProcesses,
    sockets: Sequence[socket.socket],
) -> int:
    """Serve on the listening `sockets` until SIGTERM, Ctrl-C or the end of the mesh; the exit code.

    The caller has started the ranks, ends those that remain, and removes the run directory.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return asyncio.run(_serve(options, plan, run_directory, ranks, sockets))


async def _serve(
    options: ServeOptions,
    plan: MeshPlan,
    run_directory: RunDirectory,
    ranks: RankProcesses,
    sockets: Sequence[socket.socket],
) -> int:
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        controller = await stack.enter_async_context(running_mesh(options, plan, run_directory, ranks, metrics))
        tokenizer = load_tokenizer(options.model_folder)
        template = load_chat_template(options.model_folder, tokenizer)
        app = create_app(controller, _gateway_options(options), tokenizer, template, metrics)
        await stack.enter_async_context(run_gateway(app, sockets))
        failed = asyncio.create_task(controller.wait_failed())
        stopped = asyncio.create_task(asked_to_stop.wait())
        ready = asyncio.create_task(_announce(controller, options, sockets[0].getsockname()[1]))
        await asyncio.wait({failed, stopped}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        failed.cancel()
        stopped.cancel()
        if controller.failure is not None:
            return 1
        await controller.drain(options.drain_timeout)
    return 0


def _gateway_options(options: ServeOptions) -> GatewayOptions:
    from_model = options.generation_config == "auto"
    return GatewayOptions(
        served_model_names=options.served_names,
        api_keys=options.api_key,
        version=__version__,
        sampling_defaults=load_sampling_defaults(options.model_folder) if from_model else SamplingDefaults(),
    )


async def _announce(controller: Controller, options: ServeOptions, port: int) -> None:
    """Show how loading goes, then where to find the endpoint."""
    try:
        await show_loading(controller)
    except EngineFailed:
        return
    host = options.host
    shown = f"[{host}]" if ":" in host else host
    logger.info(
        "serving %s on http://%s:%d with %d ranks in %s",
        options.served_names[0],
        shown,
        port,
        options.ranks,
        controller.view.arithmetic,
    )


async def show_loading(controller: Controller) -> None:
    """Wait until the mesh is ready, with a progress bar where stderr is a terminal. Raises EngineFailed."""
    ready = asyncio.ensure_future(controller.wait_ready())
    with tqdm(desc="loading", unit=" tensors", leave=False, disable=not sys.stderr.isatty()) as bar:
        while not ready.done():
            await asyncio.wait({ready}, timeout=PROGRESS_SECONDS)
            done, total = controller.view.loading_progress()
            bar.total = total or None
            bar.update(done - bar.n)
    await ready
