"""A row's bits depend on that row alone: not on how many rows there are, their order, the threads, nor (among the
variants this machine runs) the instruction set. Every operation of the exact path, at widths that fill vectors and
at widths that do not.
"""

from collections.abc import Callable

import pytest
import torch

import kernels
from tests.kernels.weights import DTYPES, experts, heads, needs_native, normal, packed, seeded

pytestmark = needs_native

NUM_ROWS = 97
WIDTHS = (7, 61, 1000)
Run = Callable[[torch.Tensor], torch.Tensor]  # row numbers -> results of these rows


def linear(width: int, dtype: torch.dtype) -> Run:
    x = normal(NUM_ROWS, width)
    layers = [packed(45, width, dtype), packed(45, width, dtype, num_shards=1 if width % 2 else 8, block=(48, 50))]
    return lambda rows: torch.cat([kernels.linear(x[rows], layer) for layer in layers], 1)


def grouped_ffn(width: int, dtype: torch.dtype) -> Run:
    x, bank = normal(NUM_ROWS, width), experts(5, width, 45, dtype, block=(48, 50))

    def run(rows: torch.Tensor) -> torch.Tensor:
        expert = torch.stack((rows % 5, (rows + 1 + rows % 3) % 5), 1).flatten().int()
        slot_rows = torch.arange(len(expert), dtype=torch.int32) // 2
        return kernels.grouped_ffn(x[rows], bank, slot_rows, expert).view(len(rows), -1)

    return run


def head_linear(width: int, dtype: torch.dtype) -> Run:
    packed_heads, x = heads(3, 37, width, dtype), normal(3, NUM_ROWS, width)
    return lambda rows: kernels.head_linear(x[:, rows].transpose(0, 1), packed_heads).flatten(1)


def in_pairs(width: int) -> Run:
    """What is made of linear, grouped_ffn and head_linear in bf16x3, at the next width that it takes."""
    width = -(-width // 32) * 32
    x, other = normal(NUM_ROWS, width), normal(3, NUM_ROWS, width, seed=1)
    shards = 8 if width % 256 == 0 else 1
    layers = [packed(45, width, torch.bfloat16, num_shards=n, arithmetic="bf16x3") for n in (1, shards)]
    bank = experts(5, width, 64, torch.bfloat16, arithmetic="bf16x3")
    of_heads = heads(3, 37, width, torch.bfloat16, arithmetic="bf16x3")

    def run(rows: torch.Tensor) -> torch.Tensor:
        slot_rows = torch.arange(len(rows), dtype=torch.int32)
        results = [kernels.linear(x[rows], layer) for layer in layers]
        results.append(kernels.grouped_ffn(x[rows], bank, slot_rows, (rows % 5).int()))
        results.append(kernels.head_linear(other[:, rows].transpose(0, 1), of_heads).flatten(1))
        return torch.cat(results, 1)

    return run


def rms_norm(width: int) -> Run:
    x, weight = normal(NUM_ROWS, width), normal(width, seed=1)
    return lambda rows: kernels.rms_norm(x[rows], weight, 1e-6)


def add_rms_norm(width: int) -> Run:
    x, y, weight = normal(NUM_ROWS, width), normal(NUM_ROWS, width, seed=1), normal(width, seed=2)
    return lambda rows: kernels.add_rms_norm_(x[rows], y[rows], weight, 1e-6)


def rope(width: int) -> Run:
    x, angle = normal(NUM_ROWS, 3, 2 * width), normal(NUM_ROWS, width, seed=1)
    cos, sin = angle.cos(), angle.sin()

    def run(rows: torch.Tensor) -> torch.Tensor:
        both = [kernels.rope_(x[rows], cos[rows], sin[rows], interleave) for interleave in (True, False)]
        return torch.cat(both, 1).flatten(1)

    return run


def route(width: int) -> Run:
    logits, bias = normal(NUM_ROWS, width), normal(width, seed=1) * 0.1
    groups = 8 if width % 8 == 0 else 1

    def run(rows: torch.Tensor) -> torch.Tensor:
        shared = {"num_groups": groups, "topk_groups": max(1, groups // 2), "top_k": 6, "normalize": True, "scale": 2.5}
        x = logits[rows]
        results = (
            *kernels.route(x, bias, scoring="sigmoid", method="noaux_tc", **shared),  # type: ignore[arg-type]
            *kernels.route(x, None, scoring="softmax", method="group_limited_greedy", **shared),  # type: ignore[arg-type]
        )
        return torch.cat([result.float() for result in results], 1)

    return run


def combine(width: int) -> Run:
    answers, base = normal(50, width), normal(NUM_ROWS, width, seed=1)
    slots = torch.randint(0, 50, (NUM_ROWS, 4), generator=seeded(), dtype=torch.int32)
    weights = torch.rand(NUM_ROWS, 4, generator=seeded())
    return lambda rows: kernels.combine(answers, slots[rows], weights[rows], base[rows])


def scores(width: int) -> Run:
    x, token_ids = normal(NUM_ROWS, width) * 5, torch.arange(NUM_ROWS) % width

    def run(rows: torch.Tensor) -> torch.Tensor:
        found = kernels.score(x[rows], token_ids[rows].tolist(), [3] * rows.shape[0])
        return torch.tensor([[score.logprob, *score.top_logprobs] for score in found if score is not None])

    return run


def best(width: int) -> Run:
    x = torch.randint(0, 9, (NUM_ROWS, width), generator=seeded()).float()
    return lambda rows: torch.tensor(kernels.sample(x[rows], [kernels.BEST] * rows.shape[0]))[:, None].float()


def tree_add(width: int) -> Run:
    parts = [normal(NUM_ROWS, width, seed=seed) for seed in range(8)]
    return lambda rows: kernels.tree_add([part[rows] for part in parts])


def mla_attention(width: int) -> Run:
    latent_width, heads = min(width, 512), 5
    cache = normal(20, 32, latent_width + 6)
    latent, rotary = normal(NUM_ROWS, heads, latent_width, seed=1), normal(NUM_ROWS, heads, 6, seed=2)
    tables = torch.randperm(20, generator=seeded()).int().view(5, 4)
    row_seq = torch.arange(NUM_ROWS, dtype=torch.int32) // 25
    positions = torch.randint(0, 128, (NUM_ROWS,), generator=seeded(), dtype=torch.int32)

    def run(rows: torch.Tensor) -> torch.Tensor:
        return kernels.mla_attention(
            latent[rows], rotary[rows], cache, tables, row_seq[rows], positions[rows], 0.1
        ).flatten(1)

    return run


def expanded_attention(width: int) -> Run:
    latent_width, heads = min(width, 256), 3  # 256: the values of bf16x3
    cache = normal(30, 32, latent_width + 6)
    weights = [normal(heads, size, latent_width, seed=size) / latent_width**0.5 for size in (18, 20)]
    packed_heads = kernels.pack_heads(weights[0]), kernels.pack_heads(weights[1].bfloat16(), arithmetic="bf16x3")
    query = normal(NUM_ROWS, heads, 24, seed=1)
    tables = torch.randperm(30, generator=seeded()).int().view(5, 6)
    row_seq = torch.arange(NUM_ROWS, dtype=torch.int32) // 25
    positions = torch.randint(0, 192, (NUM_ROWS,), generator=seeded(), dtype=torch.int32)

    def run(rows: torch.Tensor) -> torch.Tensor:
        return kernels.expanded_attention(
            query[rows], packed_heads, cache, tables, row_seq[rows], positions[rows], 0.1
        ).flatten(1)

    return run


OPERATIONS: dict[str, Callable[[int], Run]] = {
    "in_pairs": in_pairs,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rope": rope,
    "route": route,
    "combine": combine,
    "scores": scores,
    "best": best,
    "tree_add": tree_add,
    "mla_attention": mla_attention,
    "expanded_attention": expanded_attention,
}
for _dtype in DTYPES:
    _name = str(_dtype).removeprefix("torch.")
    OPERATIONS[f"linear-{_name}"] = lambda width, dtype=_dtype: linear(width, dtype)  # type: ignore[misc]
    OPERATIONS[f"grouped_ffn-{_name}"] = lambda width, dtype=_dtype: grouped_ffn(width, dtype)  # type: ignore[misc]
    OPERATIONS[f"head_linear-{_name}"] = lambda width, dtype=_dtype: head_linear(width, dtype)  # type: ignore[misc]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_do_not_depend_on_their_company(operation: str, width: int) -> None:
    run = OPERATIONS[operation](width)
    kernels.set_num_threads(1)
    alone = torch.cat([run(torch.tensor([row])) for row in range(NUM_ROWS)])
    generator = seeded(width)
    for count in range(1, NUM_ROWS + 1):
        kernels.set_num_threads(1 + count % 2)
        rows = torch.randperm(NUM_ROWS, generator=generator)[:count]
        assert same_bits(run(rows), alone[rows]), f"{count} rows"
    kernels.set_num_threads(1)
    whole = run(torch.arange(NUM_ROWS))
    kernels.set_num_threads(2)
    assert same_bits(whole, alone)
    assert same_bits(run(torch.arange(NUM_ROWS)), alone)


@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "generic"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_instruction_sets_agree(operation: str, isa: str) -> None:
    try:
        kernels.force_isa(isa)
    except ValueError:
        pytest.skip(f"this processor does not run {isa}")
    for width in WIDTHS:
        run = OPERATIONS[operation](width)
        results = []
        for name in (isa, None):
            kernels.force_isa(name)
            results.append([run(torch.arange(count)) for count in (1, 2, 5, NUM_ROWS)])
        for left, right in zip(*results, strict=True):
            assert same_bits(left, right)
