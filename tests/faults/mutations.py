"""The guards that keep the promises, each taken out in turn: a row must then break, or it proves nothing."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import oasst_jobs
import oasst_worker

from faults.rows import network, queue, shards, workers
from faults.table import Row

__all__ = ["MUTATIONS", "Mutation", "mutate"]


@dataclass(frozen=True, slots=True)
class Mutation:
    """One guard, and the row that breaks without it."""

    guard: str
    row: Row
    # What stands in the code, and what comes in its place.
    original: str
    mutated: str
    # Where it stands.
    package: ModuleType = oasst_jobs
    file: str = "functions.lua"


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
    Mutation(
        "a push of its own for each shard",
        shards.one_is_away,
        "for shard, of_shard in jobs.items() if shard not in self._pushing}",
        "for shard, of_shard in jobs.items() if not self._pushing}",
        package=oasst_worker,
        file="pushing.py",
    ),
)


def mutate(mutation: Mutation, folder: Path) -> Path:
    """`folder` holds the guard's package without it.

    Raises:
        ValueError: if the guard is not where it was.
    """
    original = Path(mutation.package.__path__[0])
    copy = shutil.copytree(original, folder / original.name, ignore=shutil.ignore_patterns("__pycache__"))
    file = copy / mutation.file
    text = file.read_text()
    if text.count(mutation.original) != 1:
        raise ValueError(f"the guard {mutation.guard!r} is not once in {mutation.file}")
    file.write_text(text.replace(mutation.original, mutation.mutated))
    return folder
