"""Threads, forks, floating-point modes and the choice of the instruction set."""

import os
import threading

import pytest
import torch

import kernels
from tests.kernels.weights import needs_native, normal, packed

pytestmark = needs_native


def test_the_runtime_says_what_it_is() -> None:
    assert kernels.isa() in ("amx", "avx512", "avx2", "generic")
    assert kernels.native_reason() == ""
    with pytest.raises(ValueError, match="does not run that instruction set"):
        kernels.force_isa("abacus")


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_impossible_thread_counts_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=f"num_threads is {threads}; give 1 to 256"):
        kernels.set_num_threads(threads)


def test_thread_counts_may_change_at_any_time() -> None:
    layer, x = packed(300, 500, torch.bfloat16), normal(3, 500)
    want = kernels.linear(x, layer)
    for threads in (2, 5, 1, 3, 2):
        kernels.set_num_threads(threads)
        assert kernels.num_threads() == threads
        for _ in range(20):
            assert torch.equal(kernels.linear(x, layer), want)


def test_callers_on_several_threads_take_turns() -> None:
    layer, x = packed(300, 500, torch.bfloat16), normal(3, 500)
    kernels.set_num_threads(2)
    wrong: list[int] = []
    want = kernels.linear(x, layer)

    def call() -> None:
        wrong.extend(i for i in range(50) if not torch.equal(kernels.linear(x, layer), want))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    layer, x = packed(300, 500, torch.bfloat16), normal(3, 500)
    kernels.set_num_threads(2)
    want = kernels.linear(x, layer)
    child = os.fork()
    if child == 0:
        same = torch.equal(kernels.linear(x, layer), want)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_flushing_of_subnormals_elsewhere_changes_nothing() -> None:
    tiny = torch.full((40, 1), 1e-30)
    layer = kernels.pack_linear(tiny)
    x = torch.full((1, 1), 1e-10)
    want = kernels.linear(x, layer)
    assert float(want[0, 0]) > 0
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        got = kernels.linear(x, layer)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, want)


def test_who_works_aside_waits_for_nobody() -> None:
    """Packing on another thread goes on while this one computes, with the same results on both."""
    weight, x = normal(700, 900), normal(40, 900)
    layer = kernels.pack_linear(weight)
    want = kernels.linear(x, layer)
    packed_aside: list[kernels.PackedLinear] = []

    def pack() -> None:
        with kernels.aside():
            packed_aside.extend(kernels.pack_linear(weight) for _ in range(30))

    kernels.set_num_threads(2)
    other = threading.Thread(target=pack)
    other.start()
    for _ in range(30):
        assert torch.equal(kernels.linear(x, layer), want)
    other.join()
    assert all(torch.equal(kernels.linear(x, each), want) for each in packed_aside)
    with kernels.aside():
        assert torch.equal(kernels.linear(x, layer), want)
