"""The latent cache's memory: zero, on cache lines, and taken only when it is written."""

import psutil
import torch

from attention.latent_cache import BLOCK_SIZE, LatentCache

CPU = torch.device("cpu")


def test_a_new_cache_is_zero_and_every_row_can_be_written() -> None:
    cache = LatentCache(num_layers=2, num_blocks=3, width=5, device=CPU)
    assert cache.layer(1).shape == (3, BLOCK_SIZE, 5)
    assert not cache.layer(0).any()
    cache.layer(1).fill_(7.0)
    assert not cache.layer(0).any()
    assert cache.layer(0).data_ptr() % 64 == 0


def test_memory_is_taken_as_blocks_are_written() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    cache = LatentCache(num_layers=2, num_blocks=1 << 14, width=1024, device=CPU)
    assert cache.layer(0).nbytes == 2 << 30
    cache.layer(1)[100] = 1.0
    assert process.memory_info().rss - before < 100 << 20


def test_blocks_are_read_out_and_written_at_the_same_places() -> None:
    ours, theirs = (LatentCache(num_layers=2, num_blocks=5, width=3, device=torch.device("cpu")) for _ in range(2))
    ours.layer(1).copy_(torch.rand(5, BLOCK_SIZE, 3))
    theirs.write(1, [4, 2], ours.read(1, [4, 2]))
    assert torch.equal(theirs.layer(1)[[2, 4]], ours.layer(1)[[2, 4]])
    assert not theirs.layer(1)[[0, 1, 3]].any()
    assert not theirs.layer(0).any()
