"""Random numbers that depend on nothing but what they are for: Philox4x32-10.

A counter-based generator (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a
function of key and counter, without state. A sequence that is resumed, preempted or batched otherwise draws the same.
"""

__all__ = ["philox4x32", "uniform_for"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def uniform_for(seed: int, choice: int, position: int) -> float:
    """Returns the number in [0, 1) that draws the token at `position` among a choice's generated tokens.

    `seed` and `position` may have 64 bits, `choice` 32; 53 bits of the number are random.
    """
    key = (seed & _MASK, seed >> 32 & _MASK)
    high, low, _, _ = philox4x32((position & _MASK, position >> 32 & _MASK, choice & _MASK, 0), key)
    return ((high << 32 | low) >> 11) * 2.0**-53


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the four random 32-bit words of a counter under a key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = product1 >> 32 ^ c1 ^ k0, product1 & _MASK, product0 >> 32 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3
