"""`python -m bench [PART ...]`: runs the measurements and prints their tables; `--json FILE` keeps the figures."""

import argparse
import dataclasses
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from bench.agreement import agreement_table, measure_agreement
from bench.checkpoints import DEMO, random_checkpoint
from bench.client import client_table, measure_client
from bench.engine import engine_table, measure_engine
from bench.evals import evals_table, measure_evals
from bench.gateway import flood_table, gateway_table, measure_bare_flood, measure_flood, measure_gateway
from bench.goodput import goodput_table, measure_goodput, measure_share, share_table
from bench.interference import interference_table, measure_interference
from bench.loading import loading_table, measure_loading
from bench.path import measure_path, path_table
from bench.prefix import measure_prefix, prefix_table
from bench.profile import measure_profile, measure_roofline, profile_table, roofline_table
from bench.queue import measure_queue, queue_table
from bench.scoring import measure_scoring, scoring_table
from bench.shards import measure_shards, shards_table
from bench.speculation import measure_speculation, read_chats, speculation_table
from bench.start import measure_start, start_table
from bench.training import TRAINED_SHAPES, measure_training, training_table

# Requests to score, as many as a checkpoint does in seconds.
EVALUATED = {"demo": 64, "160m": 16}

# Streams, tokens of each, seconds between two tokens: one message a token, then as fast as it goes.
GATEWAY_LOADS = ((64, 400, 0.025), (256, 200, 0.1), (64, 400, 0.0))

# Streams, seconds of a step, tokens of each stream.
SHARED_LOADS = ((1, 0.01, 400), (64, 0.025, 200), (256, 0.05, 200))
# Multiples of what a worker can do.
OVERLOADS = (0.5, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Options:
    """What the command line asks for, and the checkpoints to measure with."""

    checkpoints: dict[str, Path]
    rounds: int
    prompt_tokens: int
    new_tokens: int
    concurrent: list[int]
    waiting: list[int]
    training_steps: int
    answers: Path | None

    @property
    def lengths(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "rounds": self.rounds}


# Rows to keep as JSON, and the tables that show them.
Measured = tuple[Sequence[Any], Sequence[Table]]


def _engine(options: Options) -> Measured:
    measured = (
        measure_engine(name, path, options.concurrent, **options.lengths) for name, path in options.checkpoints.items()
    )
    rows = [row for rows in measured for row in rows]
    return rows, [engine_table(rows)]


def _profile(options: Options) -> Measured:
    roofline = measure_roofline()
    rows = [
        row
        for name, path in options.checkpoints.items()
        for row in measure_profile(name, path, roofline, options.concurrent, context=options.prompt_tokens)
    ]
    return [roofline, *rows], [roofline_table(roofline), profile_table(rows)]


def _agreement(options: Options) -> Measured:
    rows = [
        row
        for name, path in options.checkpoints.items()
        for row in measure_agreement(
            name, path, prompt_tokens=options.prompt_tokens, new_tokens=min(options.new_tokens, 64)
        )
    ]
    return rows, [agreement_table(rows)]


def _prefix(options: Options) -> Measured:
    rows = [
        measure_prefix(name, path, prompts=4, prompt_tokens=4 * options.prompt_tokens, rounds=options.rounds)
        for name, path in options.checkpoints.items()
    ]
    return rows, [prefix_table(rows)]


def _speculation(options: Options) -> Measured:
    if options.answers is None:
        raise SystemExit("speculation is measured on recorded answers: --answers FILE, a report of oasst-model-eval")
    chats = read_chats(options.answers)
    measured = (
        measure_speculation(name, path, chats, rounds=options.rounds) for name, path in options.checkpoints.items()
    )
    rows = [row for rows in measured for row in rows]
    return rows, [speculation_table(rows)]


def _interference(options: Options) -> Measured:
    rows = measure_interference("160m", options.checkpoints["160m"], options.concurrent, rounds=options.rounds)
    return rows, [interference_table(rows)]


def _path(options: Options) -> Measured:
    streams = max(options.concurrent)
    rows = [measure_path(name, path, streams=streams, **options.lengths) for name, path in options.checkpoints.items()]
    return rows, [path_table(rows)]


def _gateway(options: Options) -> Measured:
    rows = [measure_gateway(*load) for load in GATEWAY_LOADS]
    return rows, [gateway_table(rows)]


def _flood(options: Options) -> Measured:
    row, bare = measure_flood(10_000, max_waiting=100), measure_bare_flood(10_000)
    return [row, bare], [flood_table(row, bare)]


def _share(options: Options) -> Measured:
    rows = [measure_share(streams, step_s=step_s, tokens=tokens) for streams, step_s, tokens in SHARED_LOADS]
    return rows, [share_table(rows)]


def _goodput(options: Options) -> Measured:
    rows = measure_goodput(OVERLOADS)
    return rows, [goodput_table(rows)]


def _queue(options: Options) -> Measured:
    figures = measure_queue(streams=(1, 8, 32, 128), waiting_jobs=tuple(options.waiting), rounds=options.rounds)
    return [figures], [queue_table(figures)]


def _scoring(options: Options) -> Measured:
    measured = (
        measure_scoring(name, path, context_tokens=options.prompt_tokens, rounds=options.rounds)
        for name, path in options.checkpoints.items()
    )
    rows = [row for rows in measured for row in rows]
    return rows, [scoring_table(rows)]


def _shards(options: Options) -> Measured:
    measured = (
        measure_shards(name, path, options.concurrent, context=options.prompt_tokens, rounds=options.rounds)
        for name, path in options.checkpoints.items()
    )
    rows = [row for rows in measured for row in rows]
    return rows, [shards_table(rows)]


def _start(options: Options) -> Measured:
    row = measure_start(options.rounds)
    return [row], [start_table(row)]


def _loading(options: Options) -> Measured:
    with tempfile.TemporaryDirectory(prefix="oasst-bench-") as folder:
        rows = measure_loading(random_checkpoint("1b", Path(folder), dtype=torch.bfloat16), options.rounds)
    return rows, [loading_table(rows)]


def _client(options: Options) -> Measured:
    row = measure_client(options.rounds)
    return [row], [client_table(row)]


def _training(options: Options) -> Measured:
    rows = [measure_training(shape, steps=options.training_steps, rounds=options.rounds) for shape in TRAINED_SHAPES]
    return rows, [training_table(rows)]


def _evals(options: Options) -> Measured:
    rows = [
        row
        for name, path in options.checkpoints.items()
        for row in measure_evals(name, path, num_requests=EVALUATED[name], rounds=options.rounds)
    ]
    return rows, [evals_table(rows)]


PARTS: dict[str, Callable[[Options], Measured]] = {
    "engine": _engine,
    "profile": _profile,
    "agreement": _agreement,
    "prefix": _prefix,
    "interference": _interference,
    "speculation": _speculation,
    "path": _path,
    "gateway": _gateway,
    "flood": _flood,
    "share": _share,
    "goodput": _goodput,
    "queue": _queue,
    "scoring": _scoring,
    "shards": _shards,
    "start": _start,
    "loading": _loading,
    "client": _client,
    "training": _training,
    "evals": _evals,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; all of it by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--waiting", type=int, nargs="+", default=[1_000, 100_000], help="jobs that wait, for queue")
    parser.add_argument("--training-steps", type=int, default=12)
    parser.add_argument("--answers", type=Path, help="a sampling report of oasst-model-eval, for speculation")
    parser.add_argument("--json", type=Path, help="also writes the figures to this file")
    arguments = vars(parser.parse_args())
    parts, json_file = arguments.pop("parts"), arguments.pop("json")
    if not parts:  # All there is something to measure with.
        parts = [part for part in PARTS if part != "speculation" or arguments["answers"]]

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=110)
    console.print(_machine())
    figures: dict[str, Any] = {"machine": _machine()}
    with tempfile.TemporaryDirectory(prefix="oasst-bench-") as folder:
        checkpoints = {"demo": DEMO, "160m": random_checkpoint("160m", Path(folder))}
        options = Options(checkpoints, **arguments)
        for part in parts:
            rows, tables = PARTS[part](options)
            console.print(*tables, sep="\n")
            figures[part] = [dataclasses.asdict(row) for row in rows]
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def _machine() -> str:
    return (
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads;"
        f" Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    sys.exit(main())
