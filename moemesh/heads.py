"""The heads of attention that a rank computes with: another share of them whenever its group has other members.

A thread of its own loads a share while the rank answers its peers. The share of the start stays loaded: when the group
is whole again, nothing has to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

import kernels
from attention.mla import MultiHeadLatentAttention
from mesh_config.memory_plan import available_memory, format_bytes
from moemesh.checkpoint import Checkpoint, CheckpointError
from moemesh.mla_loader import MlaLoader, Shards

SPARE_BYTES = 256 << 20
"""Memory that is left free: a rank that took the last of it would be killed with all that it has."""

Layers = Sequence[MultiHeadLatentAttention]


class HeadsMissing(Exception):
    """A share of the heads cannot be loaded."""


class HeadLoader:
    """Reads other heads for layers that are there already."""

    def __init__(
        self,
        loader: MlaLoader,
        checkpoint: Checkpoint,
        *,
        prepare: Callable[[], object] = lambda: None,
        free_memory: Callable[[], int] = available_memory,
    ) -> None:
        """The checkpoint's files are opened now: they may be unlinked later. `prepare` comes before reading."""
        checkpoint.open_all()
        self._prepare = prepare
        self._loader = loader
        self._checkpoint = checkpoint
        self._free_memory = free_memory

    def load(self, layers: Layers, shards: Shards) -> Layers:
        """The layers with the heads of `shards`. CheckpointError, OSError or MemoryError where that cannot be."""
        self._prepare()
        with kernels.aside():
            return [self._load(layer, loaded, shards) for layer, loaded in enumerate(layers)]

    def _load(self, layer: int, loaded: MultiHeadLatentAttention, shards: Shards) -> MultiHeadLatentAttention:
        needed, free = self._loader.num_bytes(layer, shards), self._free_memory()
        if needed + SPARE_BYTES > free:
            raise MemoryError(f"heads of layer {layer} need {format_bytes(needed)}, and {format_bytes(free)} are free")
        return self._loader.with_heads(loaded, self._checkpoint, layer, shards)


class Heads:
    """Which share is wanted, and whether it is there: `ready` may be waited for."""

    def __init__(self, layers: Layers, shards: Shards, loader: HeadLoader, executor: Executor) -> None:
        """`layers` have the heads of `shards`. The executor does one thing at a time."""
        self._layers = layers
        self._loader = loader
        self._executor = executor
        self._first: Future[Layers] = Future()
        self._first.set_result(layers)
        self._shares = {shards: self._first}
        self._wanted = shards

    def want(self, shards: Shards) -> None:
        """Have this share, and forget every other one but that of the start."""
        if shards not in self._shares:
            self._shares = {known: share for known, share in self._shares.items() if share is self._first}
            self._shares[shards] = self._executor.submit(self._loader.load, self._layers, shards)
        self._wanted = shards

    def ready(self) -> bool:
        """The share is there, or cannot be had."""
        return self._shares[self._wanted].done()

    def layers(self) -> Layers:
        """The layers with the wanted share, once ready. HeadsMissing says why not; they may be wanted again."""
        try:
            return self._shares[self._wanted].result()
        except (CheckpointError, OSError, MemoryError) as error:
            del self._shares[self._wanted]
            raise HeadsMissing(str(error)) from error
