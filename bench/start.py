"""From the command to the first answer, and what the processes hold in memory."""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil
from rich.table import Table

from bench.checkpoints import DEMO
from bench.options import Measured, Options
from bench.services import running_stack

__all__ = ["StartRow", "measure", "start_table"]


@dataclass(frozen=True)
class StartRow:
    first_token_s: float  # From `oasst up --chat` to the first character of its first answer.
    stopped_s: float  # From there to the end of the process, all children stopped.
    resident_mib: dict[str, float]  # By process, idle on the demo checkpoint.


def measure(options: Options) -> Measured:
    row = _measure(options.rounds)
    return [row], [start_table(row)]


def _measure(rounds: int) -> StartRow:
    first_tokens, stops = [], []
    for _ in range(rounds):
        first, stopped = _start_once()
        first_tokens.append(first)
        stops.append(stopped)
    with running_stack(DEMO) as stack:
        resident = {
            process["name"]: psutil.Process(process["pid"]).memory_info().rss / 2**20 for process in stack["processes"]
        }
    return StartRow(statistics.median(first_tokens), statistics.median(stops), resident)


def start_table(row: StartRow) -> Table:
    table = Table(title="Start on the demo checkpoint, warm environment")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("`oasst up --chat` to the first token", f"{row.first_token_s:.1f} s")
    table.add_row("from there to everything stopped", f"{row.stopped_s:.1f} s")
    for process, mib in row.resident_mib.items():
        table.add_row(f"resident memory of {process}", f"{mib:.0f} MiB")
    return table


def _start_once() -> tuple[float, float]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "oasst_cli", "up", "--chat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        if not process.stdin or not process.stdout:
            raise RuntimeError("the process has no pipes")
        process.stdin.write(b"What is a meme?\n")
        process.stdin.close()
        if not process.stdout.read(1):
            raise RuntimeError("the stack gave no answer")
        first = time.perf_counter()
        process.stdout.read()
        process.wait()
        return first - start, time.perf_counter() - first
