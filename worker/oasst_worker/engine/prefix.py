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
    for end in range((len(keys) + 1) * block_size, len(token_ids) + 1, block_size):
        key = blake2b(keys[-1] if keys else salt, digest_size=_KEY_BYTES)
        key.update(array("q", token_ids[end - block_size : end]).tobytes())
        keys.append(key.digest())
