"""`python -m bench [PART ...]`: runs the measurements and prints their tables; `--json FILE` keeps the figures.

Only what the parts need is imported, and made: the queue is measured without a checkpoint.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.options import Measured, Options

# Each part is a module with a `measure(options)`; these are the options that it reads.
PARTS: dict[str, tuple[str, ...]] = {
    "engine": ("rounds", "prompt_tokens", "new_tokens", "concurrent"),
    "profile": ("rounds", "prompt_tokens", "concurrent"),
    "agreement": ("prompt_tokens", "new_tokens"),
    "prefix": ("rounds", "prefix_tokens"),
    "interference": ("rounds", "concurrent"),
    "speculation": ("rounds", "answers"),
    "path": ("rounds", "prompt_tokens", "new_tokens", "concurrent"),
    "gateway": ("rounds",),
    "flood": ("rounds",),
    "share": ("rounds",),
    "goodput": ("rounds",),
    "queue": ("rounds", "waiting"),
    "scoring": ("rounds", "prompt_tokens"),
    "shards": ("rounds", "prompt_tokens", "concurrent"),
    "start": ("rounds",),
    "loading": ("rounds",),
    "client": ("rounds",),
    "training": ("rounds", "training_steps"),
    "evals": ("rounds",),
}


def parse(arguments: Sequence[str] | None = None) -> tuple[list[str], dict[str, Any], Path | None]:
    """The parts, the options that were given, and the file for the figures. An option that no part reads is refused."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0] if __doc__ else "")
    about_parts = f"{', '.join(PARTS)}; all of them by default, speculation only with --answers"
    parser.add_argument("parts", nargs="*", metavar="PART", help=about_parts)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes the figures to this file")
    for name, about, settings in (
        ("rounds", "rounds of each measurement", {"type": int}),
        ("prompt_tokens", "tokens in a prompt or a context", {"type": int}),
        ("new_tokens", "tokens to generate for each prompt", {"type": int}),
        ("prefix_tokens", "tokens in a prompt that is used again", {"type": int}),
        ("concurrent", "sequences at once, each number in turn; path takes the largest", {"type": int, "nargs": "+"}),
        ("waiting", "jobs that wait in the queue, each number in turn", {"type": int, "nargs": "+"}),
        ("training_steps", "steps that each system trains", {"type": int}),
        ("answers", "a sampling report of oasst-model-eval, whose answers are guessed", {"type": Path}),
    ):
        readers = ", ".join(part for part, read in PARTS.items() if name in read)
        about = f"{about} ({'all but agreement' if name == 'rounds' else readers}){_default(name)}"
        option, kind = f"--{name.replace('_', '-')}", "FILE" if settings["type"] is Path else "N"
        parser.add_argument(option, default=None, metavar=kind, help=about, **settings)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    parts, json_file = given.pop("parts"), given.pop("json", None)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not parts:  # All there is something to measure with.
        parts = [part for part in PARTS if part != "speculation" or "answers" in given]
    for name in given:
        if not any(name in PARTS[part] for part in parts):
            parser.error(f"--{name.replace('_', '-')} is read by none of these parts: {', '.join(parts)}")
    return parts, given, json_file


def _default(name: str) -> str:
    default = getattr(Options, name)
    values = default if isinstance(default, tuple) else (default,)
    return "" if default is None else f"; {' '.join(map(str, values))} by default"


def main() -> None:
    parts, given, json_file = parse()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    console = Console(width=140)
    console.print(_machine())
    figures: dict[str, Any] = {"machine": _machine()}
    with tempfile.TemporaryDirectory(prefix="oasst-bench-") as folder:
        options = Options(Path(folder), **given)
        for part in parts:
            rows, tables = _measure(part, options)
            console.print(*tables, sep="\n")
            figures[part] = [dataclasses.asdict(row) for row in rows]
    if json_file:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def _measure(part: str, options: Options) -> Measured:
    measured: Measured = importlib.import_module(f"bench.{part}").measure(options)
    return measured


def _machine() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return (
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads;"
        f" Python {platform.python_version()}, {versions}"
    )


if __name__ == "__main__":
    sys.exit(main())
