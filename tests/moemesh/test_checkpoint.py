"""Reading by slices, and the books: whatever is wrong with a checkpoint is said by file and tensor before serving."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mesh_config import load_model_config
from moemesh.checkpoint import Checkpoint, CheckpointError, LoadLedger
from moemesh.weight_names import attention_rank_tensors, expected_tensors, expert_tensors
from tests.oracle import ORACLE_CASES, ORACLE_CONFIGS, OracleCase, dequantize, write_random_checkpoint

Tensors = dict[str, torch.Tensor]

Q_B = "model.layers.0.self_attn.q_b_proj.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def open_checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, load_model_config(folder))


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Changes the tensors of a checkpoint of one file."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def set_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case.name)
def test_every_oracle_case_balances(case: OracleCase, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(case.write(tmp_path))
    stored = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert checkpoint.tensors.keys() | checkpoint.set_aside == stored.keys()
    assert checkpoint.nbytes == sum(stored[name].nbytes for name in checkpoint.tensors)
    plain = dequantize(stored)
    for name, shape in expected_tensors(checkpoint.config).items():
        assert checkpoint.tensors[name].shape == shape
        assert torch.equal(checkpoint.float32(name), plain[name])


def test_slices_read_only_themselves(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path))
    assert checkpoint.bytes_read == 0
    whole = load_file(tmp_path / "model.safetensors")
    assert torch.equal(checkpoint.rows(Q_B, 5, 9), whole[Q_B][5:9])
    assert checkpoint.bytes_read == 4 * whole[Q_B].shape[1] * 4
    assert torch.equal(checkpoint.columns(O_PROJ, 3, 70), whole[O_PROJ][:, 3:70])
    assert torch.equal(checkpoint.tensor(EMBEDDING), whole[EMBEDDING])
    weight = checkpoint.weight(EXPERT, rows=(1, 3), columns=(2, 7))
    assert torch.equal(weight.values, whole[EXPERT][1:3, 2:7])
    assert (weight.scale_inv, weight.offset) == (None, (1, 2))
    kept = checkpoint.rows(EMBEDDING, 0, 2)
    checkpoint.close()
    assert torch.equal(kept, whole[EMBEDDING][:2])


@pytest.mark.parametrize(
    ("rows", "columns", "blocks"),
    [
        (None, None, (6, 1)),
        ((128, 384), None, (2, 1)),
        ((192, 384), None, (2, 1)),
        ((100, 101), (3, 64), (1, 1)),
        ((127, 129), (120, 128), (2, 1)),
    ],
)
def test_fp8_slices_come_with_the_blocks_they_touch(
    tmp_path: Path, rows: tuple[int, int] | None, columns: tuple[int, int] | None, blocks: tuple[int, int]
) -> None:
    checkpoint = open_checkpoint(ORACLE_CONFIGS["v3_fp8"].write(tmp_path))
    weight = checkpoint.weight(Q_B, rows=rows, columns=columns)
    assert weight.values.dtype == torch.float8_e4m3fn
    assert weight.scale_inv is not None
    assert weight.scale_inv.shape == blocks
    assert weight.block == (128, 128)
    whole = checkpoint.float32(Q_B)
    expected = whole[slice(*(rows or (None,)))][:, slice(*(columns or (None,)))]
    assert torch.equal(checkpoint.float32(Q_B, rows=rows, columns=columns), expected)


def test_what_is_not_there_cannot_be_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match=r"lm_head\.bias is not among"):
        checkpoint.tensor("lm_head.bias")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: .*q_b_proj\.weight has shape \[192, 48\], no \(0, 193\)"
    ):
        checkpoint.rows(Q_B, 0, 193)


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def test_a_truncated_shard_is_named_with_its_first_broken_tensor(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00003\.safetensors: is truncated: .* not whole is model\."
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("keep", "message"), [(0, "or is empty"), (6, "or is empty"), (500, "is truncated: its header")]
)
def test_a_shard_without_whole_header(tmp_path: Path, keep: int, message: str) -> None:
    write_random_checkpoint(tmp_path)
    truncate(tmp_path / "model.safetensors", keep)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        '{"x": {}}',
        '{"x": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}',
        '{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        '{"x": 3}',
        '{"x"',
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: str) -> None:
    write_random_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its safetensors header is malformed"):
        open_checkpoint(tmp_path)


def test_a_file_that_is_no_safetensors_file(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        open_checkpoint(tmp_path)


def test_bytes_that_the_header_does_not_declare(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(CheckpointError, match="where its header declares"):
        open_checkpoint(tmp_path)


def test_missing_shards_and_wrong_indexes(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: cannot be read: No such file"):
        open_checkpoint(tmp_path)
    write_random_checkpoint(tmp_path, shards=2)
    swapped = dict.fromkeys(values["weight_map"], "model-00001-of-00002.safetensors")
    index.write_text(json.dumps({"weight_map": swapped}))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: .* is missing in it"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {EMBEDDING: "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="no file name inside the model folder"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(CheckpointError, match="weight_map must map"):
        open_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert len({info.path for info in open_checkpoint(tmp_path).tensors.values()}) == 3
    save_file({EMBEDDING: torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: model\.embed_tokens\.weight is in model-.* too"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file .pickled weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), rf"{EXPERT}: is missing, shape \[48, 64\]"),
        (
            lambda t: t.update({EXPERT: torch.zeros(48, 63)}),
            rf"safetensors: {EXPERT} has shape \[48, 63\], .* \[48, 64\]",
        ),
        (
            lambda t: t.update({EXPERT: torch.zeros(48, 64, dtype=torch.int8)}),
            rf"{EXPERT} has dtype I8, supported are F32",
        ),
        (lambda t: t.update({EXPERT: t[EXPERT].double()}), rf"{EXPERT} has dtype F64"),
        (
            lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}),
            rf"{EXPERT} has dtype F8_E4M3.*quantization_config",
        ),
        (
            lambda t: t.update({"model.extra.weight": torch.zeros(2)}),
            r"safetensors: model\.extra\.weight is read by nothing",
        ),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(2)}),
            r"model\.layers\.3\.mlp\.up_proj\.weight is read by nothing",
        ),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: Callable[[Tensors], object], message: str) -> None:
    rewrite(write_random_checkpoint(tmp_path), change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT + "_scale_inv"), rf"{EXPERT}_scale_inv: is missing, shape \[1, 2\]"),
        (
            lambda t: t.update({EXPERT + "_scale_inv": torch.ones(2, 2)}),
            r"_scale_inv has shape \[2, 2\], needs \[1, 2\]",
        ),
        (
            lambda t: t.update({EXPERT + "_scale_inv": torch.ones(1, 2, dtype=torch.uint8)}),
            r"_scale_inv has dtype U8, needs F32",
        ),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING].to(torch.float8_e4m3fn)}), rf"{EMBEDDING} has dtype F8_E4M3"),
        (lambda t: t.update({EXPERT: t[EXPERT].bfloat16()}), rf"{EXPERT}_scale_inv is read by nothing"),
    ],
)
def test_wrong_fp8_tensors_are_named(tmp_path: Path, change: Callable[[Tensors], object], message: str) -> None:
    rewrite(ORACLE_CONFIGS["v3_fp8_partial_blocks"].write(tmp_path), change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_every_problem_is_kept_and_the_first_are_shown(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    set_config(tmp_path, hidden_size=65)
    with pytest.raises(CheckpointError, match=r"and [0-9]+ more") as caught:
        open_checkpoint(tmp_path)
    assert len(caught.value.problems) > 100


def test_dtypes_may_be_mixed(tmp_path: Path) -> None:
    def mix(tensors: Tensors) -> None:
        tensors[EXPERT] = tensors[EXPERT].half()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(write_random_checkpoint(tmp_path), mix)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensor(EXPERT).dtype == torch.float16
    assert checkpoint.set_aside == {"model.layers.0.self_attn.rotary_emb.inv_freq"}


def test_mtp_layers_are_set_aside_and_other_surplus_layers_are_not(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, mtp=True)
    aside = open_checkpoint(tmp_path).set_aside
    assert aside
    assert all(name.startswith("model.layers.3.") for name in aside)
    write_random_checkpoint(tmp_path)
    set_config(tmp_path, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..* is read by nothing"):
        open_checkpoint(tmp_path)


def test_a_tied_head_may_be_stored_only_if_it_is_the_embedding(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    assert open_checkpoint(tmp_path).set_aside == {"lm_head.weight"}
    rewrite(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_checkpoint(tmp_path)


def test_the_two_halves_of_a_model_are_the_whole(tmp_path: Path) -> None:
    config = load_model_config(write_random_checkpoint(tmp_path))
    experts = [expert_tensors(config, layer, range(config.num_experts)) for layer in config.moe_layers]
    halves = [attention_rank_tensors(config), *experts]
    assert sum(len(half) for half in halves) == len(expected_tensors(config))


def test_the_ledger_balances(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(ORACLE_CONFIGS["v3_fp8_partial_blocks"].write(tmp_path))
    names = expert_tensors(checkpoint.config, 1, (3,))
    ledger = LoadLedger(checkpoint, names, parameters=("slot 0",))
    assert ledger.progress == (0, 6)
    for name in names:
        ledger.weight(name)
    assert ledger.progress == (6, 6)
    with pytest.raises(CheckpointError, match="parameter slot 0: was to be filled and was not"):
        ledger.close()
    ledger.fill("slot 0")
    ledger.close()


def test_the_ledger_names_what_does_not_balance(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path))
    ledger = LoadLedger(checkpoint, (Q_B, O_PROJ, EMBEDDING), parameters=("embedding",))
    ledger.rows(Q_B, 0, 4)
    ledger.columns(O_PROJ, 0, 4)
    with pytest.raises(CheckpointError, match=rf"{EMBEDDING}: was to be read and was not"):
        ledger.close()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: is read by a rank that does not host it"):
        ledger.tensor("lm_head.weight")
    ledger.fill("embedding")
    for parameter, message in [("embedding", "was already filled"), ("head", "is none of this rank's parameters")]:
        with pytest.raises(CheckpointError, match=message):
            ledger.fill(parameter)
    assert torch.equal(ledger.float32(EMBEDDING, rows=(0, 2)), ledger.tensor(EMBEDDING)[:2])
    ledger.close()


def test_a_file_cut_short_after_it_was_checked(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    truncate(tmp_path / "model.safetensors", 5000)
    last = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].end)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated: 0 of .* bytes are there"):
        checkpoint.tensor(last)
