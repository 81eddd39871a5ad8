"""Who takes part in a comparison, how each is run in a process of its own, and how its figures are read.

Every run leaves a list of cases, {"batch_size", "prefill_tokens_per_s", "decode_tokens_per_s"}, whoever made it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent

# Of llama-batched-bench's records: sequences, and tokens a second of the prompts and of what followed them.
_LLAMA_KEYS = {"batch_size": "pl", "prefill_tokens_per_s": "speed_pp", "decode_tokens_per_s": "speed_tg"}

Cases = list[dict[str, Any]]


class ContestantFailed(RuntimeError):
    """A run ended without figures; the message holds the end of what it said."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What everybody is given to do."""

    checkpoint: Path
    batch_sizes: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    threads: int

    @property
    def flags(self) -> list[str]:
        """As the scripts of peers and `moemesh bench engine` spell it."""
        sizes = ",".join(map(str, self.batch_sizes))
        return [
            *("--batch-sizes", sizes, "--prompt-tokens", str(self.prompt_tokens)),
            *("--output-tokens", str(self.output_tokens), "--threads", str(self.threads)),
        ]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """`command` makes the command line from the file its result goes to; `read` gets that file and the output."""

    name: str
    command: Callable[[Path], list[str]]
    read: Callable[[Path, str], Cases]
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, result: Path, timeout_s: float) -> Cases:
        """One run in a process of its own. Raises ContestantFailed."""
        code, output, errors = self._run(self.command(result), timeout_s)
        if code:
            raise ContestantFailed(f"{self.name}: exit code {code}: {(output + errors)[-2000:]}")
        try:
            return self.read(result, output)
        except (OSError, ValueError, KeyError) as error:
            raise ContestantFailed(f"{self.name} left no figures ({error}): {output[-2000:]}") from error

    def _run(self, command: list[str], timeout_s: float) -> tuple[int, str, str]:
        """Exit code and outputs. Whatever the command started is in its session, and ends with it."""
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **self.environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise ContestantFailed(f"{self.name}: {error}") from error
        with process:
            try:
                output, errors = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired as error:
                os.killpg(process.pid, signal.SIGKILL)
                output, errors = process.communicate()
                raise ContestantFailed(f"{self.name}: not done in {timeout_s:g} s: {errors[-2000:]}") from error
            except BaseException:  # the comparison itself was ended
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return process.returncode, output, errors


def moemesh(name: str, flags: str, work: Work) -> Contestant:
    """`moemesh bench engine` with further flags. Threads are those of all ranks together."""
    given = shlex.split(flags)
    ranks = int(given[given.index("--ranks") + 1]) if "--ranks" in given else 1
    own = Work(**{**vars(work), "threads": max(1, work.threads // ranks)})
    command = [sys.executable, "-m", "moemesh", "bench", "engine", str(work.checkpoint), *own.flags, *given]
    return Contestant(
        name=f"moemesh {name}", command=lambda result: [*command, "--save-result", str(result)], read=_cases_of_file
    )


def transformers(dtype: str, work: Work, output_tokens: int) -> Contestant:
    """Hugging Face's model, in this Python."""
    own = Work(**{**vars(work), "output_tokens": output_tokens})
    return _script(f"transformers {dtype}", sys.executable, "peer_transformers.py", dtype, own)


def vllm(python: str, dtype: str, work: Work) -> Contestant:
    """vLLM's engine, in the Python that has it; compiled, as it is by default."""
    # Left alone it keeps one core for its scheduler and computes on the rest, which of two cores is half the machine.
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: work.threads]))
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    return _script(f"vLLM {dtype}", python, "peer_vllm.py", dtype, work, environment=environment)


def llama(program: str, name: str, gguf: str, work: Work) -> Contestant:
    """llama.cpp's own benchmark on a converted checkpoint."""
    cells = max(work.batch_sizes) * (work.prompt_tokens + work.output_tokens)
    command = [
        *(program, "-m", gguf, "-c", str(cells), "-t", str(work.threads), "-tb", str(work.threads)),
        *("-npp", str(work.prompt_tokens), "-ntg", str(work.output_tokens)),
        *("-npl", ",".join(map(str, work.batch_sizes)), "--output-format", "jsonl"),
    ]
    return Contestant(
        name=f"llama.cpp {name}", command=lambda result: command, read=lambda result, output: read_llama(output)
    )


def read_llama(output: str) -> Cases:
    """The records among the lines of llama-batched-bench. Raises ValueError where there are none."""
    records = [json.loads(line) for line in re.findall(r"^\{.*\}$", output, re.MULTILINE)]
    if not records:
        raise ValueError("no JSON lines")
    return [{ours: record[theirs] for ours, theirs in _LLAMA_KEYS.items()} for record in records]


def _script(
    name: str, python: str, script: str, dtype: str, work: Work, *, environment: Mapping[str, str] | None = None
) -> Contestant:
    # -P: this folder's kernels.py must not be what `import kernels` finds in a peer.
    command = [python, "-P", str(HERE / script), str(work.checkpoint), "--dtype", dtype, *work.flags]
    return Contestant(
        name=name,
        command=lambda result: [*command, "--result", str(result)],
        read=_cases_of_file,
        environment=environment or {},
    )


def _cases_of_file(result: Path, output: str) -> Cases:
    cases: Cases = json.loads(result.read_text())["cases"]
    return cases
