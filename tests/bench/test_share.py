"""The rate that callers of many streams see."""

from bench.share import seen_tokens_per_s


def test_a_token_that_came_before_all_streams_had_begun_does_not_count():
    assert seen_tokens_per_s([[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0]]) == 4 / 3


def test_of_a_lone_stream_all_tokens_but_the_first_count():
    assert seen_tokens_per_s([[1.0, 1.5, 2.0]]) == 2.0
