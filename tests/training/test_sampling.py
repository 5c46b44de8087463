"""In which order rows are trained on, and how the learning rate goes."""

import math
from collections import Counter

import pytest
from oasst_training.sampling import SampleOrder
from oasst_training.schedule import learning_rate_factor

LENGTHS = [(7 * index) % 101 for index in range(101)]


def epoch(order: SampleOrder, number: int = 0) -> list[list[int]]:
    size = order.num_batches_per_epoch
    return [order.micro_batch(batch) for batch in range(number * size, (number + 1) * size)]


@pytest.mark.parametrize("sort_by_length", [False, True])
def test_an_epoch_has_every_row_and_fills_its_last_micro_batch_from_its_beginning(sort_by_length):
    order = SampleOrder(LENGTHS, batch_size=4, seed=0, sort_by_length=sort_by_length)
    batches = epoch(order)
    assert [len(batch) for batch in batches] == [4] * 26
    counts = Counter(row for batch in batches for row in batch)
    assert set(counts) == set(range(101))
    assert sum(counts.values()) == 104


def test_epochs_and_seeds_have_orders_of_their_own():
    order = SampleOrder(LENGTHS, batch_size=4, seed=0)
    orders = [epoch(order), epoch(order, 1), epoch(SampleOrder(LENGTHS, batch_size=4, seed=9))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != sorted(orders[0])


def test_a_micro_batch_is_the_same_whatever_was_asked_for_before():
    order = SampleOrder(LENGTHS, batch_size=4, seed=0)
    in_order = epoch(order) + epoch(order, 1)
    assert [order.micro_batch(number) for number in reversed(range(52))] == in_order[::-1]


def test_sorted_by_length_a_micro_batch_has_rows_of_about_equal_length_in_random_order():
    order = SampleOrder(LENGTHS, batch_size=4, seed=0, sort_by_length=True)
    means = [sum(LENGTHS[row] for row in batch) / 4 for batch in epoch(order)]
    spreads = [max(LENGTHS[row] for row in batch) - min(LENGTHS[row] for row in batch) for batch in epoch(order)]
    assert sorted(spreads)[13] < 10
    assert means != sorted(means)


def test_fewer_rows_than_a_micro_batch_are_repeated():
    [batch] = epoch(SampleOrder([5, 6, 7], batch_size=8, seed=0))
    assert Counter(batch).keys() == {0, 1, 2}
    assert len(batch) == 8


def test_the_rate_rises_with_the_logarithm_then_falls_in_a_line_to_nothing():
    factors = [learning_rate_factor(step, num_warmup_steps=100, num_steps=1100) for step in range(1101)]
    assert factors[0] == 0
    assert factors[9] == pytest.approx(0.5)  # log 10 / log 100
    assert factors[99] == pytest.approx(1.0)
    assert factors[100] == 1
    assert factors[600] == pytest.approx(0.5)
    assert factors[1100] == 0


@pytest.mark.parametrize("num_warmup_steps", [0, 1, 2])
def test_hardly_any_warm_up_is_two_steps(num_warmup_steps):
    factors = [learning_rate_factor(step, num_warmup_steps=num_warmup_steps, num_steps=4) for step in range(4)]
    assert factors == [0, 1, 1, 0.5]


def test_a_run_shorter_than_its_warm_up_ends_on_the_way_up():
    assert learning_rate_factor(4, num_warmup_steps=100, num_steps=5) == math.log(5) / math.log(100)
