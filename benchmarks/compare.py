"""moemesh against transformers, llama.cpp and vLLM on one checkpoint, in one run on one machine.

    python -m benchmarks.compare CHECKPOINT [--config benchmarks/peers.yaml]

Rounds are interleaved: in each, everybody runs once, in an order that rotates. What is compared are ratios within a
round, of which the table shows the medians, since machines get faster and slower in minutes. Peers are run where they
are installed: benchmarks/README.md says how. The result goes to a dated file in benchmarks/results.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.contestants import (
    HERE,
    ROOT,
    Cases,
    Contestant,
    ContestantFailed,
    Work,
    llama,
    moemesh,
    transformers,
    vllm,
)
from moemesh.bench.results import result_document, table, write_result
from moemesh.flags import Options, OptionsError, add_flags, counts, flag, options_from_arguments, real, text, whole

SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s")

Round = dict[str, Cases]
"""By contestant, what it did; those that failed are missing."""


def named(value: object) -> str:
    """NAME=SOMETHING."""
    if not isinstance(value, str) or not value.partition("=")[0]:
        raise ValueError(f"expected NAME=..., got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """What is compared, on what work."""

    command: ClassVar[str] = "compare"
    summary: ClassVar[str] = "moemesh against its peers"

    checkpoint: str = flag("", "folder of the checkpoint", text, positional=True)
    batch_sizes: tuple[int, ...] = flag((1, 8, 32), "sequences at a time", counts, metavar="B,...")
    prompt_tokens: int = flag(128, "length of the prompts", whole(1))
    output_tokens: int = flag(64, "tokens to generate", whole(2))
    threads: int = flag(2, "threads of everybody", whole(1))
    rounds: int = flag(3, "how often everybody runs", whole(1))
    timeout: float = flag(1800.0, "seconds that one run may take", real(1.0))
    moemesh: tuple[str, ...] = flag(
        ("exact=",), "moemesh with further flags; the first is what others are compared with", named, many=True,
        metavar="NAME=FLAGS",
    )  # fmt: skip
    transformers: tuple[str, ...] = flag((), "formats to run transformers in", text, many=True, metavar="DTYPE")
    transformers_output_tokens: int = flag(8, "tokens that transformers generates; it is slow", whole(1))
    llama_batched_bench: str | None = flag(None, "llama.cpp's program of this name", text, metavar="FILE")
    gguf: tuple[str, ...] = flag((), "the checkpoint, converted for llama.cpp", named, many=True, metavar="NAME=FILE")
    vllm_python: str | None = flag(None, "the Python that has vLLM", text, metavar="FILE")
    vllm: tuple[str, ...] = flag(("float32", "bfloat16"), "formats to run vLLM in", text, many=True, metavar="DTYPE")
    results: str = flag(str(HERE / "results"), "folder for the result", text, metavar="FOLDER")

    def _check(self) -> None:
        if self.gguf and self.llama_batched_bench is None:
            raise OptionsError("--gguf needs --llama-batched-bench, the program to run it with")

    def work(self) -> Work:
        return Work(
            checkpoint=Path(self.checkpoint).resolve(),
            batch_sizes=self.batch_sizes,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            threads=self.threads,
        )


def contestants_of(options: CompareOptions) -> list[Contestant]:
    """Everybody that the options name, moemesh first."""
    work = options.work()
    found = [moemesh(name, flags, work) for name, flags in map(_split, options.moemesh)]
    if options.llama_batched_bench is not None:
        found += [llama(options.llama_batched_bench, name, file, work) for name, file in map(_split, options.gguf)]
    if options.vllm_python is not None:
        found += [vllm(options.vllm_python, dtype, work) for dtype in options.vllm]
    return found + [transformers(dtype, work, options.transformers_output_tokens) for dtype in options.transformers]


def run_round(contestants: Sequence[Contestant], number: int, timeout_s: float) -> Round:
    """Everybody once, beginning with another one in each round."""
    first = number % len(contestants)
    done: Round = {}
    for contestant in (*contestants[first:], *contestants[:first]):
        with tempfile.TemporaryDirectory() as folder:
            try:
                done[contestant.name] = contestant.run(Path(folder) / "result.json", timeout_s)
            except ContestantFailed as error:
                print(f"round {number + 1}: {error}", file=sys.stderr, flush=True)
                continue
        speeds = ", ".join(
            f"{case['batch_size']}: {case[SPEEDS[0]]:.1f} {case[SPEEDS[1]]:.1f}" for case in done[contestant.name]
        )
        print(f"round {number + 1}: {contestant.name}: {speeds}", file=sys.stderr, flush=True)
    return done


def summarize(rounds: Sequence[Round], names: Sequence[str], batch_sizes: Sequence[int]) -> list[dict[str, Any]]:
    """One entry for each contestant and batch size: median speeds, and median ratios of the first name's to its own."""
    entries = []
    for batch_size in batch_sizes:
        for name in names:
            entry: dict[str, Any] = {"name": name, "batch_size": batch_size}
            for speed in SPEEDS:
                pairs = [
                    (_speed(done, names[0], batch_size, speed), _speed(done, name, batch_size, speed))
                    for done in rounds
                ]
                own = [value for _, value in pairs if value is not None]
                ratios = [best / value for best, value in pairs if best is not None and value is not None]
                entry[speed] = statistics.median(own) if own else None
                entry[f"{speed}_ratio"] = statistics.median(ratios) if ratios else None
            entries.append(entry)
    return entries


def describe(summary: Sequence[dict[str, Any]]) -> str:
    """The summary for people; a ratio says how many times faster the first contestant is."""
    header = ("batch", "engine", "prefill tok/s", "ratio", "decode tok/s", "ratio")
    rows = [
        (
            str(entry["batch_size"]),
            entry["name"],
            *(_shown(entry[key]) for speed in SPEEDS for key in (speed, f"{speed}_ratio")),
        )
        for entry in summary
    ]
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, CompareOptions)
    try:
        options = options_from_arguments(CompareOptions, parser.parse_args(arguments), implied={})
    except OptionsError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, _end)
    contestants = contestants_of(options)
    now = datetime.now(UTC).strftime("%Y-%m-%d-%H%M%S")
    path = Path(options.results) / f"{now}-compare-{Path(options.checkpoint).name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rounds: list[Round] = []
    for number in range(options.rounds):
        rounds.append(run_round(contestants, number, options.timeout))
        summary = summarize(rounds, [contestant.name for contestant in contestants], options.batch_sizes)
        # Rounds take long: what was measured is kept, whatever happens to those that follow.
        write_result(path, result_document(options, {"commit": _commit(), "summary": summary, "rounds": rounds}))
    print(describe(summary))
    print(path)
    return 0 if all(len(done) == len(contestants) for done in rounds) else 1


def _end(number: int, frame: object) -> None:
    """On SIGTERM: leave in good order, so that nobody who takes part is left behind."""
    raise SystemExit(128 + number)


def _split(entry: str) -> tuple[str, str]:
    name, _, rest = entry.partition("=")
    return name, rest


def _speed(done: Round, name: str, batch_size: int, speed: str) -> float | None:
    found = [case[speed] for case in done.get(name, ()) if case["batch_size"] == batch_size]
    return found[0] if found else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _commit() -> str | None:
    """Of these sources, where git knows them; with "-dirty" for changes on top."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    raise SystemExit(main())
