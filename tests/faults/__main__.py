"""Runs rows of the fault table with many seeds, then rows without the guards they rest on, and prints both tables.

Several worlds run at once. Each outcome is written to the record as it comes; `--resume` goes on behind them.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from faults.load import FaultMissedError
from faults.mutations import MUTATIONS, Mutation, mutate
from faults.report import MutationSummary, Summary, mutation_table, table_of
from faults.rows import ROWS
from faults.runs import Outcome, Record, Run, run_all, run_until_met, runs_of
from faults.table import Row

_FAILED = Path("build/faults")
_RECORD = _FAILED / "record.jsonl"
# A world waits more than it computes.
_WORLDS_PER_CORE = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--rows", nargs="*", help="numbers of rows; all, and the mutations, by default")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds each row runs with")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=_default_jobs(), help="how many worlds run at once")
    parser.add_argument("--resume", action="store_true", help="leaves out what the record of the last time has")
    parser.add_argument("--mutations", action="store_true", help="also runs the mutations when rows are named")
    parser.add_argument("--markdown", type=Path, help="also writes the tables to this file")
    options = parser.parse_args()
    if unknown := set(options.rows or ()) - {row.number for row in ROWS}:
        parser.error(f"there is no row {', '.join(sorted(unknown))}")

    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}, at least one world has to run")

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    chosen = [row for row in ROWS if not options.rows or row.number in options.rows]
    summaries = _run(chosen, seeds, jobs=options.jobs, resume=options.resume)
    tables = [table_of(summaries)] if summaries else []
    mutants: list[MutationSummary] = []
    if options.mutations or not options.rows:
        mutants = run_mutants(MUTATIONS, seeds)
        tables.append(mutation_table(mutants))
    text = "\n\n".join(tables)
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text + "\n")
    return int(any(summary.failures for summary in summaries) or any(mutant.survived for mutant in mutants))


def _default_jobs() -> int:
    return _WORLDS_PER_CORE * len(os.sched_getaffinity(0))


def _run(rows: Sequence[Row], seeds: Sequence[int], *, jobs: int, resume: bool) -> list[Summary]:
    """Each row with each seed; what broke is kept under `build/faults`."""
    summaries = {row.number: Summary(row) for row in rows}
    record = Record(_RECORD)
    known: dict[Run, Outcome] = {}
    if resume:
        known = {outcome.run: outcome for outcome in record.resume()}
    else:
        record.begin()
    possible = [row for row in rows if row.needs()]
    for row in rows:
        if row not in possible:
            _tell(f"row {row.number} is left out: this machine does not have what it takes")
    wanted = runs_of(possible, seeds)
    for run in wanted:
        if run in known:
            summaries[run.row].add(known[run])
    missing = [run for run in wanted if run not in known]
    for num_done, outcome in enumerate(run_all(missing, jobs=jobs, keep_failed_in=_FAILED), 1):
        record.add(outcome)
        summaries[outcome.run.row].add(outcome)
        _tell(f"{num_done}/{len(missing)} {outcome}")
    return list(summaries.values())


def run_mutants(mutations: Sequence[Mutation], seeds: Sequence[int]) -> list[MutationSummary]:
    """Each row whose guard is taken out, until it breaks."""
    mutants = []
    for mutation in mutations:
        mutant = MutationSummary(mutation)
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            packages = mutate(mutation, Path(folder))
            for seed in seeds:
                try:
                    asyncio.run(run_until_met(mutation.row, seed, [], packages=packages))
                except FaultMissedError:
                    continue  # The row did not get to where its guard is missing.
                except AssertionError as error:
                    mutant.defect = str(error)
                mutant.num_runs += 1
                if not mutant.survived:
                    break
        _tell(f"without {mutation.guard}: row {mutation.row.number} says: {mutant.defect or 'nothing'}")
        mutants.append(mutant)
    return mutants


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
