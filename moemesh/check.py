"""`moemesh check MODEL`: everything that can be said about a model folder without loading it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mesh_config import (
    ConfigError,
    ModelConfig,
    available_memory,
    count_parameters,
    even_placement,
    load_model_config,
    make_mesh,
    plan_memory,
)
from mesh_config.fields import read_json_object
from mesh_config.memory_plan import format_bytes
from moemesh.checkpoint import Checkpoint, CheckpointError

RANK_COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `check_model` found: `lines` for people to read, `problems` for what would keep the model from serving."""

    folder: Path
    lines: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        verdict = "ok: this model can be served" if self.ok else f"{len(self.problems)} problem(s):"
        return "\n".join([f"{self.folder}", *self.lines, verdict, *(f"  {problem}" for problem in self.problems)])


def check_model(folder: str | Path) -> Report:
    """The Report on a model folder. Raises nothing: what is wrong is in `problems`, by field, file or tensor."""
    root = Path(folder)
    try:
        config = load_model_config(root)
    except ConfigError as error:
        return Report(folder=root, lines=(), problems=(str(error),))
    lines = [*_describe_model(config), *_describe_parameters(config)]
    problems: list[str] = []
    try:
        lines += _describe_checkpoint(Checkpoint(root, config))
    except CheckpointError as error:
        problems += error.problems
    for part in (_describe_tokenizer, _describe_memory):
        try:
            lines += part(root, config)
        except ConfigError as error:
            problems.append(str(error))
    return Report(folder=root, lines=tuple(lines), problems=tuple(problems))


def _line(label: str, text: str) -> str:
    return f"  {label:<13} {text}"


def _describe_model(config: ModelConfig) -> list[str]:
    q_rank = "direct" if config.q_lora_rank is None else f"rank {config.q_lora_rank}"
    yarn = f", YaRN x{config.rope.yarn.factor:g}" if config.rope.yarn is not None else ""
    lines = [
        _line("architecture", config.architecture),
        _line("layers", f"{config.num_layers} ({len(config.moe_layers)} with experts), hidden {config.hidden_size}"),
        _line(
            "attention",
            f"{config.num_heads} heads in {config.num_logical_shards} logical shards, queries {q_rank}, "
            f"latent {config.kv_lora_rank} + rotary {config.qk_rope_head_dim}",
        ),
        _line("positions", f"{config.max_position_embeddings}, theta {config.rope.theta:g}{yarn}"),
        _line("vocabulary", f"{config.vocab_size}{', head tied to embedding' if config.tie_word_embeddings else ''}"),
    ]
    if config.moe_layers:
        groups = f", best {config.topk_groups} of {config.num_expert_groups} groups"
        lines.append(
            _line(
                "experts",
                f"{config.num_experts} of width {config.moe_intermediate_size}, {config.experts_per_token} per token "
                f"({config.topk_method}, {config.scoring}{groups if config.num_expert_groups > 1 else ''}), "
                f"{config.num_shared_experts} shared",
            )
        )
    return lines


def _describe_parameters(config: ModelConfig) -> list[str]:
    counts = count_parameters(config)
    return [_line("parameters", f"{_count(counts.total)}, {_count(counts.active)} active per token")]


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _describe_checkpoint(checkpoint: Checkpoint) -> list[str]:
    files = {info.path for info in checkpoint.tensors.values()}
    by_dtype = Counter[str]()
    for info in checkpoint.tensors.values():
        by_dtype[info.dtype] += info.nbytes
    dtypes = ", ".join(f"{dtype} {format_bytes(num_bytes)}" for dtype, num_bytes in by_dtype.most_common())
    lines = [
        _line(
            "checkpoint",
            f"{len(checkpoint.tensors)} tensors in {len(files)} file(s), {format_bytes(checkpoint.nbytes)}",
        ),
        _line("stored as", dtypes),
    ]
    if checkpoint.set_aside:
        example = min(checkpoint.set_aside)
        lines.append(_line("set aside", f"{len(checkpoint.set_aside)} tensors known and not served, such as {example}"))
    return lines


def _describe_tokenizer(root: Path, config: ModelConfig) -> list[str]:
    if not (root / "tokenizer.json").is_file():
        return [_line("tokenizer", "none (no tokenizer.json): prompts must be token ids")]
    settings = root / "tokenizer_config.json"
    in_settings = settings.is_file() and read_json_object(settings).get("chat_template")
    has_template = (root / "chat_template.jinja").is_file() or in_settings
    return [_line("tokenizer", f"tokenizer.json, {'with' if has_template else 'without'} chat template")]


def _describe_memory(root: Path, config: ModelConfig) -> list[str]:
    """What each rank needs on meshes of several sizes, with room for one sequence of full length."""
    lines = [_line("memory", f"{format_bytes(available_memory())} available here")]
    for ranks in RANK_COUNTS:
        mesh = make_mesh(config, num_ranks=ranks)
        placement = even_placement(config.num_experts, config.moe_layers, mesh.expert_ranks, ranks)
        plans = [plan_memory(config, mesh, placement, rank) for rank in range(ranks)]
        most = max(plans, key=lambda plan: plan.total)
        parts = f"weights {format_bytes(most.weights)}, cache of one full sequence {format_bytes(most.cache)}"
        together = format_bytes(sum(plan.total for plan in plans))
        text = f"{format_bytes(most.total)} each at most ({parts}), {together} together"
        lines.append(_line(f"  {ranks} rank{'s' * (ranks > 1)}", text))
    return lines
