"""The `moemesh` command: `serve`, `generate`, `plan`, `check` and the benchmarks `bench engine`, `serve`, `dispatch`.

Exit codes: 0 done, 1 it could not be done, 2 it was not understood. Either is explained in one line on stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence

from moemesh import __version__
from moemesh.bench.options import BenchDispatchOptions, BenchEngineOptions, BenchServeOptions
from moemesh.engine_client import RequestError
from moemesh.flags import Options, OptionsError, Parser, add_flags, options_from_arguments
from moemesh.install_check import InstallError, check_installation
from moemesh.mpi_command import LaunchError
from moemesh.mpi_launch import ATTACHED_FRONTEND, mpi_launch
from moemesh.options import CheckOptions, EngineOptions, GenerateOptions, PlanOptions, ServeOptions
from moemesh.run_directory import RunDirectoryError

_FAILED = 1
_NOT_UNDERSTOOD = 2
_INTERRUPTED = 130

_FIRST_WORD_SECONDS = 3.0

_BENCH = "bench"
_BENCHMARKS: tuple[type[Options], ...] = (BenchEngineOptions, BenchServeOptions, BenchDispatchOptions)

# What a user can cause; anything else is a fault of ours and shows its traceback.
_USER_ERRORS = (ValueError, OSError, RequestError, InstallError, LaunchError, RunDirectoryError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Reads sys.argv when `arguments` is None."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        check_installation()
        return _run(given)
    except OptionsError as error:
        _complain(error)
        return _NOT_UNDERSTOOD
    except _USER_ERRORS as error:
        _complain(error)
        return _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(given: list[str]) -> int:
    if given[:1] == [ATTACHED_FRONTEND]:
        from moemesh.serve import serve_attached

        return serve_attached(*given[1:])
    parsed = _parser().parse_args(given)
    if parsed.command == ServeOptions.command:
        return _serve(parsed)
    if parsed.command == GenerateOptions.command:
        return _generate(options_from_arguments(GenerateOptions, parsed, implied={}))
    if parsed.command == PlanOptions.command:
        return _plan(options_from_arguments(PlanOptions, parsed, implied={}))
    if parsed.command == _BENCH:
        return _bench(parsed)
    return _check(options_from_arguments(CheckOptions, parsed, implied={}))


def _parser() -> Parser:
    parser = Parser(prog="moemesh", description="A serving mesh for DeepSeek-V3-class mixture-of-experts models.")
    parser.add_argument("--version", action="version", version=f"moemesh {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    kinds: tuple[type[Options], ...] = (ServeOptions, GenerateOptions, PlanOptions, CheckOptions)
    for options in kinds:
        add_flags(commands.add_parser(options.command, help=options.summary, description=options.summary), options)
    summary = "measure a mesh, an endpoint, or the travel of tokens"
    bench = commands.add_parser(_BENCH, help=summary, description=summary)
    benchmarks = bench.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for options in _BENCHMARKS:
        name = options.command.removeprefix(f"{_BENCH} ")
        add_flags(benchmarks.add_parser(name, help=options.summary, description=options.summary), options)
    return parser


def _serve(parsed: argparse.Namespace) -> int:
    launch = mpi_launch(os.environ)
    if launch is None:
        from moemesh.serve import serve

        return serve(options_from_arguments(ServeOptions, parsed, implied={}))
    _, num_ranks = launch
    options = options_from_arguments(ServeOptions, parsed, implied={"ranks": num_ranks})
    if options.ranks != num_ranks:
        raise OptionsError(
            f"--ranks {options.ranks}, but mpirun started {num_ranks} processes: leave --ranks away, or mpirun"
        )
    from moemesh.serve import serve_as_rank

    serve_as_rank(options)
    return 0


def _generate(options: GenerateOptions) -> int:
    from moemesh.llm import LLM

    engine = {field.name: getattr(options, field.name) for field in dataclasses.fields(EngineOptions)}
    prompts: list[str | list[int]] = [*options.prompt, *(list(ids) for ids in options.prompt_token_ids)]
    with LLM(**engine) as llm:
        results = llm.generate(prompts, options.sampling_params(llm.default_sampling_params()))
    for result in results:
        for choice in result.outputs:
            print(choice.text or ",".join(map(str, choice.token_ids)))
    return 0


def _plan(options: PlanOptions) -> int:
    from moemesh.plan import plan_report

    report = plan_report(options)
    print(report)
    return 0 if report.ok else _FAILED


def _check(options: CheckOptions) -> int:
    from moemesh.check import check_model

    report = check_model(options.model_folder)
    print(report)
    return 0 if report.ok else _FAILED


def _bench(parsed: argparse.Namespace) -> int:
    command = f"{_BENCH} {parsed.benchmark}"
    if command == BenchEngineOptions.command:
        from moemesh.bench.engine import bench_engine

        bench_engine(options_from_arguments(BenchEngineOptions, parsed, implied={}))
        return 0
    if command == BenchServeOptions.command:
        from moemesh.bench.serve import bench_serve

        return 0 if bench_serve(options_from_arguments(BenchServeOptions, parsed, implied={})) else _FAILED
    from moemesh.bench.dispatch import bench_dispatch

    bench_dispatch(options_from_arguments(BenchDispatchOptions, parsed, implied={}))
    return 0


def _complain(error: Exception) -> None:
    """Once, also when an mpirun has us run as sixteen ranks."""
    launch = mpi_launch(os.environ)
    if launch is None or launch[0] == 0:
        print(f"moemesh: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(_FIRST_WORD_SECONDS)  # mpirun ends all ranks with the first one that ends
