"""Every test leaves instruction set and threads as it found them."""

from collections.abc import Iterator

import pytest
import torch

import kernels


@pytest.fixture(autouse=True)
def restore_runtime() -> Iterator[None]:
    threads, torch_threads = kernels.num_threads(), torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: torch's own threads would mostly wait for each other
    yield
    torch.set_num_threads(torch_threads)
    kernels.set_num_threads(threads)
    if kernels.native_available():
        kernels.force_isa(None)
