"""Keys of blocks: equal keys mean equal tokens up to the block's end, and the same salt."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

__all__ = ["extend_keys"]

_KEY_BYTES = 16


def extend_keys(keys: list[bytes], token_ids: Sequence[int], *, block_size: int, salt: bytes) -> None:
    """`keys` holds a key for every full block of the tokens; those it had already are taken as they are.

    A key is BLAKE2b of the key before it (of the salt, for the first block) and the block's token ids, so nobody who
    does not know a salt can make a sequence that finds blocks of another.
    """
    start = len(keys) * block_size
    tokens = memoryview(array("q", token_ids[start : len(token_ids) // block_size * block_size])).cast("B")
    key, size = keys[-1] if keys else salt, 8 * block_size
    for offset in range(0, len(tokens), size):
        digest = blake2b(key, digest_size=_KEY_BYTES)
        digest.update(tokens[offset : offset + size])
        key = digest.digest()
        keys.append(key)
