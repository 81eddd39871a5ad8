"""Put a rank together from its plan, its share of the model and its link."""

import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import torch

from attention.block_pool import BlockPool
from attention.latent_cache import BLOCK_SIZE, LatentCache
from attention.service import AttentionService
from experts import ExpertClient, ExpertService, HoldRule
from gating import ExpertLoad
from mesh_config.mesh import MeshConfig
from mesh_config.model_config import ModelConfig
from mesh_config.placement import Placement
from moemesh.forward import ForwardPass, WholeForward, stack_layers
from moemesh.group_member import Engaged, GroupMember
from moemesh.group_seat import GroupSeat, MakeMember
from moemesh.heads import HeadLoader, Heads
from moemesh.idle import IdleWait
from moemesh.kept_cache import KeptCache
from moemesh.model import RankModel
from moemesh.neighbours import Neighbours
from moemesh.overlap import OverlapRule
from moemesh.rank_engine import ControlPort, HeartBeat, RankEngine
from moemesh.scheduler import Scheduler
from moemesh.scheduler_records import SchedulerLimits
from moemesh.take_over import TakeOver
from transport.links import Link
from transport.mailbox import Mailbox
from transport.shards import owned_shards
from transport.tasks import Steps
from transport.trace import Trace


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What the pieces of one rank share."""

    config: ModelConfig
    mesh: MeshConfig
    placement: Placement
    link: Link
    mailbox: Mailbox
    experts: ExpertService
    load: ExpertLoad
    device: torch.device
    crowded: bool
    trace: Trace | None
    clock: Callable[[], float]


def build_rank(
    model: RankModel,
    mesh: MeshConfig,
    placement: Placement,
    *,
    link: Link,
    control: ControlPort,
    device: torch.device,
    idle: IdleWait,
    heart: HeartBeat,
    neighbours: Neighbours,
    head_loader: HeadLoader,
    executor: Executor,
    make_take_over: Callable[[ExpertService], TakeOver] | None = None,
    trace: Trace | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> RankEngine:
    """The engine of `link.rank`, with an empty cache of `mesh.num_cache_blocks` blocks.

    Heads that it gets later are loaded by `executor`, one share after the other.
    """
    config = model.config
    parts = _Parts(
        config=config,
        mesh=mesh,
        placement=placement,
        link=link,
        mailbox=Mailbox(),
        experts=ExpertService(
            model.banks,
            rank=link.rank,
            hidden=config.hidden_size,
            device=device,
            hold=_hold(model, mesh, crowded=idle.crowded),
            clock=clock,
            trace=trace,
        ),
        load=ExpertLoad(config.moe_layers, config.num_experts),
        device=device,
        crowded=idle.crowded,
        trace=trace,
        clock=clock,
    )
    client = _client(parts) if model.attention is not None else None
    seat, group = None, mesh.group_of(link.rank)
    if model.attention is not None and client is not None:
        layers = [layer.attention for layer in model.attention.layers]
        index = link.rank % mesh.attention_tp
        shards = owned_shards(config.num_logical_shards, mesh.attention_tp, index)
        assert group is not None
        seat = GroupSeat(
            _member_factory(parts, model, client, Heads(layers, shards, head_loader, executor)),
            mesh.groups[group],
            group=group,
            rank=link.rank,
            config=config,
            mailbox=parts.mailbox,
            send=control.send,
        )
    return RankEngine(
        link=link,
        mailbox=parts.mailbox,
        control=control,
        experts=parts.experts,
        client=client,
        take_over=None if make_take_over is None else make_take_over(parts.experts),
        load=parts.load,
        placement=placement,
        seat=seat,
        num_blocks=mesh.num_cache_blocks or 0,
        idle=idle,
        heart=heart,
        neighbours=neighbours,
        clock=clock,
    )


def _hold(model: RankModel, mesh: MeshConfig, *, crowded: bool) -> HoldRule | None:
    if mesh.expert_hold == "off" or (mesh.expert_hold == "auto" and not crowded) or not model.banks:
        return None
    num_resident = max(bank.num_resident for bank in model.banks.values())
    return HoldRule(model.config.moe_layers, num_resident, patient=crowded)


def _client(parts: _Parts) -> ExpertClient:
    return ExpertClient(
        parts.link,
        parts.experts,
        placement=parts.placement,
        living=dict.fromkeys(range(parts.mesh.num_ranks), 0),
        compact=parts.mesh.combine == "compact",
        clock=parts.clock,
        trace=parts.trace,
    )


def _member_factory(parts: _Parts, rank_model: RankModel, client: ExpertClient, heads: Heads) -> MakeMember:
    """What a generation of the group has of its own is small; layers and the cache's memory are the rank's."""
    config, mesh, rank = parts.config, parts.mesh, parts.link.rank
    model = rank_model.attention
    assert model is not None
    assert mesh.num_cache_blocks is not None
    cache = LatentCache(
        num_layers=config.num_layers,
        num_blocks=mesh.num_cache_blocks,
        width=config.latent_width,
        device=parts.device,
    )
    num_shards = config.num_logical_shards
    whole = None
    if mesh.num_ranks == 1 and mesh.combine == "exact":
        whole = WholeForward(stack_layers(rank_model, cache, parts.load), parts.experts)
        whole.reserve(min(mesh.max_num_batched_tokens, mesh.num_cache_blocks * BLOCK_SIZE))

    def engage(members: tuple[int, ...]) -> Steps[Engaged]:
        heads.want(owned_shards(num_shards, len(members), members.index(rank)))
        yield heads
        attention = AttentionService(
            heads.layers(),
            cache,
            link=parts.link,
            mailbox=parts.mailbox,
            members=members,
            num_shards=num_shards,
            trace=parts.trace,
        )
        return attention, whole or ForwardPass(model, attention, client, parts.load)

    def make(generation: int, members: tuple[int, ...], *, goes_on: bool, kept: KeptCache | None) -> GroupMember:
        return GroupMember(
            members=members,
            link=parts.link,
            mailbox=parts.mailbox,
            model=model,
            cache=cache,
            engage=partial(engage, members),
            overlap=_overlap(mesh, crowded=parts.crowded),
            expand_prompts=mesh.prefill_attention == "expanded",
            scheduler=_scheduler(mesh) if members and members[0] == rank else None,
            generation=generation,
            clock=parts.clock,
            kept=kept if goes_on else KeptCache(generation),
            goes_on=goes_on,
            trace=parts.trace,
        )

    return make


def _overlap(mesh: MeshConfig, *, crowded: bool) -> OverlapRule:
    if mesh.micro_batches != "auto":
        return OverlapRule((mesh.micro_batches,))
    return OverlapRule((1,) if crowded else (1, 2))


def _scheduler(mesh: MeshConfig) -> Scheduler:
    assert mesh.num_cache_blocks is not None
    limits = SchedulerLimits(
        max_num_batched_tokens=mesh.max_num_batched_tokens,
        max_num_seqs=mesh.max_num_seqs,
        max_model_len=mesh.max_model_len,
    )
    pool = BlockPool(mesh.num_cache_blocks, BLOCK_SIZE)
    return Scheduler(
        pool,
        limits,
        # Latents of one form of attention are not those of another.
        prefix_key=mesh.prefill_attention if mesh.prefix_caching else None,
        prefix_by_role=mesh.prefill_attention == "expanded",
    )
