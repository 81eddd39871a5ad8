"""What must be true of every run, whatever went wrong in it."""

from __future__ import annotations

from collections.abc import Mapping

from tests.simulation.history import Stream
from tests.simulation.mesh import SimulatedMesh
from tests.simulation.scenario import DEADLY

NOT_FINITE = "not finite"
"""What a request is told whose prompt has made no numbers."""


def check(mesh: SimulatedMesh, expected: Mapping[int, Stream] | None) -> None:
    """Complain of whatever is wrong. What can be seen as it happens (epochs, beliefs, placements) has been already."""
    history = mesh.history
    for stream in history.streams:
        if stream.endings != 1:
            history.complain(f"{stream.name} ended {stream.endings} times")
        if expected is not None:
            _check_content(mesh, stream, expected[int(stream.request.request_id)])
    if mesh.frontend_gone:
        _check_all_ended(mesh)
        return
    _check_leftovers(mesh)
    if mesh.scenario.calm:
        _check_calm(mesh)
    if mesh.scenario.dies_loading is None and not any(fault.kind in DEADLY for fault in mesh.scenario.faults):
        _check_bloodless(mesh)


def _check_content(mesh: SimulatedMesh, stream: Stream, expected: Stream) -> None:
    """Complete streams are those of a mesh without faults, the others the beginning of them."""
    whole = stream.finish is not None
    for name in ("tokens", "logprobs", "prompt_logprobs"):
        ours, theirs = getattr(stream, name), getattr(expected, name)
        if ours != (theirs if whole else theirs[: len(ours)]):
            mesh.history.complain(f"{stream.name} has {name} {ours}, expected {theirs}")
    if NOT_FINITE in (stream.error or "") and stream.error != expected.error:
        mesh.history.complain(f"{stream.name} ended by {stream.error}, and its neighbours have done it")
    if whole and stream.finish != expected.finish:
        mesh.history.complain(f"{stream.name} ended by {stream.finish}, expected {expected.finish}")


def _check_all_ended(mesh: SimulatedMesh) -> None:
    """Nobody is left behind by a frontend that is gone."""
    for process in mesh.everybody:
        if not process.ended:
            mesh.history.complain(f"process {process.pid} of rank {process.rank} is left behind")


def _check_leftovers(mesh: SimulatedMesh) -> None:
    """Nothing is held for requests: not by the frontend, nor by a rank that serves."""
    left = mesh.controller.leftovers()
    if any(left.values()):
        mesh.history.complain(f"the frontend keeps {left}")
    if mesh.controller.failure is not None:
        return
    for process in mesh.processes:
        if process.ended and mesh.can_be_replaced(process.rank):
            mesh.history.complain(f"rank {process.rank} was not replaced")
        if not process.ended and not mesh.at_peace(process):
            mesh.history.complain(
                f"rank {process.rank} ({mesh.controller.state(process.rank)}) keeps {mesh.kept_by(process)}"
            )


def _check_bloodless(mesh: SimulatedMesh) -> None:
    """All other faults pass: whoever was given up for one comes back, and what it computed goes on."""
    if mesh.controller.failure is not None:
        mesh.history.complain(f"the mesh has failed, and nobody was killed: {mesh.controller.failure}")
    for process in mesh.processes:
        if process.ended:
            mesh.history.complain(f"rank {process.rank} has ended, and nobody was killed")
    for stream in mesh.history.streams:
        error = stream.error or ""
        if error.startswith("EngineFailed") and "at each of the last" not in error and NOT_FINITE not in error:
            mesh.history.complain(f"{stream.name} has failed, and nobody was killed: {error}")


def _check_calm(mesh: SimulatedMesh) -> None:
    """Where everything is late and nothing is lost nobody is given up, and everything is computed, once."""
    for event in [event for _, event in mesh.history.story if "a frame was lost" in event]:
        mesh.history.complain(f"a step was run again in vain: {event}")
    for process in mesh.processes:
        if process.ended or process.life.incarnation:
            mesh.history.complain(f"rank {process.rank} was given up for being late")
    for stream in mesh.history.streams:
        if stream.error is not None and "Overloaded" not in stream.error and NOT_FINITE not in stream.error:
            mesh.history.complain(f"{stream.name} ended with an error: {stream.error}")
