"""The whole path (client, gateway, queue, worker) against the engine alone, same checkpoint, prompts and tokens."""

import asyncio
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oasst_client import AsyncClient
from oasst_worker.engine import EngineConfig
from oasst_worker.model.config import load_config
from oasst_worker.runtime import ModelRunner, RuntimeOptions, build_executor
from rich.table import Table
from tokenizers import Tokenizer

from bench.checkpoints import DEMO, random_prompts
from bench.engine import generate_greedily

__all__ = ["PathRow", "complete_with_demo_tokenizer", "measure_path", "path_table", "running_stack"]

MODEL_NAME = "measured"


@dataclass(frozen=True)
class PathRow:
    checkpoint: str
    streams: int
    path_tokens_per_s: float
    engine_tokens_per_s: float
    path_first_token_s: float  # Of one stream on an idle stack.
    engine_first_token_s: float
    same_tokens: bool

    @property
    def ratio(self) -> float:
        return self.path_tokens_per_s / self.engine_tokens_per_s


@contextmanager
def running_stack(model: Path, **environment: str) -> Iterator[dict[str, Any]]:
    """`oasst up` serves this model, its environment ours and this; what it says of itself."""
    command = [sys.executable, "-m", "oasst_cli", "up", "--json", "--listen", "127.0.0.1:0", "--model", str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise RuntimeError(f"the stack did not start: exit code {process.wait()}")
            yield json.loads(line)
        finally:
            process.terminate()
            process.wait()


def measure_path(name: str, folder: Path, *, streams: int, prompt_tokens: int, new_tokens: int, rounds: int) -> PathRow:
    """`folder` needs no tokenizer of its own: the demo's stands in, and both sides draw only tokens it knows."""
    complete_with_demo_tokenizer(folder)
    tokenizer_size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    config = load_config(folder)
    banned = _never_drawn(folder, config.vocab_size)
    runner = build_executor(
        folder, RuntimeOptions(device="cpu", dtype="float32", max_sequences=streams), banned_token_ids=banned
    )

    seeds = itertools.count()

    def new_prompts(number: int) -> list[list[int]]:
        """Never the same twice: the worker would use again what it computed before."""
        return random_prompts(number, prompt_tokens, tokenizer_size, seed=next(seeds))

    times: dict[str, list[float]] = {"path": [], "engine": [], "path first": [], "engine first": []}
    with running_stack(folder, OASST_WORKER_SPECULATE="0") as stack:  # Nor does the engine guess.
        address = stack["addresses"][0]
        warm_up = new_prompts(streams)
        asyncio.run(_through_the_path(address, warm_up, 4))
        _through_the_engine(runner, warm_up, 4, config.max_positions)
        for _ in range(rounds):
            prompts = new_prompts(streams)
            path_tokens, seconds, _ = asyncio.run(_through_the_path(address, prompts, new_tokens))
            times["path"].append(seconds)
            engine_tokens, seconds, _ = _through_the_engine(runner, prompts, new_tokens, config.max_positions)
            times["engine"].append(seconds)
            for _ in range(5):
                prompt = new_prompts(1)
                _, _, first = asyncio.run(_through_the_path(address, prompt, 2))
                times["path first"].append(first)
                _, _, first = _through_the_engine(runner, prompt, 2, config.max_positions)
                times["engine first"].append(first)
    median = {key: statistics.median(values) for key, values in times.items()}
    num_tokens = streams * new_tokens
    return PathRow(
        name,
        streams,
        num_tokens / median["path"],
        num_tokens / median["engine"],
        median["path first"],
        median["engine first"],
        path_tokens == engine_tokens,
    )


def path_table(rows: list[PathRow]) -> Table:
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


async def _through_the_path(
    address: str, prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], float, float]:
    """Tokens, seconds for all of them, seconds to the first one."""
    async with AsyncClient(address) as client:
        await client.models()  # The connection is up.
        start = time.perf_counter()
        first: list[float] = []

        async def one(prompt: list[int]) -> list[int]:
            async with client.stream(
                token_ids=prompt, temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True
            ) as stream:
                async for event in stream.events():
                    if not first and getattr(event, "token_ids", None):
                        first.append(time.perf_counter() - start)
                return list((await stream.completion()).token_ids)

        tokens = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return list(tokens), time.perf_counter() - start, first[0]


def _through_the_engine(
    runner: ModelRunner, prompts: list[list[int]], new_tokens: int, max_positions: int
) -> tuple[list[list[int]], float, float]:
    """Tokens, seconds for all of them, seconds to the first one."""
    start = time.perf_counter()
    config = EngineConfig(eos_token_id=0, max_positions=max_positions, max_sequences=len(prompts))
    tokens, first_s = generate_greedily(runner, config, prompts, new_tokens)
    return tokens, time.perf_counter() - start, first_s


def _never_drawn(folder: Path, vocab_size: int) -> list[int]:
    """Padding rows and control tokens, as the worker bans them."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    control = [token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    return [*(id_ for id_ in control if id_ != 0), *range(tokenizer.get_vocab_size(), vocab_size)]


def complete_with_demo_tokenizer(folder: Path) -> None:
    """`folder` has a tokenizer: the demo's, where it had none."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if not (folder / name).exists():
            shutil.copy(DEMO / name, folder / name)
