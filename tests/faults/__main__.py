"""Runs rows of the fault table with many seeds, then rows without the guards they rest on, and prints both tables."""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from faults.mutations import MUTATIONS, mutate
from faults.report import MutationSummary, Summary, mutation_table, table_of
from faults.rows import ROWS
from faults.table import Row, run_row

_FAILED = Path("build/faults")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--rows", nargs="*", help="numbers of rows; all, and the mutations, by default")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds each row runs with")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--mutations", action="store_true", help="also runs the mutations when rows are named")
    parser.add_argument("--markdown", type=Path, help="also writes the tables to this file")
    options = parser.parse_args()
    if unknown := set(options.rows or ()) - {row.number for row in ROWS}:
        parser.error(f"there is no row {', '.join(sorted(unknown))}")

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    chosen = [row for row in ROWS if not options.rows or row.number in options.rows]
    summaries = [_run(row, seeds) for row in chosen]
    tables = [table_of(summaries)] if summaries else []
    mutants: list[MutationSummary] = []
    if options.mutations or not options.rows:
        mutants = _run_mutants(seeds)
        tables.append(mutation_table(mutants))
    text = "\n\n".join(tables)
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text + "\n")
    return int(any(summary.failures for summary in summaries) or any(mutant.survived for mutant in mutants))


def _run(row: Row, seeds: Sequence[int]) -> Summary:
    """The row with each seed; what broke is kept under `build/faults`."""
    summary = Summary(row)
    if not row.needs():
        _tell(f"row {row.number} is left out: this machine does not have what it takes")
        return summary
    for seed in seeds[: row.max_seeds]:
        started_s = time.monotonic()
        try:
            summary.results.append(asyncio.run(run_row(row, seed, keep_failed_in=_FAILED)))
            verdict = "held"
        except Exception as error:
            summary.failures.append((seed, f"{type(error).__name__}: {error}"))
            verdict = f"BROKEN {summary.failures[-1][1]}"
        _tell(f"row {row.number} seed {seed} {time.monotonic() - started_s:.1f} s {verdict}")
    return summary


def _run_mutants(seeds: Sequence[int]) -> list[MutationSummary]:
    """Each row whose guard is taken out, until it breaks."""
    mutants = []
    for mutation in MUTATIONS:
        mutant = MutationSummary(mutation)
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            packages = mutate(mutation, Path(folder))
            while mutant.survived and mutant.num_runs < len(seeds):
                mutant.num_runs += 1
                try:
                    asyncio.run(run_row(mutation.row, seeds[mutant.num_runs - 1], packages=packages))
                except AssertionError as error:
                    mutant.defect = str(error)
        _tell(f"without {mutation.guard}: row {mutation.row.number} says: {mutant.defect or 'nothing'}")
        mutants.append(mutant)
    return mutants


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
