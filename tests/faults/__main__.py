"""Runs rows of the fault table with many seeds and prints the table."""

import argparse
import asyncio
import sys
import time
import traceback
from pathlib import Path

from faults.report import Summary, table_of
from faults.rows import ROWS
from faults.table import run_row

_FAILED = Path("build/faults")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--rows", nargs="*", help="numbers of rows; all by default")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds each row runs with")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="also writes the table to this file")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.rows or row.number in options.rows]
    if unknown := set(options.rows or ()) - {row.number for row in rows}:
        parser.error(f"there is no row {', '.join(sorted(unknown))}")

    summaries = []
    for row in rows:
        summary = Summary(row)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            started_s = time.monotonic()
            try:
                summary.results.append(asyncio.run(run_row(row, seed, keep_failed_in=_FAILED)))
                verdict = "held"
            except Exception as error:
                summary.failures.append((seed, f"{type(error).__name__}: {error}"))
                verdict = f"BROKEN {traceback.format_exception_only(error)[-1].strip()}"
            elapsed_s = time.monotonic() - started_s
            print(f"row {row.number} seed {seed} {elapsed_s:.1f} s {verdict}", file=sys.stderr, flush=True)
        summaries.append(summary)
    table = table_of(summaries)
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n")
    return int(any(summary.failures for summary in summaries))


if __name__ == "__main__":
    sys.exit(main())
