"""The comparison with peers: command lines, ratios, and what happens to one that fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compare import CompareOptions, contestants_of, describe, run_round, summarize
from benchmarks.contestants import Cases, Contestant, ContestantFailed, read_llama
from moemesh.flags import OptionsError
from moemesh.launcher import package_environment
from moemesh.processes import ProcessIdentity
from tests.end_to_end.harness import eventually

OPTIONS = CompareOptions(
    checkpoint="model",
    batch_sizes=(1, 8),
    threads=2,
    moemesh=("exact=", "2 ranks=--ranks 2 --attention-tp 2"),
    llama_batched_bench="/opt/llama-batched-bench",
    gguf=("bf16=/tmp/m.gguf",),
    vllm_python="/opt/vllm/bin/python",
    vllm=("bfloat16",),
    transformers=("float32",),
)


def case(batch_size: int, prefill: float, decode: float) -> dict[str, float]:
    return {"batch_size": batch_size, "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}


def test_everybody_gets_the_same_work() -> None:
    everybody = contestants_of(OPTIONS)
    names = ["moemesh exact", "moemesh 2 ranks", "llama.cpp bf16", "vLLM bfloat16", "transformers float32"]
    assert [contestant.name for contestant in everybody] == names
    commands = [" ".join(contestant.command(Path("result"))) for contestant in everybody]
    assert "--batch-sizes 1,8 --prompt-tokens 128 --output-tokens 64 --threads 2" in commands[0]
    assert "--threads 1 --ranks 2 --attention-tp 2" in commands[1]  # two threads in all
    assert "-c 1536 -t 2 -tb 2 -npp 128 -ntg 64 -npl 1,8" in commands[2]
    assert commands[3].startswith("/opt/vllm/bin/python")
    assert "--output-tokens 8 --threads 2" in commands[4]


def test_a_file_for_llama_needs_the_program() -> None:
    with pytest.raises(OptionsError, match="--gguf needs --llama-batched-bench"):
        CompareOptions(checkpoint="model", gguf=("bf16=/tmp/m.gguf",))


def test_llamas_records_are_found_among_its_lines() -> None:
    record = {"pp": 128, "tg": 64, "pl": 8, "speed_pp": 215.5, "speed_tg": 96.25}
    assert read_llama(f"loading\n{json.dumps(record)}\n\nperf: 3 ms\n") == [case(8, 215.5, 96.25)]
    with pytest.raises(ValueError, match="no JSON lines"):
        read_llama("error: no such file")


def test_ratios_are_taken_within_rounds() -> None:
    rounds: list[dict[str, Cases]] = [
        {"us": [case(1, 100, 10)], "them": [case(1, 50, 5)]},
        {"us": [case(1, 10, 1)], "them": [case(1, 5, 0.25)]},  # the machine had become slow
        {"us": [case(1, 90, 9)]},  # they failed
    ]
    us, them = summarize(rounds, ["us", "them"], [1])
    assert (us["decode_tokens_per_s"], us["decode_tokens_per_s_ratio"]) == (9, 1)
    assert them["prefill_tokens_per_s_ratio"] == 2
    assert them["decode_tokens_per_s_ratio"] == (2 + 4) / 2
    assert "them" in describe([us, them])


def test_who_failed_everywhere_has_no_figures() -> None:
    (us, them) = summarize([{"us": [case(1, 1, 1)]}], ["us", "them"], [1])
    assert them["decode_tokens_per_s"] is None
    assert describe([us, them]).splitlines()[-1].split()[2:] == ["-"] * 4


def python(name: str, source: str) -> Contestant:
    return Contestant(
        name=name,
        command=lambda result: [sys.executable, "-c", source, str(result)],
        read=lambda result, output: json.loads(output),
    )


def test_one_that_fails_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    good = python("good", 'print(\'[{"batch_size": 1, "prefill_tokens_per_s": 2, "decode_tokens_per_s": 3}]\')')
    others = [python("broken", "raise SystemExit('no such model')"), python("silent", ""), good]
    assert run_round(others, 1, timeout_s=60) == {"good": [case(1, 2, 3)]}
    shown = capsys.readouterr().err
    assert "broken: exit code 1: no such model" in shown
    assert "silent left no figures" in shown
    assert "round 2: good: 1: 2.0 3.0" in shown


def test_one_that_takes_too_long_is_ended_with_what_it_started() -> None:
    source = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import signal; signal.pause()'])"
    with pytest.raises(ContestantFailed, match=r"slow: not done in 0\.5 s"):
        python("slow", source).run(Path("unused"), timeout_s=0.5)  # returns: nobody holds the pipes open any more


def test_a_comparison_that_is_ended_keeps_its_rounds_and_leaves_nobody_behind(tmp_path: Path) -> None:
    # A program in the place of llama.cpp's: quick the first time, then it never ends.
    seen, program = tmp_path / "seen", tmp_path / "llama-batched-bench"
    program.write_text(
        f"#!/bin/sh\n[ -e {seen} ] && echo $$ > {tmp_path}/pid && exec sleep 600\ntouch {seen}\n"
        'echo \'{"pl": 1, "speed_pp": 2.0, "speed_tg": 3.0}\'\n'
    )
    program.chmod(0o755)
    command = [sys.executable, "-P", "-m", "benchmarks.compare", "model", "--moemesh", "none=--no-such-flag"]
    command += ["--batch-sizes", "1", "--gguf", "fake=model.gguf", "--llama-batched-bench", str(program)]
    process = subprocess.Popen([*command, "--results", str(tmp_path)], env=package_environment(), cwd=tmp_path)
    try:
        eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
        hanging = ProcessIdentity.of(int((tmp_path / "pid").read_text()))
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert hanging is not None
    eventually(lambda: not hanging.alive())
    (result,) = tmp_path.glob("*-compare-model.json")
    assert [list(done) for done in json.loads(result.read_text())["rounds"]] == [["llama.cpp fake"]]
