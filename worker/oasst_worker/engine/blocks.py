"""The blocks of the KV cache: who holds which, and what the free ones still know.

A block is `block_size` positions. A sequence's blocks stand in its own list in the order of its positions; sequences
that begin alike may hold the same blocks. A full block can be published under a key that tells all the tokens up to
its end. It stays known after its last holder released it, until it is handed out for something else: blocks that know
nothing go first, then those worth less, then the least recently used.
"""

from collections import OrderedDict
from collections.abc import Iterable

__all__ = ["BlockPool"]


class BlockPool:
    """All blocks of one KV cache.

    >>> pool = BlockPool(num_blocks=8, block_size=16)
    >>> blocks: list[int] = []
    >>> pool.grow(blocks, num_tokens=40)
    True
    >>> pool.publish(blocks[0], b"the first 16 tokens")
    >>> pool.release(blocks)
    >>> pool.find([b"the first 16 tokens", b"the first 32 tokens"])
    [0]
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and positions in them, not {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_holders = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # In the order they are handed out.
        self._free_worth_less: OrderedDict[int, None] = OrderedDict()  # Known ones, handed out before other known ones.
        self._key_of: dict[int, bytes] = {}
        self._known: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, known ones included."""
        return len(self._free) + len(self._free_worth_less)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many positions."""
        return -(-num_tokens // self.block_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The known blocks of the longest run of these keys, from the first on."""
        blocks = []
        for key in keys:
            block = self._known.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody holds."""
        return sum(not self._num_holders[block] for block in blocks)

    def num_held_once(self, blocks: Iterable[int]) -> int:
        """How many of these blocks have one holder, and are free once it lets go."""
        return sum(self._num_holders[block] == 1 for block in blocks)

    def share(self, blocks: list[int], found: Iterable[int]) -> None:
        """The list holds these blocks too, behind its own."""
        for block in found:
            self._free.pop(block, None)
            self._free_worth_less.pop(block, None)
            self._num_holders[block] += 1
            blocks.append(block)

    def grow(self, blocks: list[int], num_tokens: int) -> bool:
        """The list holds room for `num_tokens` positions; or False, and nothing changed, if too few are free."""
        missing = self.blocks_for(num_tokens) - len(blocks)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._pop_free()
            self._forget(block)
            self._num_holders[block] = 1
            blocks.append(block)
        return True

    def publish(self, block: int, key: bytes) -> None:
        """Whoever looks for the key finds the block. Its positions are computed and will not change."""
        if key not in self._known and block not in self._key_of:
            self._known[key] = block
            self._key_of[block] = key

    def release(self, blocks: list[int], *, is_worth_less: bool = False) -> None:
        """The list is empty; blocks that nobody else holds are free, worth less or not than those of others."""
        for block in reversed(blocks):  # The end of a prefix is worth less than its beginning: it goes first.
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                if block not in self._key_of:
                    self._free[block] = None
                    self._free.move_to_end(block, last=False)
                elif is_worth_less:
                    self._free_worth_less[block] = None
                else:
                    self._free[block] = None
        blocks.clear()

    def forget(self, blocks: Iterable[int]) -> None:
        """Nobody finds these blocks any more; who holds them keeps them."""
        for block in blocks:
            self._forget(block)

    def _pop_free(self) -> int:
        """The free block that is missed least."""
        if self._free_worth_less and not (self._free and next(iter(self._free)) not in self._key_of):
            return self._free_worth_less.popitem(last=False)[0]
        return self._free.popitem(last=False)[0]

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._known[key]
