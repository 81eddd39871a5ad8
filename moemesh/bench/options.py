"""Options of the benchmark commands."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from moemesh.flags import Options, OptionsError, counts, flag, one_of, real, text, truth, whole
from moemesh.options import OFFLINE_BATCHED_TOKENS, EngineOptions, batched_tokens


def rate(value: object) -> float:
    """A positive number of requests a second, or inf."""
    if value == "inf" or value == math.inf:
        return math.inf
    number = real(0.0)(value)
    if number == 0:
        raise ValueError("expected a positive number or inf, got 0")
    return number


@dataclass(frozen=True, kw_only=True)
class BenchEngineOptions(EngineOptions):
    """`moemesh bench engine`: how fast a mesh computes, and how near that is to what the machine can do."""

    command: ClassVar[str] = "bench engine"
    summary: ClassVar[str] = "measure prefill and decode of a mesh by batch size, against the machine's own limits"

    batch_sizes: tuple[int, ...] = flag((1, 8, 32), "sequences at a time", counts, metavar="B,...")
    prompt_tokens: tuple[int, ...] = flag((128,), "lengths of the prompts", counts, metavar="N,...")
    max_num_batched_tokens: int = batched_tokens(OFFLINE_BATCHED_TOKENS)
    output_tokens: int = flag(64, "tokens that every sequence generates while all of them do", whole(2))
    repeats: int = flag(1, "runs of every case; the medians are shown", whole(1))
    seed: int = flag(0, "draws the prompts", whole(0))
    save_result: str | None = flag(None, "write the result as JSON to this file", text, metavar="FILE")

    def _check(self) -> None:
        super()._check()
        most = max(self.batch_sizes)
        if most > self.max_num_seqs:
            raise OptionsError(
                f"--batch-sizes {most}, but a step takes --max-num-seqs {self.max_num_seqs}: raise that to {most}"
            )

    def engine_options(self) -> EngineOptions:
        """The part that ranks are started with."""
        return EngineOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(EngineOptions)})


@dataclass(frozen=True, kw_only=True)
class BenchServeOptions(Options):
    """`moemesh bench serve`: what clients of an OpenAI-compatible endpoint see. Names are `vllm bench serve`'s."""

    command: ClassVar[str] = "bench serve"
    summary: ClassVar[str] = "measure latency and throughput of an OpenAI-compatible endpoint, ours or another"

    base_url: str = flag("http://127.0.0.1:8000", "where the endpoint is", text, metavar="URL")
    model: str | None = flag(None, "name of the model (default: the first that the endpoint lists)", text)
    api_key: str | None = flag(None, "key to send", text, metavar="KEY")
    num_prompts: int = flag(100, "requests to send", whole(1))
    request_rate: float = flag(math.inf, "requests a second, in a Poisson process; inf: all at once", rate)
    max_concurrency: int | None = flag(None, "requests in flight at most (default: any number)", whole(1))
    random_input_len: int = flag(128, "tokens of a prompt (words, where prompts are text)", whole(1))
    random_output_len: int = flag(64, "tokens of an answer", whole(1))
    prompt_type: str = flag(
        "ids", "prompts of random token ids, or of random words", one_of("ids", "text"), metavar="ids|text"
    )
    vocab_size: int = flag(1000, "token ids of prompts are drawn from 10 to below this", whole(11))
    seed: int = flag(0, "draws prompts and arrival times", whole(0))
    num_warmups: int = flag(1, "requests sent and waited for before anything is measured", whole(0))
    save_result: bool = flag(False, "write the result as JSON", truth, switch=True)
    result_filename: str | None = flag(
        None, "where to, with --save-result (default: a name with the date)", text, metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class BenchDispatchOptions(Options):
    """`moemesh bench dispatch`: what the travel of tokens costs."""

    command: ClassVar[str] = "bench dispatch"
    summary: ClassVar[str] = (
        "measure how long ranks take to exchange frames, by size and number of ranks, over each link"
    )

    links: tuple[str, ...] = flag(
        ("local", "mpi"),
        "links to measure: local is pure software cost, all ranks in one thread; mpi starts ranks under mpirun",
        one_of("local", "mpi"),
        many=True,
        metavar="local|mpi",
    )
    ranks: tuple[int, ...] = flag((2, 4), "numbers of ranks", counts, metavar="R,...")
    sizes: tuple[int, ...] = flag(
        (256, 2048, 16 << 10, 128 << 10, 1 << 20), "bytes of a frame", counts, metavar="BYTES,..."
    )
    repeats: int = flag(500, "exchanges of the smallest frames; of large ones fewer", whole(1))
    save_result: str | None = flag(None, "write the result as JSON to this file", text, metavar="FILE")

    def _check(self) -> None:
        if min(self.ranks) < 2:
            raise OptionsError(f"--ranks {min(self.ranks)}: an exchange takes at least 2 ranks")
