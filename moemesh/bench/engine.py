"""`moemesh bench engine`: prefill and decode of a real mesh, without HTTP, beside what the machine could do.

A case is a number of sequences and a length of prompt. Prefill: all prompts are sent at once and ask for one token;
the time is until the last of them has it. Decode: the same are sent at once again, what the prefix cache has of them is
not computed twice, and steps are timed while every one of them generates.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from mesh_config import ConfigError, ModelConfig
from moemesh.bench.decode_window import DecodeWindow
from moemesh.bench.machine import MachineProbe, MachineRates
from moemesh.bench.options import BenchEngineOptions
from moemesh.bench.results import result_document, table, write_result
from moemesh.bench.work import decode_bytes, even_routing, prefill_operations, touched_experts
from moemesh.controller import Controller
from moemesh.engine_client import GenerationRequest
from moemesh.frontend import show_loading
from moemesh.mesh import started_mesh
from moemesh.mesh_plan import MeshPlan, memory_of, plan_mesh, threads_per_rank
from moemesh.metrics import Metrics
from moemesh.rank_engine import STATS_SECONDS
from moemesh.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Case:
    """`decode_steps` are timed; `room` is how many tokens a sequence may generate before and while they are."""

    batch_size: int
    prompt_tokens: int
    decode_steps: int
    room: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a case. `context`: tokens that a sequence had cached while decoding was timed, on average.

    Prefill and decode together: `routed`, the tokens that the gate gave each expert of each layer, and
    `overhead_seconds`, what a step took on a rank beside the kernels' arithmetic and the waiting for peers.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    context: float
    routed: dict[int, list[int]]
    overhead_seconds: float


def bench_engine(options: BenchEngineOptions) -> None:
    """Measure, print a table, write the result where it was asked for. Raises what starting a mesh raises."""
    plan = plan_mesh(options.engine_options())
    cases = plan_cases(options, plan)
    threads = threads_per_rank(options, options.ranks) * options.ranks
    figures = asyncio.run(_measure(options, plan, cases, threads))
    print(describe(figures))
    if options.save_result is not None:
        write_result(options.save_result, result_document(options, figures))


def plan_cases(options: BenchEngineOptions, plan: MeshPlan) -> list[Case]:
    """Every batch size with every length of prompt. Raises ConfigError where the mesh has no room for one."""
    return [
        _plan_case(options, plan, batch_size, prompt_tokens)
        for prompt_tokens in options.prompt_tokens
        for batch_size in options.batch_sizes
    ]


def _plan_case(options: BenchEngineOptions, plan: MeshPlan, batch_size: int, prompt_tokens: int) -> Case:
    mesh = plan.mesh
    # While some prompts are still being read, others generate already.
    reading = -(-batch_size * prompt_tokens // max(1, options.max_num_batched_tokens - batch_size))
    needed = prompt_tokens + options.output_tokens + reading
    if needed > mesh.max_model_len:
        raise ConfigError(
            f"{batch_size} prompts of {prompt_tokens} tokens and {options.output_tokens} generated ones make sequences "
            f"of up to {needed}, above max-model-len {mesh.max_model_len}: lower --prompt-tokens or --output-tokens"
        )
    sequences = -(-batch_size // len(mesh.groups))
    room = (mesh.num_cache_blocks or 0) // sequences * mesh.block_size
    if needed > room:
        raise ConfigError(
            f"a group's {mesh.num_cache_blocks} cache blocks leave room for {room} tokens in each of {sequences} "
            f"sequences, {needed} are needed: raise --kv-cache-memory-bytes or lower --batch-sizes"
        )
    return Case(
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        decode_steps=options.output_tokens,
        room=min(room, mesh.max_model_len) - prompt_tokens,
    )


async def _measure(
    options: BenchEngineOptions, plan: MeshPlan, cases: Sequence[Case], num_threads: int
) -> dict[str, Any]:
    draw = random.Random(options.seed)
    done = []
    metrics = Metrics()
    async with started_mesh(options.engine_options(), plan, metrics) as controller:
        await show_loading(controller)
        arithmetic = controller.view.arithmetic
        probe = MachineProbe(
            num_threads=num_threads,
            device=plan.mesh.device,
            arithmetic="bf16x3" if arithmetic == "bf16x3" else "float32",
        )
        engine = _Engine(controller, metrics, draw)
        await engine.prefill(engine.prompts(1, cases[0].prompt_tokens))  # makes what is made at first use
        await engine.take_counted()
        for case in cases:
            before = probe.measure()
            runs = [await engine.run(case) for _ in range(options.repeats)]
            rates = before.best(probe.measure())
            done.append(_case_figures(options, plan, case, runs, rates))
    return {"mesh": _describe_mesh(options, plan) | {"arithmetic": arithmetic}, "cases": done}


class _Engine:
    """Sends requests of random ids to a controller and notes when their tokens come."""

    def __init__(self, controller: Controller, metrics: Metrics, draw: random.Random) -> None:
        self._controller = controller
        self._metrics = metrics
        self._draw = draw
        self._routed = self._load()
        self._worked = self._work()

    async def run(self, case: Case) -> Run:
        prompts = self.prompts(case.batch_size, case.prompt_tokens)
        prefill_seconds = await self.prefill(prompts)
        window = await self.decode(case, prompts)
        routed, overhead = await self.take_counted()
        return Run(
            prefill_tokens_per_s=case.batch_size * case.prompt_tokens / prefill_seconds,
            decode_tokens_per_s=window.tokens_per_s,
            context=case.prompt_tokens + window.mean_generated,
            routed=routed,
            overhead_seconds=overhead,
        )

    async def prefill(self, prompts: Sequence[tuple[int, ...]]) -> float:
        """Seconds until every prompt has its first token."""
        window = DecodeWindow(len(prompts), 1)
        started = time.perf_counter()
        await self._burst(prompts, 1, window)
        return time.perf_counter() - started

    async def decode(self, case: Case, prompts: Sequence[tuple[int, ...]]) -> DecodeWindow:
        """The closed window."""
        window = DecodeWindow(case.batch_size, case.decode_steps)
        await self._burst(prompts, case.room, window)
        if not window.closed:
            raise ConfigError(
                f"sequences ended after {case.room} tokens before all had generated {case.decode_steps} together: "
                "lower --output-tokens or raise --kv-cache-memory-bytes"
            )
        return window

    def prompts(self, batch_size: int, prompt_tokens: int) -> list[tuple[int, ...]]:
        """Of random ids, never the same twice."""
        vocab = range(self._controller.model_config.vocab_size)
        return [tuple(self._draw.choices(vocab, k=prompt_tokens)) for _ in range(batch_size)]

    async def _burst(self, prompts: Sequence[tuple[int, ...]], max_tokens: int, window: DecodeWindow) -> None:
        """All at once, until they end or the window closes."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        async with asyncio.TaskGroup() as group:
            for index, prompt in enumerate(prompts):
                group.create_task(self._one(index, GenerationRequest(prompt_token_ids=prompt, params=params), window))

    async def _one(self, index: int, request: GenerationRequest, window: DecodeWindow) -> None:
        async with aclosing(self._controller.generate(request)) as outputs:
            async for output in outputs:
                window.note(index, len(output.token_ids), time.perf_counter())
                if window.closed:
                    return

    async def take_counted(self) -> tuple[dict[int, list[int]], float]:
        """`routed` and `overhead_seconds` since the last call, once the ranks have had the time to say so."""
        await asyncio.sleep(2 * STATS_SECONDS)
        before, self._routed = self._routed, self._load()
        routed = {
            layer: [now - then for now, then in zip(counts, before[layer], strict=True)]
            for layer, counts in self._routed.items()
        }
        worked, self._worked = self._worked, self._work()
        steps, busy, computing = (now - then for now, then in zip(self._worked, worked, strict=True))
        return routed, (busy - computing) / max(1.0, steps)

    def _work(self) -> tuple[float, ...]:
        return tuple(self._metrics.ranks.total(key) for key in ("steps", "busy_seconds", "kernel_seconds"))

    def _load(self) -> dict[int, list[int]]:
        load = self._controller.mesh()["expert_load"]
        return {int(layer): counts for layer, counts in load.items()}


def _case_figures(
    options: BenchEngineOptions, plan: MeshPlan, case: Case, runs: Sequence[Run], rates: MachineRates
) -> dict[str, Any]:
    model = plan.model
    prefill = statistics.median(run.prefill_tokens_per_s for run in runs)
    decode = statistics.median(run.decode_tokens_per_s for run in runs)
    overhead = statistics.median(run.overhead_seconds for run in runs)
    num_touched = _touched(model, case.batch_size, runs)
    num_bytes = decode_bytes(
        model,
        plan.mesh,
        [memory_of(options, model, plan.mesh, plan.placement, rank) for rank in range(plan.mesh.num_ranks)],
        batch_size=case.batch_size,
        context=statistics.mean(run.context for run in runs),
        num_touched=num_touched,
    )
    operations = prefill_operations(model, plan.mesh, case.prompt_tokens) / case.prompt_tokens
    return {
        "batch_size": case.batch_size,
        "prompt_tokens": case.prompt_tokens,
        "output_tokens": case.decode_steps,
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "prefill_runs": [run.prefill_tokens_per_s for run in runs],
        "decode_runs": [run.decode_tokens_per_s for run in runs],
        "step_overhead_seconds": overhead,
        "step_overhead_share": overhead * decode / case.batch_size,
        "touched_experts": num_touched,
        "decode_bytes_per_step": num_bytes,
        "prefill_operations_per_token": operations,
        "read_bytes_per_s": rates.read_bytes_per_s,
        "gemm_flops_per_s": rates.gemm_flops_per_s,
        "decode_share_of_read": decode / case.batch_size * num_bytes / rates.read_bytes_per_s,
        "prefill_share_of_gemm": prefill * operations / rates.gemm_flops_per_s,
    }


def _touched(model: ModelConfig, batch_size: int, runs: Sequence[Run]) -> float:
    """By what was observed; where a rank said nothing, as if every expert were equally likely."""
    layers = runs[0].routed
    routed = {
        layer: [sum(counts) for counts in zip(*(run.routed[layer] for run in runs), strict=True)] for layer in layers
    }
    observed = all(any(counts) for counts in routed.values())
    return touched_experts(routed if observed else even_routing(model), model.experts_per_token, batch_size)


def _describe_mesh(options: BenchEngineOptions, plan: MeshPlan) -> dict[str, Any]:
    return {
        "ranks": plan.mesh.num_ranks,
        "attention_tp": plan.mesh.attention_tp,
        "attention_ranks": plan.mesh.num_attention_ranks,
        "threads_per_rank": threads_per_rank(options, options.ranks),
        "device": plan.mesh.device,
        "prefill_attention": plan.mesh.prefill_attention,
        "cache_blocks": plan.mesh.num_cache_blocks,
    }


def describe(figures: dict[str, Any]) -> str:
    """The figures as a table for people."""
    header = (
        *("batch", "prompt", "prefill tok/s", "% of GEMM", "decode tok/s", "ms/step"),
        *("ms beside kernels", "MB/step", "% of read"),
    )
    rows = [
        (
            str(case["batch_size"]),
            str(case["prompt_tokens"]),
            f"{case['prefill_tokens_per_s']:.1f}",
            f"{100 * case['prefill_share_of_gemm']:.0f}",
            f"{case['decode_tokens_per_s']:.1f}",
            f"{1000 * case['batch_size'] / case['decode_tokens_per_s']:.2f}",
            f"{1000 * case['step_overhead_seconds']:.2f}",
            f"{case['decode_bytes_per_step'] / 1e6:.1f}",
            f"{100 * case['decode_share_of_read']:.0f}",
        )
        for case in figures["cases"]
    ]
    read = max(case["read_bytes_per_s"] for case in figures["cases"]) / 1e9
    gemm = max(case["gemm_flops_per_s"] for case in figures["cases"]) / 1e9
    mesh = figures["mesh"]
    title = f"ranks {mesh['ranks']}, threads {mesh['threads_per_rank']} each, attention TP {mesh['attention_tp']}"
    limits = f"this machine reads {read:.1f} GB/s and multiplies {gemm:.0f} GFLOP/s ({mesh['arithmetic']})"
    return "\n".join((title, table(header, rows), limits))
