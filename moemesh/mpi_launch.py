"""`mpirun -n 4 moemesh serve ...`: ranks that a user's own mpirun started, and the frontend that rank 0 starts.

Each of the processes becomes a rank. Rank 0 also starts the frontend in a session of its own, so that it survives
rank 0 and mpirun, and tells the others where the run directory is. On every further host the first rank makes one.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from array import array
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moemesh.contact import Contact, first_reachable, own_addresses, this_machine
from moemesh.launcher import end_processes, package_environment
from moemesh.mpi_command import LaunchError
from moemesh.options import options_from_json
from moemesh.processes import ProcessIdentity, wait_until_gone
from moemesh.run_directory import RunDirectory, RunDirectoryError, make_shared_memory_folder
from transport.control import new_curve_keys
from transport.mpi_runtime import detect_mpi_launch, init_mpi

ATTACHED_FRONTEND = "attached-frontend"
"""The command, in no help text, with which rank 0 starts the frontend."""

_LAUNCHER_VARIABLES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "OPAL_")
_SEGMENTS_VARIABLE = "OMPI_MCA_btl_sm_backing_directory"
_ULFM_VARIABLE = "OMPI_MCA_mpi_ft_enable"
_POLL_SECONDS = 0.2
_LISTEN_SECONDS = 120.0
_TEXT_BYTES = 512


def mpi_launch(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(rank, size) when an MPI launcher started us as one of several."""
    launch = detect_mpi_launch(environment)
    return launch if launch is not None and launch[1] > 1 else None


def outlives_ranks(environment: Mapping[str, str]) -> bool:
    """Whether the MPI launcher that started us goes on when one of its processes is lost."""
    return environment.get(_ULFM_VARIABLE) == "1"


Prepare = Callable[[tuple[str, ...]], tuple[RunDirectory, Sequence[str]]]
"""From the machine of each rank (none where all are on one) to a new run directory and the frontend's command."""


def join_mesh(num_ranks: int, prepare: Prepare) -> RunDirectory:
    """Called by each of `num_ranks` processes of a user's mpirun: their mesh's run directory on this host.

    Rank 0 calls `prepare` and starts the frontend. Collective; initialises MPI. Raises LaunchError in every process
    when one of them cannot take part.
    """
    segments = _prepare_open_mpi(os.environ)
    mpi = init_mpi()
    try:
        return _join(mpi, num_ranks, prepare, segments)
    except LaunchError:
        if segments is not None:
            shutil.rmtree(segments, ignore_errors=True)
        raise


def _join(mpi: Any, num_ranks: int, prepare: Prepare, segments: Path | None) -> RunDirectory:
    world = mpi.COMM_WORLD
    if world.size != num_ranks:
        raise LaunchError(
            f"mpirun started {num_ranks} processes, but mpi4py's MPI sees {world.size}: they belong to different MPIs; "
            "use the mpirun beside this Python, or build mpi4py for yours"
        )
    machines = tuple(_gather(world, this_machine()))
    frontend: _Frontend | None = None
    told, problem = "", None
    try:
        if world.rank == 0:
            frontend = _start_frontend(prepare, machines)
            told = frontend.invitation()
    except (ValueError, OSError, LaunchError, RunDirectoryError) as error:
        problem = str(error)
    try:
        _agree(mpi, problem)
        run = _enter(mpi, machines, _broadcast(world, told, root=0))
        try:
            _adopt(run, segments)
        except OSError as error:
            problem = str(error)
        _agree(mpi, problem)
    except LaunchError:
        if frontend is not None:
            frontend.end()
        raise
    return run


def _start_frontend(prepare: Prepare, machines: tuple[str, ...]) -> _Frontend:
    if len(set(machines)) == 1:
        return _Frontend(*prepare(()))
    run, command = prepare(machines)
    run.set_contact(Contact(endpoint=run.own_endpoint, keys=new_curve_keys(), machines=machines))
    return _Frontend(run, command)


def _enter(mpi: Any, machines: Sequence[str], invitation: str) -> RunDirectory:
    """Collective: the run directory of this rank's host, which the first rank of the host may have to make."""
    world = mpi.COMM_WORLD
    leader = machines.index(machines[world.rank])
    run: RunDirectory | None = None
    problem = None
    try:
        if leader == world.rank != 0:
            run = _open_remote(Invitation.from_json(invitation), num_ranks=machines.count(machines[leader]))
    except (OSError, LaunchError, RunDirectoryError) as error:
        problem = f"on {machines[leader].split()[0]}: {error}"
    try:
        _agree(mpi, problem)
        paths = _gather(world, "" if run is None else str(run.path))
        path = Invitation.from_json(invitation).path if leader == 0 else paths[leader]
        try:
            opened = RunDirectory.open(path)
        except RunDirectoryError as error:
            problem = str(error)
        _agree(mpi, problem)
    except LaunchError:
        if run is not None:
            run.remove()
        raise
    return opened


def _open_remote(invitation: Invitation, *, num_ranks: int) -> RunDirectory:
    assert invitation.contact is not None, "there are several hosts"
    address = first_reachable(invitation.addresses, invitation.port)
    if address is None:
        raise LaunchError(
            f"the frontend is not to be reached at any of {', '.join(invitation.addresses)}, port {invitation.port}: "
            "let the hosts of a mesh connect to each other on all ports"
        )
    contact = replace(invitation.contact, endpoint=f"tcp://{address}:{invitation.port}")
    return RunDirectory.create_remote(contact, options_from_json(invitation.options), num_ranks=num_ranks)


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """What rank 0 tells the others: the run directory on its host and, for other hosts, all that is in it."""

    path: str
    contact: Contact | None = None
    addresses: tuple[str, ...] = ()
    port: int = 0
    options: str = ""

    def to_json(self) -> str:
        """For `from_json`."""
        contact = None if self.contact is None else self.contact.to_json()
        return json.dumps({**vars(self), "contact": contact})

    @classmethod
    def from_json(cls, text: str) -> Invitation:
        """What was told."""
        values = json.loads(text)
        contact = values["contact"]
        return cls(**{**values, "contact": None if contact is None else Contact.from_json(contact)})


class _Frontend:
    """The frontend that rank 0 starts."""

    def __init__(self, run: RunDirectory, command: Sequence[str]) -> None:
        self.run = run
        environment = package_environment()
        for name in [name for name in environment if name.startswith(_LAUNCHER_VARIABLES)]:
            del environment[name]  # it is no part of the MPI job
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        identity = ProcessIdentity.of(self._process.pid)
        if identity is None:
            run.remove()
            raise LaunchError("the frontend ended at once")
        run.set_frontend(identity)

    def invitation(self) -> str:
        """What the other ranks are told; where they are on other hosts, once the frontend listens for them."""
        contact = self.run.contact
        if contact.keys is None:
            return Invitation(path=str(self.run.path)).to_json()
        deadline = time.monotonic() + _LISTEN_SECONDS
        while (port := self.run.port) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise LaunchError("the frontend did not begin to listen for the ranks of other hosts")
            time.sleep(_POLL_SECONDS)
        return Invitation(
            path=str(self.run.path),
            contact=replace(contact, keys=contact.keys.for_client()),
            addresses=tuple(own_addresses()),
            port=port,
            options=self.run.read_options().to_json(),
        ).to_json()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self.run.remove()


class AttachedRanks:
    """The ranks of a user's mpirun, for the frontend that rank 0, `starter`, started (a `RankProcesses`).

    They have ended when `starter` and all that registered in the run directory are gone.
    """

    def __init__(self, run_directory: RunDirectory, *, starter: ProcessIdentity) -> None:
        self._run = run_directory
        self._starter = starter

    @property
    def can_start(self) -> bool:
        """They are not ours to start."""
        return False

    def start(self, incarnation: int) -> None:
        """See `can_start`."""
        raise AssertionError("the ranks of a user's own mpirun end with it")

    def poll(self) -> str | None:
        """None while a rank lives; then that they ended."""
        return None if any(process.alive() for process in self._all()) else "all ranks have ended"

    async def wait(self) -> str:
        """Until no rank lives."""
        while (ended := self.poll()) is None:
            await asyncio.sleep(_POLL_SECONDS)
        return ended

    def stop(self, grace: float) -> None:
        """SIGTERM to every rank, SIGKILL `grace` seconds later. Their mpirun then ends by itself. Idempotent."""
        ranks = self._all()
        for process in ranks:
            process.send(signal.SIGTERM)
        end_processes(wait_until_gone(ranks, grace))

    def _all(self) -> list[ProcessIdentity]:
        return [self._starter, *self._run.processes()]


def _prepare_open_mpi(environment: MutableMapping[str, str]) -> Path | None:
    """What our launcher says on mpirun's command line, where the user's does not; before MPI starts.

    Returns the folder for this rank's shared-memory segments, unless the user chose one.
    """
    environment.setdefault("OMPI_MCA_pml", "ob1")
    environment.setdefault("OMPI_MCA_btl", "^ofi")
    if _SEGMENTS_VARIABLE in environment:
        return None
    segments = make_shared_memory_folder(num_ranks=1)
    environment[_SEGMENTS_VARIABLE] = str(segments)
    return segments


def prepare_newcomer(environment: MutableMapping[str, str]) -> None:
    """The same for a process that a rank has spawned. It shares memory with nobody, and so needs no segment."""
    environment.setdefault("OMPI_MCA_pml", "ob1")
    if environment.get("OMPI_MCA_btl", "^ofi") == "^ofi":
        environment["OMPI_MCA_btl"] = "^ofi,sm"


def _adopt(run: RunDirectory, segments: Path | None) -> None:
    """Whoever ends the mesh removes what this rank and its mpirun would leave behind."""
    if segments is not None:
        run.add_companion(segments)
    session = os.environ.get("PMIX_SERVER_TMPDIR")
    mpirun = ProcessIdentity.of(os.getppid())
    if session is not None and mpirun is not None:
        run.add_companion(Path(session), unless_alive=mpirun)


def _agree(mpi: Any, problem: str | None) -> None:
    """Collective. Raises LaunchError in every rank with the problem of the first one that has any."""
    world = mpi.COMM_WORLD
    first = array("q", [world.size if problem is None else world.rank])
    world.Allreduce(mpi.IN_PLACE, first, op=mpi.MIN)
    if first[0] < world.size:
        raise LaunchError(_broadcast(world, problem or "", root=first[0]))


def _gather(world: Any, text: str) -> list[str]:
    """Collective: every rank's text, of at most _TEXT_BYTES."""
    mine = text.encode()
    assert len(mine) <= _TEXT_BYTES, text
    everybody = bytearray(world.size * _TEXT_BYTES)
    world.Allgather(bytearray(mine.ljust(_TEXT_BYTES, b"\0")), everybody)
    return [everybody[at : at + _TEXT_BYTES].rstrip(b"\0").decode() for at in range(0, len(everybody), _TEXT_BYTES)]


def _broadcast(world: Any, message: str, *, root: int) -> str:
    """Collective: the root's text."""
    content = bytearray(message.encode())
    length = array("q", [len(content)])
    world.Bcast(length, root=root)
    buffer = content if world.rank == root else bytearray(length[0])
    world.Bcast(buffer, root=root)
    return buffer.decode()
