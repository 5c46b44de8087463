"""The record of runs, and their order."""

from pathlib import Path

from faults.rows import ROWS
from faults.runs import Outcome, Record, Run, runs_of
from faults.table import Result

HELD = Outcome(Run("2", 1), 5.5, Result(1, 24, 3600, {"resumed jobs": 14.0}))
BROKEN = Outcome(Run("6a", 2), 7.25, None, "DefectError: 1 defects, the first: x | y")


def test_the_record_gives_back_what_was_added(tmp_path: Path) -> None:
    record = Record(tmp_path / "faults" / "record.jsonl")
    record.begin()
    record.add(HELD)
    record.add(BROKEN)
    assert record.resume() == [HELD, BROKEN]


def test_a_line_that_was_cut_off_is_no_outcome(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    record = Record(path)
    record.add(HELD)
    whole = path.read_text()
    record.add(BROKEN)
    path.write_text(path.read_text()[: len(whole) + 20])
    assert record.resume() == [HELD]
    record.add(BROKEN)
    assert record.resume() == [HELD, BROKEN]


def test_a_record_that_was_never_written_is_empty(tmp_path: Path) -> None:
    assert Record(tmp_path / "record.jsonl").resume() == []


def test_every_row_runs_with_each_of_its_seeds_and_no_more_than_it_wants() -> None:
    runs = runs_of(ROWS, range(7, 12))
    assert len(set(runs)) == len(runs)
    for row in ROWS:
        assert [run.seed for run in runs if run.row == row.number] == list(range(7, 12))[: row.max_seeds]
