"""Many runs at once, each world in a process of its own; what came of each is on disk before the next begins."""

import asyncio
import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from faults.load import FaultMissedError
from faults.rows import ROWS
from faults.table import Result, Row, run_row

__all__ = ["Outcome", "Record", "Run", "run_all", "run_until_met", "runs_of"]

# No row takes a quarter of it: what is not over by then hangs.
_LIMIT_S = 300.0
# So often a fault may come too late for its streams before that counts as a failure.
_MOST_MISSED = 2


@dataclass(frozen=True, slots=True)
class Run:
    """One row with one seed."""

    row: str
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run."""

    run: Run
    took_s: float
    # None if the promise was broken, in the way that `defect` tells.
    result: Result | None
    defect: str = ""
    # Tries before this one whose fault met too few streams.
    num_missed: int = 0

    def __str__(self) -> str:
        verdict = f"BROKEN {self.defect}" if self.result is None else "held"
        if self.num_missed:
            verdict += f", after {self.num_missed} that met nothing"
        return f"row {self.run.row} seed {self.run.seed} {self.took_s:.1f} s {verdict}"


class Record:
    """Outcomes in a file, a line of JSON each, that survives whoever writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self) -> None:
        """Nothing has been run."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("")

    def resume(self) -> list[Outcome]:
        """All outcomes so far. A last line that was cut off is gone: its run has to be repeated."""
        if not self._path.exists():
            self.begin()
        lines = self._path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        self._path.write_text("".join(whole))
        return [_outcome_of(json.loads(line)) for line in whole]

    def add(self, outcome: Outcome) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


def _outcome_of(entry: dict[str, object]) -> Outcome:
    result = entry["result"] and Result(**entry["result"])
    return Outcome(Run(**entry["run"]), entry["took_s"], result, entry["defect"], entry["num_missed"])


def runs_of(rows: Sequence[Row], seeds: Sequence[int]) -> list[Run]:
    """Each row with each of its seeds, seed by seed: rows that wait then run beside rows that compute."""
    return [
        Run(row.number, seed)
        for index, seed in enumerate(seeds)
        for row in rows
        if row.max_seeds is None or index < row.max_seeds
    ]


def run_all(runs: Iterable[Run], *, jobs: int, keep_failed_in: Path) -> Iterator[Outcome]:
    """The runs' outcomes as they come, so many at a time. Rows that demand times run alone, after all others."""
    timed = {row.number for row in ROWS if row.is_timed}
    runs = list(runs)
    yield from _run_beside([run for run in runs if run.row not in timed], jobs, keep_failed_in)
    yield from _run_beside([run for run in runs if run.row in timed], 1, keep_failed_in)


def _run_beside(runs: Sequence[Run], jobs: int, keep_failed_in: Path) -> Iterator[Outcome]:
    # Spawned: gRPC does not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(_run, run, keep_failed_in) for run in runs]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _run(run: Run, keep_failed_in: Path) -> Outcome:
    row = next(row for row in ROWS if row.number == run.row)
    started_s = time.monotonic()
    missed: list[FaultMissedError] = []
    result, defect = None, ""
    try:
        result = asyncio.run(run_until_met(row, run.seed, missed, keep_failed_in=keep_failed_in))
    except FaultMissedError as error:
        defect = f"{error}, {len(missed)} times"
    except Exception as error:
        defect = _told(error)
    return Outcome(run, time.monotonic() - started_s, result, defect, min(len(missed), _MOST_MISSED))


async def run_until_met(
    row: Row,
    seed: int,
    missed: list[FaultMissedError],
    *,
    keep_failed_in: Path | None = None,
    packages: Path | None = None,
) -> Result:
    """As `run_row`, repeated while the fault meets too few streams; `missed` gets the error of each such run.

    Raises:
        FaultMissedError: if it never met them. That says nothing of the promise.
        AssertionError: if the promise was broken.
        TimeoutError: if the row hangs.
    """
    while True:
        try:
            async with asyncio.timeout(_LIMIT_S):
                return await run_row(row, seed, keep_failed_in=keep_failed_in, packages=packages)
        except FaultMissedError as error:
            missed.append(error)
            if len(missed) > _MOST_MISSED:
                raise


def _told(error: Exception) -> str:
    """The error in a line; of several at once the first."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
