from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from moemesh.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from tests.moemesh.tiny_tokenizer import tokenizer_json, write_tokenizer


def tiny() -> Tokenizer:
    return Tokenizer(Backend.from_str(tokenizer_json()), decoder={"type": "ByteLevel"})


def test_a_folder_without_tokenizer_json_has_no_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_encode_adds_what_tokenizer_json_adds(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, add_bos_token=False))
    assert tokenizer is not None
    assert tokenizer.encode("hello")[0] == 0
    assert tokenizer.encode("hello", add_special_tokens=False)[0] != 0
    assert tokenizer.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}
    assert tokenizer.token_id("<eos>") == 1


def test_special_tokens_can_be_skipped() -> None:
    tokenizer = tiny()
    ids = tokenizer.encode("hello<eos>")
    assert tokenizer.decode(ids) == "<bos>hello<eos>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_the_bytes_of_the_tokens_are_the_text(text: str) -> None:
    tokenizer = tiny()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids).decode() == text


def test_bytes_of_a_byte_fallback_vocabulary() -> None:
    vocab = {"<0xE4>": 0, "\u2581a": 1, "b": 2}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer = Tokenizer(backend, decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}]})
    assert [tokenizer.token_bytes(token_id) for token_id in range(3)] == [b"\xe4", b" a", b"b"]
    assert tokenizer.token_text(0) == "\ufffd"
    assert tokenizer.token_bytes(99) == b""


def test_a_byte_level_decoder_inside_a_sequence_is_seen() -> None:
    tokenizer = Tokenizer(
        Backend.from_str(tokenizer_json()), decoder={"type": "Sequence", "decoders": [{"type": "ByteLevel"}]}
    )
    assert tokenizer.token_bytes(tokenizer.encode(" ", add_special_tokens=False)[0]) == b" "


def test_truncation_and_padding_of_the_training_run_are_off() -> None:
    backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    assert Tokenizer(backend).encode("aaaa") == [0, 0, 0, 0]


def test_an_unpaired_surrogate_is_refused() -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        tiny().encode("\ud800")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {}}'])
def test_a_malformed_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000])
def test_a_malformed_config_is_named(tmp_path: Path, text: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_special_tokens_that_are_not_text_are_left_out(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, bos_token=None, unk_token=json.loads("{}")))
    assert tokenizer is not None
    assert tokenizer.special_tokens == {"eos_token": "<eos>"}
