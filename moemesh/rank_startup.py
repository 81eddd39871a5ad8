"""How a rank comes to serve: device and threads, Hello, Start, link, weights, Ready; then its engine runs."""

import gc
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial

import torch

import kernels
from experts import ExpertService
from mesh_config import ConfigError, MeshConfig, load_model_config
from moemesh.checkpoint import Checkpoint
from moemesh.checksums import Checksums
from moemesh.contact import is_refused
from moemesh.ffn_loader import FfnLoader
from moemesh.heads import HeadLoader
from moemesh.heart import Heart, StillHeart
from moemesh.idle import IdleWait
from moemesh.mesh_plan import placement_of, quantization, threads_per_rank
from moemesh.model_loader import ModelLoader
from moemesh.neighbours import Neighbours
from moemesh.options import EngineOptions
from moemesh.rank_build import build_rank
from moemesh.rank_engine import HeartBeat
from moemesh.rank_place import RankPlace
from moemesh.take_over import TakeOver
from moemesh.watchdog import end_alone
from transport import messages
from transport.control import ControlClient
from transport.doorbell import Doorbell
from transport.life import Life
from transport.links import Link
from transport.local_link import LocalNetwork
from transport.mpi_link import MpiLink
from transport.mpi_meetings import MpiMeetings
from transport.mpi_runtime import init_mpi
from transport.trace import Trace

PROGRESS_SECONDS = 0.2
START_SECONDS = 60.0
ABANDONED_SECONDS = 10.0
"""Beyond the grace that the frontend gives a rank that is out of reach, before that gives up the frontend."""

logger = logging.getLogger(__name__)


def serve_rank(place: RankPlace, control: ControlClient) -> None:
    """Be the rank that `place` says, until told to stop.

    Expects the garbage collector off, and turns it on. Raises ConfigError or CheckpointError for what the user can
    mend, and whatever else goes wrong.
    """
    options = place.run.read_options()
    with closing(Trace(place.run.trace(place.rank))) if options.trace is not None else nullcontext() as trace:
        heart = _heart(options, place)
        try:
            _serve(options, place, control, heart, trace)
        finally:
            heart.stop()


def _heart(options: EngineOptions, place: RankPlace) -> Heart | StillHeart:
    """One that beats already: loading takes time."""
    if options.fault_tolerance == "off":
        return StillHeart()
    run = place.run
    contact = run.contact
    heart = Heart(
        lambda life: ControlClient(contact.endpoint, life, channel="heart", keys=contact.keys),
        place.life,
        end=lambda reason: end_alone(run, reason),
        is_gone=lambda: run.is_remote and is_refused(contact.endpoint),
        abandoned_s=options.stop_grace + ABANDONED_SECONDS if run.is_remote else math.inf,
    )
    heart.start()
    return heart


def _serve(
    options: EngineOptions, place: RankPlace, control: ControlClient, heart: HeartBeat, trace: Trace | None
) -> None:
    device, rank = _claim_device(options, place.local_rank), place.rank
    kernels.set_num_threads(threads_per_rank(options, place.ranks_on_host))
    if rank == 0:
        _say_what_is_slow(device)
    # Torch moves rows and adds them, no more: a second pool of threads would only spin against ours.
    torch.set_num_threads(1)
    meetings = _meet_parent(place) if place.parent is not None else None
    control.send(
        messages.Hello(
            rank=rank,
            pid=os.getpid(),
            incarnation=control.life.incarnation,
            host=socket.gethostname(),
            num_threads=kernels.num_threads(),
            isa=kernels.isa(),
            arithmetic=options.arithmetic,
        )
    )
    start, earlier = _await_start(control)
    mesh = MeshConfig.from_dict(start.config)
    if mesh.num_ranks != place.num_ranks:
        raise ConfigError(f"the frontend planned {mesh.num_ranks} ranks, {place.num_ranks} were started: start as many")
    bell = place.doorbell()
    link, neighbours = _connect(place, mesh, meetings, bell, trace)
    for message in earlier:
        if isinstance(message, messages.View):
            neighbours.follow(message)
    config = load_model_config(options.model_folder)
    if config.fingerprint != start.model:
        raise ConfigError(
            f"{options.model_folder}: config.json and generation_config.json are not those that the mesh serves by: "
            "restore them, or restart the mesh"
        )
    placement = placement_of(config, mesh)
    checksums = Checksums()
    checksums.learn(place.run.all_checksums())
    checkpoint = Checkpoint(options.model_folder, config, checksums)
    loader = ModelLoader(
        checkpoint,
        mesh=mesh,
        placement=placement,
        rank=rank,
        device=device,
        weight_dtype=_weight_dtype(options),
        quantization=quantization(options),
        report=_Reporter(control, rank).report,
    )
    model = loader.load()
    checksums.save(place.run.checksums(rank))
    idle = IdleWait(control, bell=bell, alone=mesh.num_ranks == 1, crowded=place.crowded(kernels.num_threads()))
    engine = build_rank(
        model,
        mesh,
        placement,
        link=link,
        control=control,
        device=device,
        idle=idle,
        heart=heart,
        neighbours=neighbours,
        head_loader=HeadLoader(loader.mla, checkpoint, prepare=lambda: checksums.learn(place.run.all_checksums())),
        executor=ThreadPoolExecutor(1, "heads"),
        make_take_over=_take_over_maker(checkpoint, checksums, loader.ffns, place, bell),
        trace=trace,
    )
    engine.hear(earlier)
    if link.incarnation == 0:
        engine.announce()
    # All that is there now stays: the collector need never look at it again.
    gc.freeze()
    gc.enable()
    engine.run()


def _take_over_maker(
    checkpoint: Checkpoint, checksums: Checksums, ffns: FfnLoader, place: RankPlace, bell: Doorbell | None
) -> Callable[[ExpertService], TakeOver] | None:
    """What loads further experts, from files that are open from now on; None where there is nobody to lose."""
    if place.num_ranks == 1:
        return None
    checkpoint.open_all()

    def make(service: ExpertService) -> TakeOver:
        return TakeOver(
            service,
            checkpoint,
            ffns,
            prepare=lambda: checksums.learn(place.run.all_checksums()),
            wake=(lambda: None) if bell is None else partial(bell.ring, place.rank),
        )

    return make


def _claim_device(options: EngineOptions, local_rank: int) -> torch.device:
    """The device this rank computes on."""
    use_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    if not use_cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no CUDA device: use --device cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _weight_dtype(options: EngineOptions) -> torch.dtype | None:
    """The format that 16- and 32-bit weights are held in; None keeps each tensor's own."""
    if options.dtype == "auto":
        return None
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype


def _say_what_is_slow(device: torch.device) -> None:
    if device.type == "cpu" and not kernels.native_available():
        logger.warning("serving slowly and not exactly (tokens may depend on the batch): %s", kernels.native_reason())
    if device.type == "cuda":
        logger.warning("on CUDA torch's own kernels are used: tokens may depend on the batch")


def _meet_parent(place: RankPlace) -> MpiMeetings:
    """A newcomer's first meeting. Its parent waits in MPI: everything that takes time has been imported before."""
    assert place.parent is not None
    meetings = _meetings(place)
    meetings.meet_parent(*place.parent)
    return meetings


def _meetings(place: RankPlace) -> MpiMeetings:
    return MpiMeetings(
        run_id=place.run.path.name, rank=place.rank, num_ranks=place.num_ranks, incarnation=place.incarnation
    )


def _await_start(control: ControlClient) -> tuple[messages.Start, list[messages.Message]]:
    """What to become, and what was said besides: where the mesh serves already, who is there."""
    deadline = time.monotonic() + START_SECONDS
    earlier: list[messages.Message] = []
    while time.monotonic() < deadline:
        control.wait(1.0)
        earlier += control.receive_all()
        for place, message in enumerate(earlier):
            if isinstance(message, messages.Start):
                del earlier[place]
                return message, earlier
    raise ConfigError(f"the frontend did not answer for {START_SECONDS:.0f} s")


def _connect(
    place: RankPlace, mesh: MeshConfig, meetings: MpiMeetings | None, bell: Doorbell | None, trace: Trace | None
) -> tuple[Link, Neighbours]:
    """The link, and those within its reach. `meetings`: a newcomer's, which has met its parent."""
    peers = [peer for peer in range(mesh.num_ranks) if peer != place.rank]
    if not peers:
        return LocalNetwork(1).links[0], Neighbours(place.rank, born=place.incarnation, met={})
    comm = None
    if meetings is None:
        world = init_mpi().COMM_WORLD
        if world.rank != place.rank or world.size != mesh.num_ranks:
            found = f"rank {world.rank} of {world.size}, the launcher {place.rank} of {mesh.num_ranks}"
            raise ConfigError(f"MPI says {found}")
        comm, meetings = world.Dup(), _meetings(place)
    link = MpiLink(comm, meetings=meetings, credit_window=mesh.credit_window, bell=bell, trace=trace)
    neighbours = Neighbours(
        place.rank,
        born=place.incarnation,
        met=dict.fromkeys(peers, place.incarnation) if comm is not None else {},
        meetings=meetings,
        command=lambda order: place.newcomer_command(
            Life(order.rank, order.incarnation), local_rank=order.local_rank, ranks_on_host=order.ranks_on_host
        ),
    )
    neighbours.joined(link.take_joined())
    return link, neighbours


class _Reporter:
    """Tells the frontend how loading goes, a few times a second."""

    def __init__(self, control: ControlClient, rank: int) -> None:
        self._control = control
        self._rank = rank
        self._next = 0.0

    def report(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next or done == total:
            self._next = now + PROGRESS_SECONDS
            self._control.send(messages.Progress(rank=self._rank, stage="loading", done=done, total=total))
