"""A row of the fault table, and how one is run."""

import random
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from faults.world import Shape, World

__all__ = ["Evidence", "Result", "Row", "Scenario", "row", "run_row"]

# What a run measured: name, unit included, and value.
Evidence = Mapping[str, float]
Scenario = Callable[[World], Awaitable[Evidence]]


@dataclass(frozen=True, slots=True)
class Row:
    """One fault, what is promised under it, and the scenario that breaks and looks."""

    # As in docs/reliability.md; letters tell variants of a fault apart.
    number: str
    fault: str
    promise: str
    scenario: Scenario
    shape: Shape
    # Whether it runs with the other tests.
    is_quick: bool
    # Whether this machine has what it takes.
    needs: Callable[[], bool]
    # Whether it demands times that only an undisturbed machine keeps, so that nothing else may run beside it.
    is_timed: bool
    # More seeds than these would only cost time.
    max_seeds: int | None


@dataclass(frozen=True, slots=True)
class Result:
    """One run of a row that kept its promise."""

    seed: int
    num_streams: int
    num_tokens: int
    evidence: Evidence


def row(
    number: str,
    fault: str,
    promise: str,
    *,
    shape: Shape | None = None,
    is_quick: bool = False,
    needs: Callable[[], bool] = lambda: True,
    is_timed: bool = False,
    max_seeds: int | None = None,
) -> Callable[[Scenario], Row]:
    """The scenario is the proof of this row."""
    return lambda scenario: Row(
        number, fault, promise, scenario, shape or Shape(), is_quick, needs, is_timed, max_seeds
    )


async def run_row(row: Row, seed: int, *, keep_failed_in: Path | None = None, packages: Path | None = None) -> Result:
    """The row's promise held in a world of its own; whatever is left to chance follows from the seed.

    Logs and history of a run that failed are kept in a folder named after row and seed. `packages` stand in for ours.

    Raises:
        AssertionError: if the promise was broken.
    """
    # Not pytest's folder: the path of a unix socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = Path(temporary)
        try:
            shape = replace(row.shape, packages=packages)
            async with World.open(folder, shape, random.Random(f"{row.number} {seed}")) as world:
                evidence = await row.scenario(world)
        except BaseException:
            if keep_failed_in is not None:
                _keep(folder, keep_failed_in / f"row-{row.number}-seed-{seed}")
            raise
        transcripts = world.load.transcripts
        return Result(seed, len(transcripts), world.load.num_tokens_seen, evidence)


def _keep(folder: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix in {".log", ".jsonl", ".ledger"}:
            (target / file.name).write_bytes(file.read_bytes())
