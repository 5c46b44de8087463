import random

import pytest
from oasst_worker.engine.blocks import BlockPool, BlockTable


def test_a_table_grows_to_hold_its_tokens_and_no_further():
    pool = BlockPool(num_blocks=8, block_size=4)
    table = BlockTable()
    assert pool.grow(table, 5)
    assert len(table) == 2
    assert pool.grow(table, 8)
    assert len(table) == 2
    assert pool.num_free == 6


def test_a_pool_that_is_too_full_changes_nothing():
    pool = BlockPool(num_blocks=4, block_size=4)
    first, second = BlockTable(), BlockTable()
    assert pool.grow(first, 12)
    assert not pool.grow(second, 8)
    assert (len(second), pool.num_free) == (0, 1)


def test_sequences_that_grow_in_turn_keep_contiguous_runs_while_there_is_room():
    pool = BlockPool(num_blocks=256, block_size=4)
    tables = [BlockTable() for _ in range(8)]
    for num_tokens in range(1, 65):
        for table in tables:
            assert pool.grow(table, num_tokens)
    assert all(table.is_contiguous for table in tables)


def test_a_full_pool_is_used_to_its_last_block():
    pool = BlockPool(num_blocks=7, block_size=4)
    tables = [BlockTable() for _ in range(7)]
    assert all(pool.grow(table, 4) for table in tables)
    assert pool.num_free == 0
    assert not pool.grow(BlockTable(), 1)


def test_a_release_makes_the_blocks_free_again_and_the_table_contiguous():
    pool = BlockPool(num_blocks=3, block_size=1)
    tables = [BlockTable() for _ in range(3)]
    for table in tables:
        pool.grow(table, 1)
    pool.release(tables[0])
    pool.release(tables[1])
    pool.grow(tables[2], 3)
    assert not tables[2].is_contiguous
    pool.release(tables[2])
    assert tables[2].is_contiguous
    assert pool.num_free == 3


@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_ever_held_twice(seed):
    rng = random.Random(seed)
    pool = BlockPool(num_blocks=rng.randint(1, 64), block_size=rng.randint(1, 5))
    tables = [BlockTable() for _ in range(6)]
    for _ in range(400):
        table = rng.choice(tables)
        if rng.random() < 0.2:
            pool.release(table)
        else:
            pool.grow(table, rng.randint(1, 60))
        held = [block for each in tables for block in each.blocks]
        assert len(held) == len(set(held)) == pool.num_blocks - pool.num_free
        for each in tables:
            runs = all(second == first + 1 for first, second in zip(each.blocks, each.blocks[1:], strict=False))
            assert each.is_contiguous == runs


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_an_empty_pool_is_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="a pool needs"):
        BlockPool(num_blocks, block_size)
