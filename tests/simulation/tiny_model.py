"""The model that the simulation serves, loaded once, and the requests that it is asked to compute."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import kernels
from experts import ExpertBank
from mesh_config import MeshConfig, Placement, load_model_config
from mesh_config.model_config import ModelConfig
from mesh_config.model_shape import Quantization
from moemesh.checkpoint import Checkpoint
from moemesh.engine_client import GenerationRequest
from moemesh.mesh_plan import placement_of
from moemesh.model import RankModel
from moemesh.model_loader import ModelLoader
from moemesh.sampling_params import SamplingParams
from tests.random_checkpoint import write_random_checkpoint

CPU = torch.device("cpu")
NUM_EXPERTS = 8
POISON = 49
"""A token whose embedding is not a number: whoever has it in the prompt gets no answer. Nobody else draws it."""
MAX_MODEL_LEN = 128
MODEL_FIELDS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 256,
}


def write_model(folder: Path) -> Path:
    """A model of two layers, the first of them dense."""
    return write_random_checkpoint(folder, 4, **MODEL_FIELDS)


class Share(NamedTuple):
    """What a process holds when it has just loaded, and what loads more later."""

    model: RankModel
    loader: ModelLoader


@dataclass
class Model:
    """A checkpoint, and what each rank of each mesh shape holds of it: loaded once, but for the experts."""

    folder: Path
    config: ModelConfig = field(init=False)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        kernels.set_num_threads(1)
        self.config = load_model_config(self.folder)
        self.checkpoint = Checkpoint(self.folder, self.config)
        self._loaded: dict[tuple[object, ...], Share] = {}

    def placement(self, mesh: MeshConfig) -> Placement:
        return placement_of(self.config, mesh)

    def share(
        self, mesh: MeshConfig, placement: Placement, rank: int, quantization: Quantization | None = None
    ) -> Share:
        """For a new process of a rank."""
        shape = (mesh.num_ranks, mesh.attention_ranks, mesh.attention_tp, mesh.redundant_experts)
        key = (*shape, rank, mesh.prefill_attention, quantization)
        loaded = self._loaded.get(key)
        if loaded is None:
            loaded = self._loaded[key] = self._load(mesh, placement, rank, quantization)
        model, loader = loaded
        banks = {layer: self._bank(loader, layer, bank.logical_experts) for layer, bank in model.banks.items()}
        return Share(RankModel(config=model.config, attention=model.attention, banks=banks), loader)

    def _bank(self, loader: ModelLoader, layer: int, experts: Sequence[int]) -> ExpertBank:
        packed = loader.ffns.expert_bank(layer, len(experts))
        loader.ffns.load_experts(packed, range(len(experts)), self.checkpoint, layer, experts)
        return ExpertBank(experts, NUM_EXPERTS, packed)

    def _load(self, mesh: MeshConfig, placement: Placement, rank: int, quantization: Quantization | None) -> Share:
        loader = ModelLoader(
            self.checkpoint,
            mesh=mesh,
            placement=placement,
            rank=rank,
            device=CPU,
            weight_dtype=None,
            quantization=quantization,
            report=lambda done, total: None,
        )
        model = loader.load()
        if model.attention is not None:
            model.attention.embedding_VH[POISON] = math.nan
        return Share(model, loader)


@cache
def requests() -> tuple[GenerationRequest, ...]:
    """What may be asked for: greedy and drawn, scored, with common beginnings, of one block and of several."""
    rng = random.Random(7)
    beginning = tuple(rng.randrange(2, 96) for _ in range(40))
    made = []
    for index in range(28):
        own = tuple(rng.randrange(2, 96) for _ in range(rng.choice([1, 5, 20, 45])))
        prompt = beginning[: rng.choice([33, 40])] + own[:20] if index % 4 == 0 else own
        if index >= 24:
            prompt = (*prompt[: rng.randrange(len(prompt) + 1)], POISON, *own[:10])
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.2]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            seed=rng.randrange(1 << 40),
            max_tokens=rng.choice([1, 3, 6, 8, 12, 40]),
            logprobs=rng.choice([None, 1]),
            prompt_logprobs=0 if index % 8 == 3 else None,
            ignore_eos=index % 2 == 0,
        )
        made.append(GenerationRequest(prompt_token_ids=prompt, params=params, request_id=str(index)))
    return tuple(made)
