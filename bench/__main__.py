"""`python -m bench [PART ...]`: runs the measurements and prints their tables; `--json FILE` keeps the figures."""

import argparse
import dataclasses
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from bench.checkpoints import DEMO, random_checkpoint
from bench.engine import OURS, EngineRow, measure_engine
from bench.gateway import FloodRow, GatewayRow, measure_flood, measure_gateway
from bench.path import PathRow, measure_path
from bench.queue import QueueFigures, measure_queue
from bench.start import StartRow, measure_start
from bench.training import OURS as OUR_TRAINER
from bench.training import THEIRS as THEIR_TRAINER
from bench.training import TRAINED_SHAPES, TrainingRow, measure_training

PARTS = ("engine", "path", "gateway", "queue", "start", "training")
# Streams, tokens of each, seconds between two tokens: one message a token, then as fast as it goes.
GATEWAY_LOADS = ((64, 400, 0.025), (256, 200, 0.1), (64, 400, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; all of it by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--waiting", type=int, nargs="+", default=[1_000, 100_000], help="jobs that wait, for queue")
    parser.add_argument("--training-steps", type=int, default=12)
    parser.add_argument("--json", type=Path, help="also writes the figures to this file")
    options = parser.parse_args()

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=110)
    console.print(_machine())
    figures: dict[str, Any] = {"machine": _machine()}
    with tempfile.TemporaryDirectory(prefix="oasst-bench-") as folder:
        checkpoints = {"demo": DEMO, "160m": random_checkpoint("160m", Path(folder))}
        lengths = {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "rounds": options.rounds}
        for part in options.parts or PARTS:
            rows: list[Any]
            if part == "engine":
                rows = [
                    row
                    for name, path in checkpoints.items()
                    for row in measure_engine(name, path, options.concurrent, **lengths)
                ]
                console.print(_engine_table(rows))
            elif part == "path":
                streams = max(options.concurrent)
                rows = [measure_path(name, path, streams=streams, **lengths) for name, path in checkpoints.items()]
                console.print(_path_table(rows))
            elif part == "gateway":
                rows = [measure_gateway(*load) for load in GATEWAY_LOADS]
                console.print(_gateway_table(rows))
                flood = measure_flood(10_000, max_waiting=100)
                console.print(_flood_table(flood))
                rows.append(flood)
            elif part == "queue":
                waiting = tuple(options.waiting)
                rows = [measure_queue(streams=(1, 8, 32, 128), waiting_jobs=waiting, rounds=options.rounds)]
                console.print(_queue_table(rows[0]))
            elif part == "training":
                rows = [
                    measure_training(shape, steps=options.training_steps, rounds=options.rounds)
                    for shape in TRAINED_SHAPES
                ]
                console.print(_training_table(rows))
            else:
                rows = [measure_start(options.rounds)]
                console.print(_start_table(rows[0]))
            figures[part] = [dataclasses.asdict(row) for row in rows]
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def _machine() -> str:
    return (
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads;"
        f" Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _engine_table(rows: list[EngineRow]) -> Table:
    peers = [system for system in rows[0].tokens_per_s if system != OURS]
    table = Table(title="Engine alone: generated tokens per second, fp32, greedy, prefill included")
    for heading in ("checkpoint", "concurrent", OURS, *peers):
        table.add_column(heading, justify="right")
    for peer in peers:
        table.add_column(f"ratio to {peer.removeprefix('transformers ')}", justify="right")
    table.add_column("same tokens", justify="right")
    for row in rows:
        table.add_row(
            row.checkpoint,
            str(row.concurrent),
            *(f"{row.tokens_per_s[system]:.0f}" for system in (OURS, *peers)),
            *(f"{row.ratio(peer):.2f}" for peer in peers),
            f"{min(row.same_tokens.values()):.1%}",
        )
    return table


def _path_table(rows: list[PathRow]) -> Table:
    table = Table(title="Whole path against engine alone: tokens per second, and time to the first token of one stream")
    for heading in ("checkpoint", "streams", "path", "engine", "ratio", "path first", "engine first", "same tokens"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.checkpoint,
            str(row.streams),
            f"{row.path_tokens_per_s:.0f}",
            f"{row.engine_tokens_per_s:.0f}",
            f"{row.ratio:.2f}",
            f"{row.path_first_token_s * 1e3:.1f} ms",
            f"{row.engine_first_token_s * 1e3:.1f} ms",
            "yes" if row.same_tokens else "NO",
        )
    return table


def _gateway_table(rows: list[GatewayRow]) -> Table:
    table = Table(title="Processor time of a gateway for each streamed message, beside a bare gRPC server's")
    for heading in ("streams", "step", "tokens/s", "messages/token", "us/message", "bare us/message", "us/token"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.streams),
            f"{row.step_ms:g} ms",
            f"{row.tokens_per_s:.0f}",
            f"{row.messages_per_token:.2f}",
            f"{row.cpu_us_per_message:.1f}",
            f"{row.bare_us_per_message:.1f}",
            f"{row.cpu_us_per_token:.1f}",
        )
    return table


def _flood_table(row: FloodRow) -> Table:
    table = Table(title="A flood of requests into a queue that takes a hundred")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("requests, and the seconds in which they were sent", f"{row.requests} in {row.sent_in_s:.1f} s")
    table.add_row("accepted", str(row.accepted))
    table.add_row("refused by the gateway", str(row.refused))
    table.add_row("turned away by gRPC's limit on streams", str(row.turned_away))
    table.add_row(
        "from sending to refusal, median and 99 %", f"{row.refusal_p50_ms:.0f} and {row.refusal_p99_ms:.0f} ms"
    )
    table.add_row("processor time of the gateway for each", f"{row.cpu_us_per_request:.0f} us")
    return table


def _start_table(row: StartRow) -> Table:
    table = Table(title="Start on the demo checkpoint, warm environment")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("`oasst up --chat` to the first token", f"{row.first_token_s:.1f} s")
    table.add_row("from there to everything stopped", f"{row.stopped_s:.1f} s")
    for process, mib in row.resident_mib.items():
        table.add_row(f"resident memory of {process}", f"{mib:.0f} MiB")
    return table


def _queue_table(figures: QueueFigures) -> Table:
    table = Table(title=f"Queue alone on {figures.server}, append-only file synced every second")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for push in figures.pushes:
        table.add_row(f"server per token, {push.streams} streams", f"{push.server_us_per_token:.1f} us")
        table.add_row(f"worker per token, {push.streams} streams", f"{push.worker_us_per_token:.1f} us")
    for claim in figures.claims:
        table.add_row(f"claim, {claim.waiting_jobs:,} jobs waiting", f"{claim.claim_us:.0f} us")
        table.add_row(f"submit, {claim.waiting_jobs:,} jobs waiting", f"{claim.submit_us:.0f} us")
    table.add_row("memory of a waiting job of 128 tokens", f"{figures.memory.bytes_per_waiting_job:.0f} bytes")
    table.add_row("memory of a logged token", f"{figures.memory.bytes_per_logged_token:.0f} bytes")
    for name, value_ms in figures.claimed_after_ms.items():
        table.add_row(f"submit to claim by an idle worker, {name}", f"{value_ms:.1f} ms")
    return table


def _training_table(rows: list[TrainingRow]) -> Table:
    table = Table(title="Training: tokens per second without padding, fp32; most memory of the process")
    for heading in ("shape", OUR_TRAINER, THEIR_TRAINER, "ratio", "memory", "their memory"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.shape,
            f"{row.tokens_per_s[OUR_TRAINER]:.0f}",
            f"{row.tokens_per_s[THEIR_TRAINER]:.0f}",
            f"{row.ratio:.2f}",
            f"{row.peak_mib[OUR_TRAINER]:.0f} MiB",
            f"{row.peak_mib[THEIR_TRAINER]:.0f} MiB",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
