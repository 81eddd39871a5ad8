"""What cannot be served is refused in words, with names and numbers, and the server goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.end_to_end.harness import DEMO_NAME, Mesh, run_to_end
from tests.random_checkpoint import write_random_checkpoint

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


# --- at start ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two shards with an index."""
    return write_random_checkpoint(tmp_path_factory.mktemp("model") / "whole", shards=2)


def truncated(folder: Path) -> list[str]:
    shard = folder / "model-00001-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    return [shard.name, "is truncated", "the first tensor that is not whole is model."]


def shard_missing(folder: Path) -> list[str]:
    (folder / "model-00002-of-00002.safetensors").unlink()
    return ["model-00002-of-00002.safetensors", "No such file"]


def without_tensor(folder: Path) -> list[str]:
    rewrite(folder, lambda tensors: tensors.pop(EXPERT))
    return [EXPERT, "is missing"]


def wrong_shape(folder: Path) -> list[str]:
    rewrite(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:-1].clone()}))
    return [EXPERT, "[47, 64]", "[48, 64]"]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = folder / "model.safetensors.index.json"
    shard = folder / json.loads(index.read_text())["weight_map"][EXPERT]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


def unsupported_value(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    return ["hidden_act", "gelu"]


def other_architecture(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    return ["LlamaForCausalLM", "DeepseekV3ForCausalLM"]


def no_model(folder: Path) -> list[str]:
    (folder / "config.json").unlink()
    return [str(folder), "config.json"]


@pytest.mark.parametrize(
    "spoil",
    [truncated, shard_missing, without_tensor, wrong_shape, unsupported_value, other_architecture, no_model],
    ids=lambda spoil: spoil.__name__,
)
def test_a_folder_that_cannot_be_served(spoil: Callable[[Path], list[str]], whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    check_refusal(spoil(folder), str(folder))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-cache-memory-bytes", "10TiB"], ["too little memory", "10240.00 GiB", "are available"]),
        (["--ranks", "3", "--attention-tp", "3"], ["attention-tp", "3", "8 attention heads", "1, 2, 4, 8"]),
        (["--max-model-len", "4096"], ["max-model-len = 4096", "2048"]),
    ],
    ids=["too little memory", "TP does not divide", "longer than the model"],
)
def test_a_mesh_that_cannot_be_made(arguments: list[str], words: list[str]) -> None:
    check_refusal(words, *arguments)


def check_refusal(words: list[str], *arguments: str) -> None:
    """One line that holds all the words, before any rank is started."""
    done = run_to_end("serve", *arguments, "--port", "0")
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("moemesh: error: ")
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


# --- requests ---------------------------------------------------------------------------------------------------------

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

REFUSED: dict[str, tuple[str, Any, int, list[str]]] = {
    "NaN": (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, ["NaN"]),
    "infinity": (COMPLETIONS, b'{"prompt": "a", "top_p": -Infinity}', 400, ["Infinity"]),
    "infinity in digits": (COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}', 400, ["temperature"]),
    "malformed": (COMPLETIONS, b'{"prompt": ', 400, ["not valid JSON"]),
    "no object": (COMPLETIONS, b"[1]", 400, ["JSON object"]),
    "not UTF-8": (COMPLETIONS, b'{"prompt": "\xff"}', 400, ["UTF-8"]),
    "no prompt": (COMPLETIONS, {}, 400, ["prompt"]),
    "empty text": (COMPLETIONS, {"prompt": ""}, 400, ["prompt", "empty"]),
    "empty ids": (COMPLETIONS, {"prompt": []}, 400, ["prompt", "empty"]),
    "one of several empty": (COMPLETIONS, {"prompt": [[5], []]}, 400, ["prompt", "empty"]),
    "id too large": (COMPLETIONS, {"prompt": [5, 4096]}, 400, ["4096", "vocabulary has 4096 tokens"]),
    "id negative": (COMPLETIONS, {"prompt": [-1]}, 400, ["-1"]),
    "id no integer": (COMPLETIONS, {"prompt": [1.5]}, 400, ["prompt"]),
    "too long": (COMPLETIONS, {"prompt": [5] * 2048}, 400, ["2048 tokens", "the prompt has 2048"]),
    "too long a text": (COMPLETIONS, {"prompt": "a b " * 5000}, 400, ["maximum context length is 2048"]),
    "asks for too much": (COMPLETIONS, {"prompt": [5] * 48, "max_tokens": 2001}, 400, ["2048", "48", "2001", "2049"]),
    "unknown model": (COMPLETIONS, {"prompt": "a", "model": "other"}, 404, ["other", DEMO_NAME]),
    "unknown field": (COMPLETIONS, {"prompt": "a", "temprature": 1}, 400, ["temprature"]),
    "not supported": (COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, ["suffix", "not supported"]),
    "wrong type": (COMPLETIONS, {"prompt": "a", "max_tokens": "many"}, 400, ["max_tokens"]),
    "too many choices": (COMPLETIONS, {"prompt": "a", "n": 100000}, 400, ["n"]),
    "stop id out of range": (COMPLETIONS, {"prompt": "a", "stop_token_ids": [5000]}, 400, ["stop_token_ids", "5000"]),
    "no messages": (CHAT, {"messages": []}, 400, ["messages"]),
    "unknown role": (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, 400, ["role"]),
    "image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, ["image_url"]),
    "template of the client's": (
        CHAT, {"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ x }}"}, 400, ["chat_template"]
    ),
    "not there": ("/v1/embeddings", {}, 404, ["/v1/embeddings"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_request(name: str, demo: Mesh) -> None:
    path, body, status, words = REFUSED[name]
    check_error(demo.post(path, body), status, words)


def check_error(answer: Any, status: int, words: list[str]) -> None:
    assert answer.status == status, answer
    assert set(answer.body) == {"error"}
    assert set(answer.body["error"]) == {"message", "type", "param", "code"}
    for word in words:
        assert word in answer.body["error"]["message"]


def test_wrong_content_type_and_method(demo: Mesh) -> None:
    sent = demo.send("POST", COMPLETIONS, b'{"prompt": "a"}', {"Content-Type": "text/plain"})
    check_error(sent, 415, ["application/json", "text/plain"])
    check_error(demo.get(COMPLETIONS), 405, ["GET", "POST"])


def test_too_large_a_body(demo: Mesh) -> None:
    check_error(demo.post(COMPLETIONS, b" " * (33 << 20)), 413, [str(32 << 20)])


def test_the_server_serves_on(demo: Mesh) -> None:
    body = demo.complete(prompt="import os", max_tokens=4, ignore_eos=True)
    assert body["usage"]["completion_tokens"] == 4
    assert demo.get("/health").status == 200
    assert demo.total("moemesh_open_requests") == 0
