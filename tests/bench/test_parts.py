"""The command line of the measurements: parts, and the options that they read."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from bench.__main__ import PARTS, parse
from bench.options import Options


def test_every_part_is_a_module_and_reads_options_that_there_are():
    assert all(find_spec(f"bench.{part}") for part in PARTS)
    assert {name for read in PARTS.values() for name in read} == set(Options.__dataclass_fields__) - {"folder"}


def test_all_parts_are_measured_that_have_something_to_measure_with():
    assert parse([])[0] == [part for part in PARTS if part != "speculation"]
    assert parse(["--answers", "report.json"])[0] == list(PARTS)


def test_options_reach_the_parts_that_read_them():
    assert parse(["engine", "queue", "--rounds", "2", "--waiting", "10"])[:2] == (
        ["engine", "queue"],
        {"rounds": 2, "waiting": [10]},
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["agreement", "--rounds", "5"], "--rounds is read by none of these parts: agreement"),
        (["prefix", "--prompt-tokens", "64"], "--prompt-tokens is read by none of these parts: prefix"),
        (["engines"], "no such part: engines"),
    ],
)
def test_what_nobody_reads_is_refused(arguments, told, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert told in capsys.readouterr().err


def test_a_part_without_a_model_imports_no_transformers():
    code = "import bench.__main__, bench.queue, bench.gateway, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
