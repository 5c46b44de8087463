"""The record of runs, and their order."""

import random
from pathlib import Path

from oasst_client import AsyncClient

from faults.checker import FINISHED, Transcript
from faults.load import FaultMissedError, Load
from faults.rows import ROWS
from faults.runs import Outcome, Record, Run, runs_of
from faults.table import Result
from faults.verifiable import Prompt

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


async def test_a_fault_that_met_streams_too_late_is_no_broken_promise_unless_one_ended_badly() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        load = Load(client, random.Random(1))
    load.transcripts.append(Transcript("r-1", Prompt(1), seed=1, num_tokens=1, end=FINISHED))
    assert isinstance(load.missed("too late"), FaultMissedError)
    load.transcripts.append(Transcript("r-2", Prompt(2), seed=1, num_tokens=1, end="UNAVAILABLE"))
    assert not isinstance(load.missed("too late"), FaultMissedError)
