"""The whole path (client, gateway, queue, worker) against the engine alone, same checkpoint, prompts and tokens."""

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oasst_client import AsyncClient
from oasst_worker.engine import EngineConfig
from oasst_worker.model.config import load_config
from oasst_worker.runtime import ModelRunner, RuntimeOptions, build_executor
from rich.table import Table
from tokenizers import Tokenizer

from bench.checkpoints import complete_with_demo_tokenizer, random_prompts
from bench.greedy import generate_greedily
from bench.options import Measured, Options
from bench.services import running_stack
from bench.turns import Ratio, paired_ratio, take_turns

__all__ = ["PathRow", "measure", "path_table"]

_FIRST_TOKENS_A_ROUND = 5

# What one side did with some prompts: tokens, seconds for all of them, seconds to the first one.
Answered = tuple[list[list[int]], float, float]


@dataclass(frozen=True)
class PathRow:
    checkpoint: str
    streams: int
    path_tokens_per_s: float
    engine_tokens_per_s: float
    ratio: Ratio
    path_first_token_s: float  # Of one stream on an idle stack.
    engine_first_token_s: float
    same_tokens: bool  # In every round.


def measure(options: Options) -> Measured:
    rows = [_measure_checkpoint(name, folder, options) for name, folder in options.checkpoints()]
    return rows, [path_table(rows)]


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
            str(row.ratio),
            f"{row.path_first_token_s * 1e3:.1f} ms",
            f"{row.engine_first_token_s * 1e3:.1f} ms",
            "yes" if row.same_tokens else "NO",
        )
    return table


def _measure_checkpoint(name: str, folder: Path, options: Options) -> PathRow:
    """`folder` needs no tokenizer of its own: the demo's stands in, and both sides draw only tokens it knows."""
    complete_with_demo_tokenizer(folder)
    tokenizer_size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    config = load_config(folder)
    streams = max(options.concurrent)
    banned = _never_drawn(folder, config.vocab_size)
    runner = build_executor(
        folder, RuntimeOptions(device="cpu", dtype="float32", max_sequences=streams), banned_token_ids=banned
    )

    def compare(
        address: str, count: int, new_tokens: int, rounds: int, *, first_seed: int
    ) -> tuple[list[Answered], list[Answered]]:
        """What path and engine did in each round with so many prompts."""

        def prompts(number: int) -> list[list[int]]:
            # Never the same in two rounds: the worker would use again what it computed before.
            return random_prompts(count, options.prompt_tokens, tokenizer_size, seed=first_seed + number)

        sides: dict[str, Callable[[int], Answered]] = {
            "path": lambda number: asyncio.run(_through_the_path(address, prompts(number), new_tokens)),
            "engine": lambda number: _through_the_engine(runner, prompts(number), new_tokens, config.max_positions),
        }
        answered = take_turns(sides, rounds)
        return answered["path"], answered["engine"]

    with running_stack(folder, OASST_WORKER_SPECULATE="0") as stack:  # Nor does the engine guess.
        address = stack["addresses"][0]
        path, engine = compare(address, streams, options.new_tokens, options.rounds, first_seed=1)
        rounds = _FIRST_TOKENS_A_ROUND * options.rounds
        path_first, engine_first = compare(address, 1, 2, rounds, first_seed=1_000_000)
    path_s, engine_s = ([seconds for _, seconds, _ in side] for side in (path, engine))
    num_tokens = streams * options.new_tokens
    return PathRow(
        name,
        streams,
        num_tokens / statistics.median(path_s),
        num_tokens / statistics.median(engine_s),
        paired_ratio(engine_s, path_s),
        statistics.median(first_s for _, _, first_s in path_first),
        statistics.median(first_s for _, _, first_s in engine_first),
        all(one[0] == other[0] for one, other in zip([*path, *path_first], [*engine, *engine_first], strict=True)),
    )


async def _through_the_path(address: str, prompts: list[list[int]], new_tokens: int) -> Answered:
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


def _through_the_engine(runner: ModelRunner, prompts: list[list[int]], new_tokens: int, max_positions: int) -> Answered:
    start = time.perf_counter()
    config = EngineConfig(eos_token_id=0, max_positions=max_positions, max_sequences=len(prompts))
    tokens, first_s = generate_greedily(runner, config, prompts, new_tokens)
    return tokens, time.perf_counter() - start, first_s


def _never_drawn(folder: Path, vocab_size: int) -> list[int]:
    """Padding rows and control tokens, as the worker bans them."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    control = [token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    return [*(id_ for id_ in control if id_ != 0), *range(tokenizer.get_vocab_size(), vocab_size)]
