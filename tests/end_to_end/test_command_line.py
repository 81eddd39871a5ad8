"""`moemesh generate`, `moemesh check` and the `LLM` class, as users run them: in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.harness import DEMO_NAME, SMALL_CACHE, START_SECONDS, Mesh, run_to_end, started
from tests.random_checkpoint import write_random_checkpoint

PROMPT = "What does os.path.join do?"


def test_generate_says_what_the_server_says(demo: Mesh) -> None:
    ids = demo.post("/tokenize", {"prompt": PROMPT}).body["tokens"]
    expected = demo.complete(model=DEMO_NAME, prompt=PROMPT, max_tokens=12, temperature=0)["choices"][0]["text"]
    sampling = ("--max-tokens", "12", "--temperature", "0")
    prompts = ("--prompt", PROMPT, "--prompt-token-ids", ",".join(map(str, ids)))
    done = run_to_end("generate", *prompts, *sampling, "--ranks", "2", *SMALL_CACHE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{expected}\n" * 2


def test_check(tmp_path: Path) -> None:
    done = run_to_end("check")
    assert done.returncode == 0
    assert "ok: this model can be served" in done.stdout
    assert "256 of width 32, 8 per token" in done.stdout
    folder = write_random_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    done = run_to_end("check", str(folder))
    assert done.returncode == 1
    assert "has no *.safetensors file" in done.stdout


PROGRAM = """
import json
from moemesh import LLM, SamplingParams

with LLM(num_gpu_blocks_override=64) as llm:
    params = SamplingParams(max_tokens=6, temperature=0.8, seed=3, n=2, logprobs=1, ignore_eos=True)
    outputs = llm.generate(["import os", [5, 6, 7]], params)
    try:
        llm.generate([[5, 4096]])
    except ValueError as error:
        refused = str(error)
print(json.dumps({
    "choices": [[[list(c.token_ids), c.text, [p.logprob for p in c.logprobs]] for c in o.outputs] for o in outputs],
    "prompts": [o.prompt for o in outputs],
    "refused": refused,
}))
"""


def test_llm_in_a_program(demo: Mesh) -> None:
    with started(["true"]) as place:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            env=place.environment,
        )
        assert done.returncode == 0, done.stderr
        place.wait_gone()
    said = json.loads(done.stdout)
    assert said["prompts"] == ["import os", None]
    assert "4096" in said["refused"]
    body = demo.complete(
        prompt="import os", max_tokens=6, temperature=0.8, top_p=1.0, seed=3, n=2, logprobs=1, ignore_eos=True,
        return_token_ids=True,
    )  # fmt: skip
    served = [[c["token_ids"], c["text"], c["logprobs"]["token_logprobs"]] for c in body["choices"]]
    assert said["choices"][0] == served
