"""Systems take turns, and ratios are of what was measured in the same round."""

from dataclasses import dataclass

from bench.turns import Ratio, median_of, paired_ratio, take_turns, turns


@dataclass(frozen=True)
class Row:
    name: str
    streams: int
    seconds: float


def test_another_system_is_first_in_each_round_and_the_first_round_warms_up():
    order = []

    def turn_of(name):
        def take(number):
            order.append((number, name))
            return f"{name}{number}"

        return take

    given = take_turns({name: turn_of(name) for name in "ab"}, 2, pause_s=0.0)
    assert given == {"a": ["a0", "a1"], "b": ["b0", "b1"]}
    assert order == [(-1, "b"), (-1, "a"), (0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_who_warms_up_by_itself_needs_no_round_for_it():
    order = list(turns("ab", 2, warms_up=False, pause_s=0.0))
    assert order == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_a_ratio_is_taken_round_by_round():
    ratio = paired_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert ratio == Ratio(2.0, 1.0, 3.0)
    assert str(ratio) == "2.00 (1.00-3.00)"
    assert f"{ratio:.1f}" == "2.0 (1.0-3.0)"


def test_what_is_the_same_in_all_rounds_stays_as_it_is():
    assert median_of([Row("a", 8, 1.0), Row("a", 8, 2.0)]) == Row("a", 8, 1.5)
