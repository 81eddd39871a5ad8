"""What goes wrong in a scenario, carried out, and put right again."""

from __future__ import annotations

from tests.simulation.mesh import SimulatedMesh
from tests.simulation.scenario import QUIET_FROM, Fault


def play_faults(mesh: SimulatedMesh) -> None:
    """From now on frames are disturbed and the drawn faults come, until all is quiet."""
    began = mesh.time.now
    mesh.network.disturb(mesh.scenario.rates)
    for fault in mesh.scenario.faults:
        mesh.time.at(began + fault.at, lambda fault=fault: _begin(mesh, fault))
    mesh.time.at(began + QUIET_FROM, lambda: _calm(mesh))


def _calm(mesh: SimulatedMesh) -> None:
    mesh.network.disturb()
    mesh.scenario.weather.slow = 0.0
    mesh.tell("all is quiet from here on")


def _begin(mesh: SimulatedMesh, fault: Fault) -> None:
    rank, process, network = fault.rank, mesh.processes[fault.rank], mesh.network
    mesh.tell(f"--- {fault}")
    network.advance(mesh.time.now - network.now)
    until = mesh.time.now + fault.seconds
    match fault.kind:
        case "kill":
            mesh.end_process(rank, "is killed")
        case "stop":
            process.stop()
            mesh.time.at(until, process.resume)
        case "slow":
            process.slowness = fault.strength
            mesh.time.at(until, lambda: setattr(process, "slowness", 1.0))
        case "cut":
            _cut(mesh, [(rank, fault.other)], until)
        case "hold":
            _cut(mesh, [(rank, fault.other)], until, hold=True)
        case "unreadable":
            _lack(mesh, mesh.unreadable, rank, until)
        case "no memory":
            _lack(mesh, mesh.without_memory, rank, until)
        case "cut off":
            others = [peer for peer in range(mesh.config.num_ranks) if peer != rank]
            _cut(mesh, [(rank, peer) for peer in others] + [(peer, rank) for peer in others], until)
            _hold(mesh, rank, until)
        case "lag":
            _hold(mesh, rank, until)
        case "freeze":
            mesh.loop.freeze(fault.seconds)


def _lack(mesh: SimulatedMesh, lacking: set[int], rank: int, until: float) -> None:
    """Whatever process the rank has by then."""
    lacking.add(rank)
    mesh.time.at(until, lambda: lacking.discard(rank))


def _cut(mesh: SimulatedMesh, pairs: list[tuple[int, int]], until: float, *, hold: bool = False) -> None:
    for sender, receiver in pairs:
        mesh.network.cut(sender, receiver, hold=hold)

    def heal() -> None:
        mesh.network.advance(mesh.time.now - mesh.network.now)
        for sender, receiver in pairs:
            mesh.network.heal(sender, receiver)
        mesh.tell(f"healed {pairs}")
        mesh.wake_receivers()

    mesh.time.at(until, heal)


def _hold(mesh: SimulatedMesh, rank: int, until: float) -> None:
    process = mesh.processes[rank]
    for port in (process.control, process.heart_port):
        port.hold(until, outwards=True, inwards=True)
