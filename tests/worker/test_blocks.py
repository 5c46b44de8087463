"""Blocks of the KV cache: lists of them grow, are shared by what begins alike, and give up the least used."""

import random

import pytest
from oasst_worker.engine.blocks import BlockPool
from oasst_worker.engine.prefix import extend_keys


def test_a_list_grows_to_hold_its_tokens_and_no_further():
    pool = BlockPool(num_blocks=8, block_size=4)
    blocks: list[int] = []
    assert pool.grow(blocks, 5)
    assert len(blocks) == 2
    assert pool.grow(blocks, 8)
    assert len(blocks) == 2
    assert pool.num_free == 6


def test_a_pool_that_is_too_full_changes_nothing():
    pool = BlockPool(num_blocks=4, block_size=4)
    first, second = [], []
    assert pool.grow(first, 12)
    assert not pool.grow(second, 8)
    assert (len(second), pool.num_free) == (0, 1)


def test_a_full_pool_is_used_to_its_last_block():
    pool = BlockPool(num_blocks=7, block_size=4)
    assert all(pool.grow([], 4) for _ in range(7))
    assert pool.num_free == 0
    assert not pool.grow([], 1)


def test_a_published_block_is_found_after_its_release_until_it_is_handed_out_anew():
    pool = BlockPool(num_blocks=2, block_size=4)
    blocks: list[int] = []
    pool.grow(blocks, 4)
    (block,) = blocks
    pool.publish(block, b"key")
    pool.release(blocks)
    assert pool.find([b"key"]) == [block]
    other: list[int] = []
    pool.grow(other, 4)  # The block that knows nothing goes first.
    assert block not in other
    pool.grow(other, 8)
    assert pool.find([b"key"]) == []


def test_of_known_blocks_the_end_of_the_oldest_prefix_goes_first():
    pool = BlockPool(num_blocks=4, block_size=1)
    for name in (b"a", b"b"):
        blocks: list[int] = []
        pool.grow(blocks, 2)
        for index, block in enumerate(blocks):
            pool.publish(block, name + bytes([index]))
        pool.release(blocks)
    pool.grow([], 1)
    assert len(pool.find([b"a\0", b"a\1"])) == 1
    assert len(pool.find([b"b\0", b"b\1"])) == 2


def test_a_shared_block_is_free_only_when_its_last_holder_released_it():
    pool = BlockPool(num_blocks=3, block_size=4)
    first, second = [], []
    pool.grow(first, 4)
    pool.publish(first[0], b"key")
    pool.share(second, pool.find([b"key"]))
    assert (second, pool.num_free) == (first, 2)
    pool.release(first)
    assert pool.num_free == 2
    pool.release(second)
    assert pool.num_free == 3


def test_a_run_of_keys_is_found_up_to_the_first_unknown_one():
    pool = BlockPool(num_blocks=4, block_size=1)
    blocks: list[int] = []
    pool.grow(blocks, 3)
    for block, key in zip(blocks, (b"1", b"2", b"4"), strict=True):
        pool.publish(block, key)
    assert pool.find([b"1", b"2", b"3", b"4"]) == blocks[:2]


@pytest.mark.parametrize("seed", range(20))
def test_every_block_is_free_or_held_by_exactly_those_that_grew_or_share_it(seed):
    rng = random.Random(seed)
    pool = BlockPool(num_blocks=rng.randint(1, 64), block_size=rng.randint(1, 5))
    lists: list[list[int]] = [[] for _ in range(6)]
    keys = [bytes([number]) for number in range(20)]
    for _ in range(400):
        blocks = rng.choice(lists)
        act = rng.random()
        if act < 0.2:
            pool.release(blocks)
        elif act < 0.4 and blocks:
            pool.publish(rng.choice(blocks), rng.choice(keys))
        elif act < 0.6 and not blocks:
            pool.share(blocks, dict.fromkeys(pool.find(rng.sample(keys, 3))))
        else:
            before, num_free = len(blocks), pool.num_free
            missing = max(0, pool.blocks_for(num_tokens := rng.randint(1, 60)) - before)
            assert pool.grow(blocks, num_tokens) == (missing <= num_free)
            assert len(blocks) - before == num_free - pool.num_free
        held = {block for each in lists for block in each}
        assert len(held) == pool.num_blocks - pool.num_free
    for blocks in lists:
        pool.release(blocks)
    assert pool.num_free == pool.num_blocks


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_an_empty_pool_is_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="a pool needs"):
        BlockPool(num_blocks, block_size)


def keys_of(token_ids, *, salt=b"", block_size=4) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, token_ids, block_size=block_size, salt=salt)
    return keys


def test_keys_are_equal_as_far_as_the_tokens_and_only_for_equal_salts():
    one, other = keys_of([1, 2, 3, 4, 5, 6, 7, 8, 9]), keys_of([1, 2, 3, 4, 5, 6, 7, 0])
    assert (len(one), len(other)) == (2, 2)
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert set(keys_of([1, 2, 3, 4], salt=b"a")).isdisjoint(keys_of([1, 2, 3, 4], salt=b"b"))
    assert keys_of([0, 0, 0, 0] * 2)[0] != keys_of([0, 0, 0, 0] * 2)[1]


def test_keys_grow_with_the_tokens_and_those_before_stay():
    tokens = list(range(20))
    keys = keys_of(tokens[:9])
    extend_keys(keys, tokens, block_size=4, salt=b"")
    assert keys == keys_of(tokens)


def test_known_blocks_worth_less_are_handed_out_before_other_known_ones_and_found_until_then():
    pool = BlockPool(num_blocks=3, block_size=4)
    holders: list[list[int]] = [[], [], []]
    for number, blocks in enumerate(holders):
        assert pool.grow(blocks, 4)
        if number < 2:
            pool.publish(blocks[0], f"key {number}".encode())
    first, less, unknown = (blocks[0] for blocks in holders)
    pool.release(holders[0])
    pool.release(holders[1], is_worth_less=True)
    pool.release(holders[2])
    assert pool.num_free == 3
    assert pool.find([b"key 1"]) == [less]
    taken: list[int] = []
    for num_tokens in (4, 8, 12):
        assert pool.grow(taken, num_tokens)
    assert taken == [unknown, less, first]


def test_a_block_worth_less_that_is_shared_again_is_not_handed_out():
    pool = BlockPool(num_blocks=2, block_size=4)
    blocks: list[int] = []
    pool.grow(blocks, 4)
    pool.publish(blocks[0], b"key")
    pool.release(blocks, is_worth_less=True)
    pool.share(blocks, pool.find([b"key"]))
    other: list[int] = []
    assert not pool.grow(other, 8)
    assert pool.grow(other, 4)
    assert set(other).isdisjoint(blocks)
