"""Workers share the machine's GPUs."""

import pytest
from oasst_cli.up.machine import share_of, visible_gpus


@pytest.mark.parametrize(
    ("gpus", "shares"),
    [
        ([], [[], []]),
        (["0"], [["0"]]),
        (["0", "1"], [["0"], ["1"]]),
        (["4", "5", "6", "7"], [["4", "5"], ["6", "7"]]),
        (["0", "1", "2"], [["0"], ["1", "2"]]),
        (["0", "1"], [["0"], ["1"], ["0"]]),
    ],
)
def test_each_worker_has_gpus_of_its_own_where_there_are_enough(gpus, shares):
    assert [share_of(gpus, worker, len(shares)) for worker in range(len(shares))] == shares


def test_gpus_are_those_that_are_named_else_those_of_the_driver(tmp_path):
    assert visible_gpus(None, tmp_path / "no driver") == []
    for address in ("0000:19:00.0", "0000:3b:00.0"):
        (tmp_path / address).mkdir()
    assert visible_gpus(None, tmp_path) == ["0", "1"]
    assert visible_gpus("GPU-8f, 3", tmp_path) == ["GPU-8f", "3"]
    assert visible_gpus("", tmp_path) == []
