"""One definition of every flag: command line, config file, keywords and JSON agree, and refuse by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moemesh.flags import AnyOptions, OptionsError, Parser, add_flags, options_from_arguments, size
from moemesh.options import (
    DEMO_MODEL,
    CheckOptions,
    EngineOptions,
    GenerateOptions,
    ServeOptions,
    options_from_json,
)
from moemesh.sampling_params import SamplingParams


def parse(options: type[AnyOptions], *arguments: str, **implied: object) -> AnyOptions:
    parser = Parser(prog="moemesh")
    add_flags(parser, options)
    return options_from_arguments(options, parser.parse_args(arguments), implied=implied)


@pytest.mark.parametrize("options", [EngineOptions, ServeOptions, CheckOptions])
def test_nothing_given_is_all_defaults(options: type[AnyOptions]) -> None:
    assert parse(options) == options()


def test_defaults_are_vllms() -> None:
    options = ServeOptions()
    assert (options.port, options.max_num_seqs, options.max_num_batched_tokens) == (8000, 256, 2048)
    assert options.host == "127.0.0.1"
    assert options.model_folder == DEMO_MODEL
    assert options.served_names == ("moemesh-demo",)
    assert ServeOptions(model="some/folder").served_names == ("some/folder",)


def test_a_command_line() -> None:
    options = parse(
        ServeOptions, "folder", "--ranks", "8", "--attention-tp=2", "--served-model-name", "a", "b", "--api-key", "x",
        "--api-key", "y", "--kv-cache-memory-bytes", "4GiB", "--max-model-len", "32k", "--drain-timeout", "1.5",
    )  # fmt: skip
    assert options == ServeOptions(
        model="folder", ranks=8, attention_tp=2, served_model_name=("a", "b"), api_key=("x", "y"),
        kv_cache_memory_bytes=4 << 30, max_model_len=32000, drain_timeout=1.5,
    )  # fmt: skip


def test_every_default_is_accepted_as_a_flag() -> None:
    for field in dataclasses.fields(ServeOptions):
        if field.default in (None, ()) or field.name == "model":
            continue
        spelled = f"--{field.name.replace('_', '-')}"
        given = [spelled] if field.default is True else [spelled, str(field.default)]
        assert parse(ServeOptions, *given) == ServeOptions()


def test_a_switch_has_an_opposite() -> None:
    assert not parse(ServeOptions, "--no-enable-prefix-caching").enable_prefix_caching
    assert parse(ServeOptions, "--enable-prefix-caching", enable_prefix_caching=False).enable_prefix_caching
    assert not ServeOptions.from_mapping({"enable-prefix-caching": "off"}, source="a file").enable_prefix_caching


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "--ranks: expected a whole number from 1 to 1024, got '0'"),
        (["--port", "http"], "--port: expected a whole number from 0 to 65535, got 'http'"),
        (["--dtype", "fp8"], "--dtype: expected one of auto, float32, bfloat16, float16, got 'fp8'"),
        (["--micro-batches", "3"], "--micro-batches: expected a whole number from 1 to 2"),
        (["--drain-timeout", "nan"], "--drain-timeout: expected a number of at least 0, got 'nan'"),
        (["--kv-cache-memory-bytes", "much"], "--kv-cache-memory-bytes: expected a positive size such as"),
        (["--ranks", "4", "--attention-ranks", "4"], "leaves no rank for the experts; use at most 3"),
        (["--ranks", "6", "--attention-tp", "4"], "--attention-tp 4 does not divide the 6 attention ranks.*use 3"),
        (["--kv-cache-memory-bytes", "1G", "--num-gpu-blocks-override", "9"], "both size the cache; give one"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag .*--help"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: No such file"),
    ],
)
def test_refused_by_name(arguments: list[str], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        parse(ServeOptions, *arguments)


def test_a_config_file_yields_to_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("port: 9000\nmax-num-seqs: 8\nserved_model_name: [a, b]\nkv-cache-memory-bytes: 1MiB\nranks: 2\n")
    options = parse(ServeOptions, "--config", str(config), "--port", "9001", ranks=4, threads=3)
    assert options == ServeOptions(
        port=9001, max_num_seqs=8, served_model_name=("a", "b"), kv_cache_memory_bytes=1 << 20, ranks=2, threads=3
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot: 9000", "unknown option 'prot'; known are .*port"),
        ("- port", "must hold options such as `port: 8000`, not a list"),
        ("port: [", "is no YAML"),
        ("port: true", "--port: expected a whole number from 0 to 65535, got True"),
        ("port: null", "--port: expected a whole number"),
        ("api-key: [1]", "--api-key: expected a non-empty text, got 1"),
    ],
)
def test_a_config_file_is_checked(tmp_path: Path, content: str, message: str) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(content)
    with pytest.raises(OptionsError, match=message):
        parse(ServeOptions, "--config", str(config))


def test_an_empty_config_file_changes_nothing(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.touch()
    assert parse(ServeOptions, "--config", str(config)) == ServeOptions()


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "ranks": st.integers(1, 16),
            "threads": st.none() | st.integers(1, 8),
            "max_model_len": st.none() | st.integers(1, 2**20),
            "combine": st.sampled_from(["exact", "compact"]),
            "api_key": st.lists(st.text(min_size=1)),
            "drain_timeout": st.floats(0, 1e6),
            "model": st.text(min_size=1),
        },
    )
)
def test_json_gives_the_options_back(values: dict[str, Any]) -> None:
    options = ServeOptions(**values)
    assert options_from_json(options.to_json()) == options


@pytest.mark.parametrize(
    "document", ["", "[]", "{}", '{"command": "serve", "options": []}', '{"command": "x", "options": {}}']
)
def test_other_json_is_refused(document: str) -> None:
    with pytest.raises(OptionsError, match="holds no options"):
        options_from_json(document)
    with pytest.raises(OptionsError, match="unknown option 'port'"):
        options_from_json(json.dumps({"command": "engine", "options": {"port": 1}}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1), ("4096", 4096), ("32k", 32000), ("32K", 32768), ("1.5G", 3 << 29), ("2GB", 2 * 10**9),
        ("512MiB", 512 << 20), ("1 TiB", 1 << 40), ("7B", 7), (7, 7),
    ],
)  # fmt: skip
def test_sizes(text: object, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "1X", "nan", 0, -5, 1.5, True, None])
def test_no_sizes(text: object) -> None:
    with pytest.raises(ValueError, match="expected a"):
        size(text)


def test_generate_says_only_what_was_given() -> None:
    options = parse(
        GenerateOptions, "--prompt", "Once", "--prompt", "Twice", "--prompt-token-ids", "1,2,3", "--temperature", "0",
        "--stop", "x", "--ignore-eos", "--max-tokens", "5", "--seed", "-1",
    )  # fmt: skip
    assert options.prompt == ("Once", "Twice")
    assert options.prompt_token_ids == ((1, 2, 3),)
    assert options.sampling_params() == SamplingParams(
        temperature=0.0, stop=("x",), ignore_eos=True, max_tokens=5, seed=-1
    )
    assert options_from_json(options.to_json()) == options


def test_generate_refuses_what_sampling_refuses() -> None:
    with pytest.raises(OptionsError, match="give --prompt TEXT or --prompt-token-ids IDS"):
        parse(GenerateOptions)
    with pytest.raises(OptionsError, match="top_p"):
        parse(GenerateOptions, "--prompt", "x", "--top-p", "1.5")
    with pytest.raises(OptionsError, match="--prompt-token-ids: expected a whole number from 0"):
        parse(GenerateOptions, "--prompt-token-ids", "1,x")
