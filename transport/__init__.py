"""How bytes move: links, frames, dispatch and combine, tensor-parallel collectives, control sockets. Knows no model."""

from transport.collectives import GroupCall, Wait, all_gather_rows, reduce_scatter_tree
from transport.dispatch import (
    Dispatch,
    DispatchPart,
    ExpertCall,
    dispatch_tensors,
    expert_call,
    merge_calls,
    plan_dispatch,
)
from transport.errors import Overloaded, ProtocolError, TransportError
from transport.frame import Frame, Header, Kind, decode, encode
from transport.links import Link, LinkStats
from transport.local_link import LocalLink, LocalNetwork
from transport.mailbox import Mailbox, MailKey
from transport.mpi_link import MpiLink
from transport.mpi_runtime import detect_mpi_launch, init_mpi
from transport.shards import maximal_subtrees, owned_shards, row_split, tree_sum

__all__ = [
    "Dispatch",
    "DispatchPart",
    "ExpertCall",
    "Frame",
    "GroupCall",
    "Header",
    "Kind",
    "Link",
    "LinkStats",
    "LocalLink",
    "LocalNetwork",
    "MailKey",
    "Mailbox",
    "MpiLink",
    "Overloaded",
    "ProtocolError",
    "TransportError",
    "Wait",
    "all_gather_rows",
    "decode",
    "detect_mpi_launch",
    "dispatch_tensors",
    "encode",
    "expert_call",
    "init_mpi",
    "maximal_subtrees",
    "merge_calls",
    "owned_shards",
    "plan_dispatch",
    "reduce_scatter_tree",
    "row_split",
    "tree_sum",
]
