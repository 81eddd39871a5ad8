"""Row operations against torch, in double where it shows more."""

import pytest
import torch

import kernels
from kernels import reference
from tests.kernels.weights import needs_native, normal, relative_error, seeded

WIDTHS = (1, 7, 61, 1000)


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int) -> None:
    x, weight = normal(5, width), normal(width, seed=1)
    want = weight.double() * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert relative_error(kernels.rms_norm(x, weight, 1e-6), want) < 1e-6
    assert relative_error(reference.rms_norm(x, weight, 1e-6), want) < 1e-6


@pytest.mark.parametrize("interleave", [True, False])
def test_rope_rotates_a_view_in_place(interleave: bool) -> None:
    whole, angle = normal(6, 3, 40), normal(6, 15, seed=1)
    view, twin = whole[:, :, 10:], whole.clone()[:, :, 10:]
    untouched = whole[:, :, :10].clone()
    assert kernels.rope_(view, angle.cos(), angle.sin(), interleave) is view
    assert torch.equal(view, reference.rope_(twin, angle.cos(), angle.sin(), interleave))
    assert torch.equal(whole[:, :, :10], untouched)
    # A rotation keeps lengths.
    assert torch.allclose(view.norm(dim=-1), normal(6, 3, 40)[:, :, 10:].norm(dim=-1), rtol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_base", [True, False])
def test_combine(width: int, with_base: bool) -> None:
    rows, base = normal(20, width), normal(7, width, seed=1) if with_base else None
    slots = torch.randint(0, 20, (7, 4), generator=seeded(), dtype=torch.int32)
    weights = torch.rand(7, 4, generator=seeded())
    got = kernels.combine(rows, slots, weights, base)
    assert relative_error(got, reference.combine(rows, slots, weights, base)) < 1e-6


@needs_native
def test_combine_refuses_a_slot_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="outside the answered rows"):
        kernels.combine(torch.ones(2, 3), torch.tensor([[2]], dtype=torch.int32), torch.ones(1, 1), None)


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_tree_add_is_a_balanced_tree(count: int) -> None:
    parts = [normal(7, 61, seed=seed) for seed in range(count)]
    assert torch.equal(kernels.tree_add(parts), reference.tree_add(parts))


def test_tree_add_refuses_what_is_no_balanced_tree() -> None:
    with pytest.raises(ValueError, match="3 parts"):
        kernels.tree_add([torch.ones(2)] * 3)


def test_adding_before_the_norm_changes_no_bit() -> None:
    x, y, weight = normal(5, 61), normal(5, 61, seed=1), normal(61, seed=2)
    both, normed = x + y, kernels.rms_norm(x + y, weight, 1e-6)
    assert torch.equal(kernels.add_rms_norm_(x, y, weight, 1e-6), normed)
    assert torch.equal(x, both)
