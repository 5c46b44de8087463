"""The record of runs, and their order."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from oasst_client import AsyncClient

from faults import table
from faults.__main__ import run_mutants
from faults.checker import FINISHED, Transcript
from faults.load import FaultMissedError, Load
from faults.mutations import MUTATIONS
from faults.rows import ROWS
from faults.runs import Outcome, Record, Run, run_until_met, runs_of
from faults.table import Result, Row
from faults.verifiable import Prompt
from faults.world import World

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


MISSED, BROKE = FaultMissedError("too slow"), AssertionError("a gap")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Row]:
    """Makes rows whose runs end in turn with these errors, or well; the world they run in is empty."""

    @asynccontextmanager
    async def open_nothing(*_: object) -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(load=SimpleNamespace(transcripts=[], num_tokens_seen=1))

    monkeypatch.setattr(table.World, "open", open_nothing)

    def make(*ends: Exception | None) -> Row:
        runs = iter(ends)

        async def scenario(_: World) -> dict[str, float]:
            if (error := next(runs)) is not None:
                raise error
            return {}

        return table.row("0", "a fault", "a promise")(scenario)

    return make


async def test_a_run_whose_fault_met_nothing_is_repeated(scripted: Callable[..., Row]) -> None:
    missed: list[FaultMissedError] = []
    assert (await run_until_met(scripted(MISSED, MISSED, None), 1, missed)).seed == 1
    assert missed == [MISSED, MISSED]
    with pytest.raises(FaultMissedError):
        await run_until_met(scripted(MISSED, MISSED, MISSED), 1, [])


async def test_a_broken_promise_is_not_tried_again(scripted: Callable[..., Row]) -> None:
    with pytest.raises(AssertionError, match="a gap"):
        await run_until_met(scripted(MISSED, BROKE, None), 1, [])


def test_a_mutant_is_killed_by_a_broken_promise_and_not_by_a_fault_that_met_nothing(
    scripted: Callable[..., Row],
) -> None:
    def killed_by(*ends: Exception | None) -> list[tuple[int, str]]:
        mutation = replace(MUTATIONS[0], row=scripted(*ends))
        return [(mutant.num_runs, mutant.defect) for mutant in run_mutants([mutation], seeds=range(1, 3))]

    assert killed_by(MISSED, MISSED, MISSED, None) == [(1, "")]
    assert killed_by(MISSED, MISSED, MISSED, BROKE) == [(1, "a gap")]
    assert killed_by(None, BROKE) == [(2, "a gap")]
