"""The blocks of the KV cache: who holds which.

A block is `block_size` positions. A sequence's blocks stand in its table in the order of its positions. Any table is
valid; a table whose blocks follow each other in memory can be read without copying, so the pool tries to give each
sequence such a run: a new sequence starts in the middle of the largest free run, which leaves it and its left
neighbour room to grow, and a growing one takes the block behind its last while that is free.
"""

import re

__all__ = ["BlockPool", "BlockTable"]

_FREE_RUN = re.compile(rb"\x00+")


class BlockTable:
    """The blocks one sequence holds, in the order of its positions."""

    __slots__ = ("blocks", "is_contiguous")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.is_contiguous = True

    def __len__(self) -> int:
        return len(self.blocks)

    def append(self, block: int) -> None:
        if self.blocks and block != self.blocks[-1] + 1:
            self.is_contiguous = False
        self.blocks.append(block)

    def clear(self) -> None:
        self.blocks.clear()
        self.is_contiguous = True


class BlockPool:
    """All blocks of one KV cache; each is free or held by one table.

    >>> pool = BlockPool(num_blocks=8, block_size=16)
    >>> table = BlockTable()
    >>> pool.grow(table, num_tokens=40)
    True
    >>> table.blocks, pool.num_free
    ([4, 5, 6], 5)
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and positions in them, not {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_free = num_blocks
        self._held = bytearray(num_blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many positions."""
        return -(-num_tokens // self.block_size)

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """The table holds room for `num_tokens` positions; or False, and nothing changed, if too few are free."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._next_block(table)
            self._held[block] = 1
            self.num_free -= 1
            table.append(block)
        return True

    def release(self, table: BlockTable) -> None:
        """The table is empty and its blocks are free."""
        for block in table.blocks:
            self._held[block] = 0
        self.num_free += len(table)
        table.clear()

    def _next_block(self, table: BlockTable) -> int:
        if table.blocks:
            following = table.blocks[-1] + 1
            if following < self.num_blocks and not self._held[following]:
                return following
        start, end = max(
            (run.span() for run in _FREE_RUN.finditer(self._held)),
            key=lambda span: span[1] - span[0],
        )
        return (start + end) // 2
