"""The options of every command and, with them, all flags of the command line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mesh_config.coverage import ASSUMED_READ_BANDWIDTH
from moemesh.flags import Options, OptionsError, auto_or, flag, one_of, real, size, text, token_ids, truth, whole
from moemesh.sampling_params import SamplingParams

GPU_MEMORY = {
    "A100-40GB": 40536 << 20,
    "A100-80GB": 81251 << 20,
    "B200-180GB": 183359 << 20,
    "H100-80GB": 81559 << 20,
    "H20-96GB": 97871 << 20,
    "H200-141GB": 143771 << 20,
    "L40S-48GB": 46068 << 20,
}
"""Bytes that the driver reports."""

DEMO_MODEL = Path(__file__).with_name("demo_model")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """What every command takes."""

    model: str = flag(
        str(DEMO_MODEL),
        "folder of the checkpoint, in Hugging Face's layout (default: the bundled demo model)",
        text,
        positional=True,
    )

    @property
    def model_folder(self) -> Path:
        """Where the checkpoint is."""
        return Path(self.model).expanduser()


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ModelOptions):
    """`moemesh check`."""

    command: ClassVar[str] = "check"
    summary: ClassVar[str] = "look at a model folder and the memory it needs, without loading it"


OFFLINE_BATCHED_TOKENS = 4096
"""Where nobody waits for the next token of a stream, weights are better read once for more tokens; as in vLLM."""


def batched_tokens(default: int) -> Any:
    """The flag with its default."""
    return flag(default, "tokens in one step of an attention group; longer prompts are cut", size)


@dataclass(frozen=True, kw_only=True)
class EngineOptions(ModelOptions):
    """What a mesh is made from; the same for `serve`, `generate` and `LLM`."""

    command: ClassVar[str] = "engine"

    ranks: int = flag(1, "number of ranks; more than one start under mpirun", whole(1, 1024))
    attention_tp: int | None = flag(
        None,
        "ranks that share an attention group (default: a host's ranks, at most 8, reduced until it divides)",
        whole(1, 1024),
        metavar="T",
    )
    attention_ranks: int | None = flag(
        None,
        "the first A ranks compute only attention, the others only experts (default: every rank both)",
        whole(1, 1023),
        metavar="A",
    )
    redundant_experts: int = flag(
        0,
        "further copies of experts in each MoE layer, spread over the ranks: an expert that has one is not lost with "
        "a rank",
        whole(0),
        metavar="R",
    )
    combine: str = flag(
        "exact",
        "what expert ranks answer: every expert's row (exact: results do not depend on the placement), or one "
        "weighted sum for each token (compact: fewer bytes)",
        one_of("exact", "compact"),
        metavar="exact|compact",
    )
    expert_hold: str = flag(
        "auto",
        "on: an expert rank waits a moment for calls that are about to come, to read weights once for all of them; "
        "auto: where a host's ranks have more threads than it has cores",
        one_of("auto", "on", "off"),
        metavar="auto|on|off",
    )
    micro_batches: str | int = flag(
        "auto",
        "batches in flight on a rank: 2 hides travel time, but reads weights twice; auto: by what steps were measured "
        "to take, and 1 where a host's ranks have more threads than it has cores",
        auto_or(whole(1, 2)),
        metavar="auto|1|2",
    )
    credit_window: int = flag(16, "frames on the way to one peer before further ones wait here", whole(1, 256))
    threads: int | None = flag(None, "compute threads of a rank (default: cores / ranks)", whole(1, 1024))
    dtype: str = flag(
        "auto",
        "format the weights are kept in (auto: the checkpoint's)",
        one_of("auto", "float32", "bfloat16", "float16"),
        metavar="auto|float32|bfloat16|float16",
    )
    quantization: str | None = flag(
        None,
        "convert weights while loading: int8 = 8 bits and a scale for each 128 inputs, of all matrices but embedding "
        "and router (default: as the checkpoint has them)",
        one_of("int8"),
        metavar="int8",
    )
    device: str = flag(
        "auto",
        "where ranks compute (auto: cuda where there is one)",
        one_of("auto", "cpu", "cuda"),
        metavar="auto|cpu|cuda",
    )
    max_model_len: int | None = flag(
        None, "longest prompt and answer together, in tokens, such as 4096 or 32K (default: the model's)", size
    )
    max_num_seqs: int = flag(256, "sequences in one step of an attention group", whole(1))
    max_num_batched_tokens: int = batched_tokens(2048)
    kv_cache_memory_bytes: int | None = flag(
        None, "size of a rank's attention cache, such as 4GiB (default: from the free memory)", size, metavar="SIZE"
    )
    num_gpu_blocks_override: int | None = flag(
        None, "size of a rank's attention cache in blocks of 32 tokens, on any device", whole(1), metavar="BLOCKS"
    )
    enable_prefix_caching: bool = flag(
        True, "keep the attention cache of finished requests for others that begin alike", truth, switch=True
    )
    prefill_attention: str = flag(
        "absorbed",
        "how positions of prompts attend: as generated ones do (absorbed), or with keys and values of each head "
        "(expanded: faster from a few hundred tokens on; a generated token sent back as prompt may then differ)",
        one_of("absorbed", "expanded"),
        metavar="absorbed|expanded",
    )
    arithmetic: str = flag(
        "auto",
        "how products with bfloat16 weights are computed, both as accurate as float32: as such (float32), or as three "
        "bfloat16 products for AMX (bf16x3: other last bits; auto: where every rank has AMX)",
        one_of("auto", "float32", "bf16x3"),
        metavar="auto|float32|bf16x3",
    )
    fault_tolerance: str = flag(
        "on",
        "on: a rank that dies or stops is given up and its requests go on elsewhere; off: it ends the mesh",
        one_of("on", "off"),
        metavar="on|off",
    )
    respawn: str = flag(
        "on", "start a rank that was lost again; off: go on without it", one_of("on", "off"), metavar="on|off"
    )
    stop_grace: float = flag(
        15.0, "seconds that a rank which was stopped or out of reach has to come back before it is killed", real(0.0)
    )
    trace: str | None = flag(
        None, "write what every rank did when to this file, for https://ui.perfetto.dev", text, metavar="FILE"
    )
    generation_config: str = flag(
        "auto",
        "default sampling parameters: auto = from the model's generation_config.json, vllm = vLLM's own",
        one_of("auto", "vllm"),
        metavar="auto|vllm",
    )

    def _check(self) -> None:
        if self.attention_ranks is not None and self.attention_ranks >= self.ranks:
            raise OptionsError(
                f"--attention-ranks {self.attention_ranks} of --ranks {self.ranks} leaves no rank for the experts; "
                f"use at most {self.ranks - 1}, or leave --attention-ranks away"
            )
        attention = self.attention_ranks or self.ranks
        if self.attention_tp is not None and attention % self.attention_tp:
            raise OptionsError(
                f"--attention-tp {self.attention_tp} does not divide the {attention} attention ranks into groups; "
                f"use {_closest_divisor(attention, self.attention_tp)}"
            )
        if self.kv_cache_memory_bytes is not None and self.num_gpu_blocks_override is not None:
            raise OptionsError(
                "--kv-cache-memory-bytes and --num-gpu-blocks-override both size the cache; give one of them"
            )


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions):
    """`moemesh serve`: a mesh and its HTTP endpoint."""

    command: ClassVar[str] = "serve"
    summary: ClassVar[str] = "serve a model over an OpenAI-compatible HTTP endpoint"

    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 for all networks", text)
    port: int = flag(8000, "port to listen on; 0 picks a free one", whole(0, 65535))
    served_model_name: tuple[str, ...] = flag(
        (),
        "names clients may ask for, the first one is shown (default: MODEL as given)",
        text,
        many=True,
        metavar="NAME",
    )
    api_key: tuple[str, ...] = flag(
        (),
        "keys of which clients must send one; in a --config file other users cannot see them",
        text,
        many=True,
        metavar="KEY",
    )
    max_queued_requests: int | None = flag(
        None,
        "requests that may wait for their turn; further ones get status 503 and Retry-After (default: four times as "
        "many as are computed at a time)",
        whole(1),
    )
    max_queued_tokens: int | None = flag(
        None, "tokens that their prompts may have together, such as 4M (default: no limit)", size
    )
    queue_timeout: float | None = flag(
        None, "seconds that a request may wait for its turn (default: no limit)", real(0.0), metavar="S"
    )
    drain_timeout: float = flag(30.0, "seconds that running requests have to finish after SIGTERM", real(0.0))

    @property
    def served_names(self) -> tuple[str, ...]:
        """The model's names on the endpoint, the first one first."""
        if self.served_model_name:
            return self.served_model_name
        return ("moemesh-demo",) if Path(self.model) == DEMO_MODEL else (self.model,)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(EngineOptions):
    """`moemesh generate`: continue prompts and end. Sampling options that are None keep their default."""

    command: ClassVar[str] = "generate"
    summary: ClassVar[str] = "continue prompts on the command line"

    prompt: tuple[str, ...] = flag((), "text to continue", text, many=True, metavar="TEXT")
    prompt_token_ids: tuple[tuple[int, ...], ...] = flag(
        (), "the same as token ids, such as 1,17,4", token_ids, many=True, metavar="IDS"
    )
    max_tokens: int = flag(128, "longest continuation, in tokens", whole(0))
    temperature: float | None = flag(None, "0 is greedy", real(0.0))
    top_p: float | None = flag(None, "smallest set of tokens with this probability", real(0.0))
    top_k: int | None = flag(None, "so many best tokens; 0 = all", whole(-1))
    min_p: float | None = flag(None, "tokens at least this likely, relative to the best", real(0.0))
    repetition_penalty: float | None = flag(None, "above 1: fewer repetitions", real(0.0))
    seed: int | None = flag(None, "the same seed draws the same tokens", whole(-(2**63), 2**63 - 1))
    n: int = flag(1, "continuations of each prompt", whole(1))
    stop: tuple[str, ...] = flag((), "text that ends a continuation", text, many=True, metavar="TEXT")
    ignore_eos: bool = flag(False, "go on after the model's end of text", truth, switch=True)

    def _check(self) -> None:
        super()._check()
        if not self.prompt and not self.prompt_token_ids:
            raise OptionsError("nothing to continue: give --prompt TEXT or --prompt-token-ids IDS")
        try:
            self.sampling_params()
        except ValueError as error:
            raise OptionsError(str(error)) from error

    def sampling_params(self, defaults: SamplingParams | None = None) -> SamplingParams:
        """What was said about sampling; the rest as in `defaults`."""
        names = {field.name for field in dataclasses.fields(SamplingParams)}
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name in names}
        given = {name: value for name, value in said.items() if value is not None}
        return dataclasses.replace(defaults or SamplingParams(), **given)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(EngineOptions):
    """`moemesh plan`: a mesh as `serve` would make it of these options, on machines that need not be here."""

    command: ClassVar[str] = "plan"
    summary: ClassVar[str] = "say what a mesh would need, whether it fits, and what each rank's loss would cost"

    gpu: str | None = flag(
        None,
        f"plan for GPUs of this kind, one for each rank: {', '.join(GPU_MEMORY)} (default: CPU ranks)",
        one_of(*GPU_MEMORY),
    )
    gpus: int | None = flag(None, "number of GPUs: one rank each", whole(1, 1024))
    ranks_per_host: int | None = flag(None, "ranks on each host (default: 8 with GPUs, else all)", whole(1, 1024))
    memory: int | None = flag(
        None, "memory of a GPU, or of a host with CPU ranks (default: the GPU's, or what is free here)", size
    )
    read_bandwidth: int = flag(
        int(ASSUMED_READ_BANDWIDTH), "bytes of weights a second that a rank can load, such as 2GB", size
    )

    def _check(self) -> None:
        if self.gpus is not None:
            if self.ranks not in (1, self.gpus):
                raise OptionsError(f"--ranks {self.ranks}, but --gpus {self.gpus}: there is one rank for each GPU")
            object.__setattr__(self, "ranks", self.gpus)
        super()._check()


def options_from_json(document: str) -> EngineOptions:
    """The inverse of `to_json`, of the same class. Raises OptionsError for anything else."""
    classes = {cls.command: cls for cls in (EngineOptions, ServeOptions, GenerateOptions)}
    try:
        content = json.loads(document)
        command, given = content["command"], content["options"]
    except (ValueError, TypeError, KeyError) as error:
        raise OptionsError(f"options.json holds no options: {error}") from error
    if command not in classes or not isinstance(given, dict):
        raise OptionsError(f"options.json holds no options: command {command!r}")
    return classes[command].from_mapping(given, source="options.json")


def _closest_divisor(number: int, wanted: int) -> int:
    return max(divisor for divisor in range(1, min(number, wanted) + 1) if number % divisor == 0)
