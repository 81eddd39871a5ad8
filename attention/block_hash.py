"""Names for the contents of cache blocks: a SHA-256 chain, so that a block's name covers everything before it too.

Two blocks of the same name hold the same latents, bit for bit: the tokens, their positions and whatever else the
latents depend on are in it. The chain is that of vLLM's automatic prefix caching; a hash that nobody can make collide,
because one tenant's collision would read another one's prompt.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence


def chain_root(*keys: str) -> bytes:
    """What the chain of a sequence begins with. Sequences with different `keys` have no block name in common."""
    digest = hashlib.sha256()
    for key in keys:
        data = key.encode()
        digest.update(struct.pack("<Q", len(data)))
        digest.update(data)
    return digest.digest()


def generated_from(parent: bytes, offset: int) -> bytes:
    """What takes the place of `parent` where tokens from place `offset` of the next block on are generated.

    For latents that depend on who made a token: names behind it are not those of the same tokens in a prompt.
    """
    return hashlib.sha256(parent + struct.pack("<Q", offset)).digest()


def block_hashes(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """The names of the full blocks that `token_ids` fill, in order; tokens left over at the end have none.

    Each is SHA-256(name of the block before, ids as 64-bit little-endian integers); `parent` is the name of the block
    before the first, or the chain's root.
    """
    pack = struct.Struct(f"<{block_size}q").pack
    hashes: list[bytes] = []
    for stop in range(block_size, len(token_ids) + 1, block_size):
        parent = hashlib.sha256(parent + pack(*token_ids[stop - block_size : stop])).digest()
        hashes.append(parent)
    return hashes
