"""The whole mesh in one thread: the production engines over the local link, driven turn by turn in a seeded order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from experts import ExpertService
from mesh_config import MeshConfig, load_model_config, make_mesh
from mesh_config.model_shape import Quantization
from moemesh.checkpoint import Checkpoint
from moemesh.heads import HeadLoader
from moemesh.heart import StillHeart
from moemesh.idle import IdleWait
from moemesh.mesh_plan import placement_of
from moemesh.model import RankModel
from moemesh.model_loader import ModelLoader
from moemesh.neighbours import Neighbours
from moemesh.rank_build import build_rank
from moemesh.rank_engine import RankEngine
from moemesh.sampling_params import SamplingParams
from moemesh.take_over import TakeOver
from transport import messages
from transport.frame import Kind
from transport.life import Life
from transport.local_link import LocalNetwork

CPU = torch.device("cpu")
MAX_TURNS = 200_000
T = TypeVar("T")


class Inline(Executor):
    """Does everything at once, in the thread that asks for it."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class LocalControl:
    """A rank's control port without a socket: messages to the rank are put into `inbox`, those from it into `sent`."""

    def __init__(self) -> None:
        self.inbox: list[messages.Message] = []
        self.sent: list[messages.Message] = []

    def send(self, message: messages.Message) -> None:
        self.sent.append(message)

    def receive_all(self) -> list[messages.Message]:
        received, self.inbox = self.inbox, []
        return received

    def wait(self, timeout_s: float, also: int | None = None) -> bool:
        return bool(self.inbox)

    def begin_life(self, life: Life) -> None:
        self.life = life


@dataclass
class Result:
    """What came for one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] | None = None
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class LocalMesh:
    """A mesh of `num_ranks` engines on one checkpoint. `seed` decides delivery and turns; None = in order."""

    def __init__(
        self,
        folder: Path,
        *,
        seed: int | None = None,
        num_cache_blocks: int = 512,
        quantization: Quantization | None = None,
        **fields: Any,
    ) -> None:
        config = load_model_config(folder)
        self.mesh: MeshConfig = make_mesh(config, num_cache_blocks=num_cache_blocks, **fields)
        self.placement = placement = placement_of(config, self.mesh)
        network = LocalNetwork(self.mesh.num_ranks, seed=seed, credit_window=self.mesh.credit_window)
        checkpoint = Checkpoint(folder, config)
        self._random = None if seed is None else random.Random(seed)
        self._network = network
        self._dead: set[int] = set()
        self.reports: list[messages.PeerReport] = []
        self.said: list[tuple[int, messages.Hosting | messages.Ready]] = []
        self.services: dict[int, ExpertService] = {}
        self.links = network.links
        self.controls = [LocalControl() for _ in range(self.mesh.num_ranks)]
        self.models: list[RankModel] = []
        self.engines: list[RankEngine] = []
        self._folder = folder
        self._loaders: list[ModelLoader] = []
        self._head_loaders: list[HeadLoader] = []
        for rank in range(self.mesh.num_ranks):
            loader = ModelLoader(
                checkpoint,
                mesh=self.mesh,
                placement=placement,
                rank=rank,
                device=CPU,
                weight_dtype=None,
                quantization=quantization,
                report=lambda done, total: None,
            )
            model = loader.load()
            self.models.append(model)
            self._loaders.append(loader)
            self._head_loaders.append(HeadLoader(loader.mla, checkpoint))
            met = dict.fromkeys(range(self.mesh.num_ranks), 0)
            self.engines.append(self.new_engine(rank, Neighbours(rank, born=0, met=met)))
        self.results: dict[int, Result] = {}
        self.submitted: dict[int, messages.Submit] = {}
        self.num_replayed = 0
        self.incarnations: dict[int, int] = {}

    def _take_over(self, rank: int, service: ExpertService) -> TakeOver:
        self.services[rank] = service
        checkpoint = Checkpoint(self._folder, load_model_config(self._folder))
        return TakeOver(service, checkpoint, self._loaders[rank].ffns, prepare=lambda: None, wake=lambda: None)

    def new_engine(self, rank: int, neighbours: Neighbours) -> RankEngine:
        """Of the rank's latest process."""
        control = self.controls[rank]
        return build_rank(
            self.models[rank],
            self.mesh,
            self.placement,
            link=self._network.links[rank],
            control=control,
            device=CPU,
            idle=IdleWait(control, bell=None, alone=True, crowded=False),
            heart=StillHeart(),
            neighbours=neighbours,
            head_loader=self._head_loaders[rank],
            executor=Inline(),
            make_take_over=partial(self._take_over, rank) if self.mesh.num_ranks > 1 else None,
        )

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        group: int = 0,
        salt: str = "",
        generated: Sequence[int] = (),
    ) -> int:
        """Send a request to a group's leader, or one that has got as far as `generated` elsewhere; its id."""
        request_id = len(self.results) + 1
        self.results[request_id] = Result()
        message = messages.Submit(
            request_id=request_id,
            prompt=list(prompt),
            params=params.to_wire(),
            generated=list(generated),
            cache_salt=salt,
        )
        self.submitted[request_id] = message
        self.controls[self.mesh.groups[group][0]].inbox.append(message)
        return request_id

    def cancel(self, request_id: int, *, group: int = 0) -> None:
        self.controls[self.mesh.groups[group][0]].inbox.append(messages.Cancel(request_id=request_id))

    def kill(self, rank: int) -> None:
        """The rank does nothing more, and its peers learn of it."""
        self._dead.add(rank)
        self._network.kill(rank, noticed_after=0.0)

    def stop(self, rank: int) -> None:
        """The rank does nothing, and nobody is told."""
        self._dead.add(rank)

    def go_on(self, rank: int) -> None:
        """The rank was stopped, and does something again."""
        self._dead.discard(rank)

    def readmit(self, rank: int) -> None:
        """A rank that was stopped, and given up by the others, goes on as another life; a view is to follow."""
        self._dead.discard(rank)
        self.incarnations[rank] = self.incarnations.get(rank, 0) + 1
        self.controls[rank].inbox.append(messages.Readmit(incarnation=self.incarnations[rank]))

    def regroup(self, *, generation: int, members: Sequence[int], lost_tokens: int = 0) -> None:
        """Say that group 0 goes on with these members, and with its requests, of which the last tokens may be lost."""
        states = ["dead" if rank in self._dead else "up" for rank in range(self.mesh.num_ranks)]
        groups = [messages.GroupMembers(generation, list(members), 0)]
        groups += [messages.GroupMembers(0, list(others), 0) for others in self.mesh.groups[1:]]
        incarnations = [self.incarnations.get(rank, 0) for rank in range(self.mesh.num_ranks)]
        news = messages.View(
            epoch=generation, incarnations=incarnations, states=states, born=[0] * len(states), groups=groups
        )
        for rank, control in enumerate(self.controls):
            if rank not in self._dead:
                control.inbox.append(news)
        open_ones = {request: result for request, result in self.results.items() if not result.ended}
        if lost_tokens:
            for result in open_ones.values():
                del result.tokens[-lost_tokens:], result.logprobs[-lost_tokens:]
        going_on = [
            replace(self.submitted[request], generated=self.submitted[request].generated + result.tokens)
            for request, result in open_ones.items()
        ]
        self.controls[members[0]].inbox.append(messages.Regroup(generation, going_on))

    def turn(self) -> bool:
        """Every living engine has a turn; whether any had something to do."""
        order = [engine for rank, engine in enumerate(self.engines) if rank not in self._dead]
        if self._random is not None:
            self._random.shuffle(order)
        busy = [engine.turn() for engine in order]
        for rank, control in enumerate(self.controls):
            for message in control.sent:
                if isinstance(message, messages.Outputs):
                    for item in message.items:
                        self._take(item)
                elif isinstance(message, messages.PeerReport):
                    self.reports.append(message)
                elif isinstance(message, messages.Hosting | messages.Ready):
                    self.said.append((rank, message))
            control.sent.clear()
        return any(busy)

    def run(self, requests: Sequence[int] | None = None) -> list[Result]:
        """Turn until the requests (default: all) have ended; their results."""
        wanted = [self.results[request] for request in (requests or list(self.results))]
        for _ in range(MAX_TURNS):
            if all(result.ended for result in wanted):
                return wanted
            self.turn()
        raise AssertionError(f"no end after {MAX_TURNS} turns: {self.results}")

    def settle(self) -> None:
        """Turn until nobody has anything left to do."""
        quiet = 0
        for _ in range(MAX_TURNS):
            quiet = 0 if self.turn() else quiet + 1
            if quiet > 50:  # with a seed a frame may take several turns to arrive
                return
        raise AssertionError(f"still busy after {MAX_TURNS} turns")

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Result]:
        """Submit all prompts at once, spread over the groups, and run to the end."""
        groups = len(self.mesh.groups)
        return self.run([self.submit(prompt, params, group=i % groups) for i, prompt in enumerate(prompts)])

    def frames_sent(self, rank: int) -> dict[Kind, int]:
        return self.links[rank].stats().frames_sent

    def _take(self, item: messages.OutputItem) -> None:
        result, submitted = self.results[item.request_id], self.submitted[item.request_id]
        known = 0
        if item.error is None:
            position = item.position - len(submitted.prompt) - len(submitted.generated)
            known = len(result.tokens) - position
            assert known >= 0, f"request {item.request_id} has {len(result.tokens)} tokens and got {item}"
            assert item.token_ids[:known] == result.tokens[position : position + len(item.token_ids)], "a wrong replay"
            if known and known >= len(item.token_ids):
                self.num_replayed += len(item.token_ids)
                return
        assert not result.ended, f"request {item.request_id} had ended and got {item}"
        result.tokens += item.token_ids[known:]
        result.logprobs += (item.logprobs or [])[known:]
        if item.prompt_logprobs is not None:
            assert result.prompt_logprobs is None, "prompt log-probabilities came twice"
            result.prompt_logprobs = item.prompt_logprobs
        result.finish_reason, result.error = item.finish_reason, item.error
        result.cached_tokens += item.cached_tokens
