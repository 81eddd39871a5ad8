"""The tensor-parallel attention service: one layer of attention, computed by the members of a group together.

Each member owns a part of the step's rows. It projects its own rows down, gathers everybody's projections (they are
far narrower than the hidden state), attends with its heads over all rows, and gets back the finished rows it owns.

Shape legend: T rows of the micro-batch, O the rows this member owns, H hidden, D projected width.
"""

from collections.abc import Sequence

from torch import Tensor

from attention.latent_cache import LatentCache
from attention.mla import MultiHeadLatentAttention
from kernels import AttentionBatch
from transport.collectives import GroupCall, all_gather_rows, reduce_scatter_tree
from transport.links import Link
from transport.mailbox import Mailbox
from transport.shards import owned_rows
from transport.tasks import Steps
from transport.trace import Trace

_GATHER, _REDUCE = 0, 1


class AttentionService:
    """A member's attention layers and its copy of the group's latent cache."""

    def __init__(
        self,
        layers: Sequence[MultiHeadLatentAttention],
        cache: LatentCache,
        *,
        link: Link,
        mailbox: Mailbox,
        members: tuple[int, ...],
        num_shards: int,
        trace: Trace | None = None,
    ) -> None:
        self._layers = layers
        self._cache = cache
        self._link = link
        self._mailbox = mailbox
        self._members = members
        self._index = members.index(link.rank)
        self._num_shards = num_shards
        self._trace = trace

    def owned_rows(self, num_rows: int) -> tuple[int, int]:
        """(start, stop) of the rows of a micro-batch that this member owns."""
        return owned_rows(num_rows, len(self._members), self._index)

    def attend(
        self, layer: int, x_OH: Tensor, batch: AttentionBatch, *, generation: int, step: int, micro_batch: int
    ) -> Steps[Tensor]:
        """Attention output [O, H] of the owned rows from their normalised hidden states [O, H]."""
        attention = self._layers[layer]
        lap = None if self._trace is None else self._trace.laps(micro_batch, step=step, layer=layer)
        if len(self._members) == 1:
            y_OH = attention.whole(x_OH, batch, self._cache, layer)
            if lap:
                lap("attention")
            return y_OH
        projected = attention.project(x_OH, batch, self.owned_rows(batch.num_rows)[0])
        if lap:
            lap("project")
        rows_TD = yield from all_gather_rows(
            self._call(_GATHER, layer, generation, step, micro_batch), projected, batch.num_rows
        )
        if lap:
            lap("gather")
        partials = attention.attend(rows_TD, batch, self._cache, layer)
        if lap:
            lap("attend")
        y_OH = yield from reduce_scatter_tree(
            self._call(_REDUCE, layer, generation, step, micro_batch), partials, self._num_shards
        )
        if lap:
            lap("reduce")
        return attention.finish(y_OH)

    def _call(self, phase: int, layer: int, generation: int, step: int, micro_batch: int) -> GroupCall:
        return GroupCall(
            link=self._link,
            mailbox=self._mailbox,
            members=self._members,
            generation=generation,
            step=step,
            layer=layer,
            micro_batch=micro_batch,
            phase=phase,
        )
