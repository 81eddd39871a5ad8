"""The whole mesh in one thread and in virtual time: the production frontend and ranks, and whatever befalls them."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterable

from mesh_config import make_mesh
from moemesh.admission import AdmissionLimits
from moemesh.membership_records import MembershipSettings, ProcessEnded, ProcessSeen
from moemesh.metrics import Metrics
from tests.simulation.control_plane import VirtualServer
from tests.simulation.history import History, WatchedController
from tests.simulation.process import Process
from tests.simulation.scenario import Scenario
from tests.simulation.tiny_model import MAX_MODEL_LEN, Model
from tests.simulation.virtual_time import VirtualLoop, VirtualTime
from transport import messages
from transport.life import Life
from transport.local_link import LocalNetwork

HERE = "here"


class VirtualWatch:
    """The frontend's eyes: it sees the processes of its own host."""

    def __init__(self, mesh: SimulatedMesh, on_end: Callable[[ProcessEnded], None]) -> None:
        self._mesh, self._on_end = mesh, on_end
        self._lives: dict[int, Life] = {}  # by pid

    def watch(self, life: Life, pid: int, host: str) -> None:
        if host != HERE:
            return
        if self._mesh.process_with(pid).ended:
            self._on_end(ProcessEnded(life))
        else:
            self._lives[pid] = life

    def rename(self, before: Life, after: Life) -> None:
        for pid, life in self._lives.items():
            if life == before:
                self._lives[pid] = after

    def look(self, life: Life) -> ProcessSeen | None:
        for pid, watched in self._lives.items():
            if watched == life:
                return ProcessSeen(life, self._mesh.process_with(pid).stopped)
        return None

    def kill(self, life: Life) -> None:
        for pid, watched in self._lives.items():
            if watched == life:
                self._mesh.end_process(life.rank, "is killed by the frontend", pid=pid)

    def close(self) -> None:
        self._lives.clear()

    def ended(self, pid: int) -> None:
        """The kernel says so."""
        life = self._lives.pop(pid, None)
        if life is not None:
            self._on_end(ProcessEnded(life))


class SimulatedMesh:
    """Everything between the clients and the wires. `history` keeps what is to be judged afterwards."""

    def __init__(
        self, model: Model, scenario: Scenario, history: History, time: VirtualTime, loop: VirtualLoop
    ) -> None:
        self.model, self.scenario, self.history, self.time, self.loop = model, scenario, history, time, loop
        self.rng = random.Random(f"mesh {scenario.seed}")
        self.config = make_mesh(model.config, max_model_len=MAX_MODEL_LEN, **scenario.mesh_fields)
        self.placement = model.placement(self.config)
        self.network = LocalNetwork(
            self.config.num_ranks,
            seed=scenario.seed,
            credit_window=self.config.credit_window,
            check_payload=True,
        )
        self.server = VirtualServer(time, loop, self.rng, scenario.weather)
        self.server.observe = self._observe
        self.watch: VirtualWatch | None = None
        self.controller = self._make_controller()
        self.unreadable: set[int] = set()
        """Ranks that cannot read the checkpoint now."""
        self.without_memory: set[int] = set()
        self.frontend_gone = False
        self._pids = 0
        self._by_pid: dict[int, Process] = {}
        self.processes = [self._start(rank) for rank in range(self.config.num_ranks)]

    def _make_controller(self) -> WatchedController:
        def make_watch(on_end: Callable[[ProcessEnded], None]) -> VirtualWatch:
            self.watch = VirtualWatch(self, on_end)
            return self.watch

        return self.history.controller_type(
            self.server,
            model_config=self.model.config,
            mesh=self.config,
            placement=self.placement,
            expert_bytes=1 << 20,
            settings=MembershipSettings(respawn=self.scenario.respawn),
            limits=AdmissionLimits(
                max_num_seqs=self.config.max_num_seqs,
                restart_tokens=self.config.max_num_batched_tokens,
                max_queued_requests=self.scenario.max_queued,
            ),
            metrics=Metrics(),
            frontend_pid=1,
            clock=self.time.clock,
            make_watch=make_watch,
        )

    def _start(self, rank: int, parent: Process | None = None) -> Process:
        self._pids += 1
        process = Process(self, self.network.links[rank], self._pids, parent)
        self._by_pid[process.pid] = process
        return process

    def begin_process(self, rank: int, incarnation: int, *, parent: Process) -> None:
        """Another process takes the place of a rank's."""
        self.end_process(rank, "ends: another process has its place")
        if incarnation <= self.network.links[rank].incarnation:
            return  # a later one has been started meanwhile
        self.tell(f"rank {parent.rank} has started life {incarnation} of rank {rank}")
        self.network.revive(rank, incarnation=incarnation, introduced=False)
        self.processes[rank] = self._start(rank, parent)

    @property
    def everybody(self) -> Iterable[Process]:
        """All processes that there have been."""
        return self._by_pid.values()

    def process_with(self, pid: int) -> Process:
        return self._by_pid[pid]

    def tell(self, event: str) -> None:
        self.history.tell(event)

    # --- what happens to processes

    def end_process(self, rank: int, how: str, *, pid: int | None = None) -> None:
        """The process of a rank is gone."""
        process = self.processes[rank] if pid is None else self._by_pid[pid]
        if process.ended:
            return
        self.tell(f"rank {rank} {how}")
        process.end()
        if process is self.processes[rank]:
            self.network.advance(self.time.now - self.network.now)
            self.network.kill(rank)
            self.wake_receivers()
        watch = self.watch
        assert watch is not None
        self.time.after(self.rng.uniform(0.0005, 0.005), lambda: self.loop.hear(lambda: watch.ended(process.pid)))

    def crashed(self, process: Process, error: Exception) -> None:
        """An engine has raised: as in production, the rank says so and ends. No drawn fault may bring that about."""
        where = "".join(traceback.format_exception(error)[-6:])
        self.history.complain(f"rank {process.rank} has crashed: {type(error).__name__}: {error}\n{where}")
        process.control.send(messages.Failed(rank=process.rank, error=str(error)))
        self.end_process(process.rank, "has crashed")

    def end_frontend(self) -> None:
        """Its process is gone: it hears and sees nothing any more."""
        self.tell("the frontend is gone")
        self.frontend_gone = True
        self.server.close()
        assert self.watch is not None
        self.watch.close()

    def wake_receivers(self) -> None:
        """Whoever may receive something, or hear of a death, gets a turn when it may."""
        for process in self.processes:
            arrival = self.network.next_arrival(process.rank)
            if arrival is not None:
                process.wake(max(arrival, self.time.now) + 0.00005)

    # --- what is held at the end

    def settled(self) -> bool:
        """Nothing is left to be done; once the frontend is gone, nobody is left."""
        alive = [process for process in self.everybody if not process.ended]
        if self.frontend_gone:
            return not alive
        if any(process.ended and self.can_be_replaced(process.rank) for process in self.processes):
            return False
        return not any(self.controller.leftovers().values()) and all(map(self.at_peace, alive))

    def can_be_replaced(self, rank: int) -> bool:
        """Somebody on its host lives, who can start another process."""
        hosts = {self.scenario.host_of(process.rank) for process in self.processes if not process.ended}
        return self.scenario.respawn and self.scenario.host_of(rank) in hosts

    def at_peace(self, process: Process) -> bool:
        """The rank serves, as the life that the frontend knows, and holds nothing."""
        serves = self.controller.state(process.rank) == "up" and self.controller.present(process.rank) == process.life
        return serves and not any(self.kept_by(process).values())

    def kept_by(self, process: Process) -> dict[str, int]:
        """What a rank holds for requests, and frames that wait for a peer."""
        if process.engine is None:
            return {}
        return process.engine.leftovers() | {"queued": process.link.stats().queued}

    # --- what the ranks are told

    def _observe(self, life: Life, message: messages.Message) -> None:
        if isinstance(message, messages.View):
            self.history.view_sent(life, message)
        elif isinstance(message, messages.Place):
            self._check_place(message)

    def _check_place(self, place: messages.Place) -> None:
        """A host that a placement names, and that serves, has the expert."""
        for layer, hosts in place.hosts.items():
            for expert, ranks in enumerate(hosts):
                for rank in ranks:
                    process = self.processes[rank]
                    serves = not process.ended and self.controller.believes(process.life)
                    if serves and expert not in process.hosts(layer):
                        self.history.complain(
                            f"placement {place.version} names rank {rank} for expert {expert} of layer {layer}, "
                            "which it has not loaded"
                        )
