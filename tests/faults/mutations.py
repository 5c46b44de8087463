"""The guards that keep the promises, each taken out in turn: a row must then break, or it proves nothing."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import oasst_jobs

from faults.rows import network, queue, workers
from faults.table import Row

__all__ = ["MUTATIONS", "Mutation", "mutate"]


@dataclass(frozen=True, slots=True)
class Mutation:
    """One guard in `functions.lua`, and the row that breaks without it."""

    guard: str
    row: Row
    # What stands in the code, and what comes in its place.
    original: str
    mutated: str


MUTATIONS = (
    Mutation("the fence", workers.zombie_returns, "job.fence ~= fence", "false"),
    Mutation(
        "the position of a push",
        network.connections_to_the_queue_break,
        "if job.state == 'running' and job.end_position == start then",
        "if job.state == 'running' then",
    ),
    Mutation(
        "the amnesty after a stall",
        queue.hangs_for_longer_than_a_lease,
        "for _, id in ipairs(ids) do\n    set_lease(",
        "for _, id in ipairs({}) do\n    set_lease(",
    ),
)


def mutate(mutation: Mutation, folder: Path) -> Path:
    """`folder` holds the package of the queue without this guard.

    Raises:
        ValueError: if the guard is not where it was.
    """
    original = Path(oasst_jobs.__file__).parent
    copy = shutil.copytree(original, folder / original.name, ignore=shutil.ignore_patterns("__pycache__"))
    functions = copy / "functions.lua"
    text = functions.read_text()
    if text.count(mutation.original) != 1:
        raise ValueError(f"the guard {mutation.guard!r} is not once in functions.lua")
    functions.write_text(text.replace(mutation.original, mutation.mutated))
    return folder
