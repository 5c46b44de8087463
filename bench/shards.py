"""A model over two processes on a CPU: what a step exchanges, and what it takes beside one process."""

import statistics
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from oasst_worker.engine import EngineConfig
from oasst_worker.model.config import NeoXConfig, load_config
from oasst_worker.model.ranks import TrafficCount
from oasst_worker.runtime import ModelRunner, RuntimeOptions, build_executor
from rich.table import Table

from bench.checkpoints import random_prompts
from bench.greedy import decode_steps
from bench.options import Measured, Options
from bench.turns import Ratio, paired_ratio, take_turns

__all__ = ["ShardsRow", "measure", "shards_table"]

_RANKS = 2
_STEPS = 16
_ITEM_BYTES = 4


@dataclass(frozen=True)
class ShardsRow:
    """Steps that decode one token for each of so many sequences."""

    checkpoint: str
    concurrent: int
    num_exchanges: int  # In a step.
    exchanged_kb: float  # In a step, given by the first rank.
    fewest_kb: float  # A sum of rows for each layer and one for the embedding, and a part of the logits.
    one_process_ms: float  # With a thread for each rank that the other has.
    ranks_ms: float
    overhead: Ratio  # Of the ranks' time over one process's, medians of a round's steps. An ideal split has 1.


def measure(options: Options) -> Measured:
    rows = [row for name, folder in options.checkpoints() for row in _measure_checkpoint(name, folder, options)]
    return rows, [shards_table(rows)]


def _measure_checkpoint(name: str, folder: Path, options: Options) -> list[ShardsRow]:
    """Two ranks of one thread each beside one process of two."""
    concurrencies, context, rounds = options.concurrent, options.prompt_tokens, options.rounds
    config = load_config(folder)
    runtime = RuntimeOptions(
        device="cpu",
        dtype="float32",
        threads=_RANKS,
        max_sequences=max(concurrencies),
        kv_tokens=max(concurrencies) * (context + 2 * _STEPS),
    )
    split = build_executor(folder, replace(runtime, split="tensor", num_ranks=_RANKS))
    if split.ranks is None:
        raise RuntimeError("the model is not split")
    with closing(split.ranks):
        alone = build_executor(folder, replace(runtime, split="none"))
        return [_measure(name, config, alone, split, concurrent, context, rounds) for concurrent in concurrencies]


def shards_table(rows: list[ShardsRow]) -> Table:
    table = Table(title=f"A decoding step of {_RANKS} ranks on a CPU, fp32, beside one process of {_RANKS} threads")
    for heading in (
        *("checkpoint", "rows", "exchanges", "exchanged, KB", "fewest, KB"),
        *("one process, ms", "ranks, ms", "ratio"),
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.checkpoint,
            str(row.concurrent),
            str(row.num_exchanges),
            f"{row.exchanged_kb:.0f}",
            f"{row.fewest_kb:.0f}",
            f"{row.one_process_ms:.2f}",
            f"{row.ranks_ms:.2f}",
            str(row.overhead),
        )
    return table


def _measure(
    name: str,
    config: NeoXConfig,
    alone: ModelRunner,
    split: ModelRunner,
    concurrent: int,
    context: int,
    rounds: int,
) -> ShardsRow:
    prompts = random_prompts(concurrent, context, config.vocab_size)
    engine_config = EngineConfig(config.eos_token_id, config.max_positions, concurrent, concurrent * context)

    def step_s(runner: ModelRunner, threads: int) -> float:
        """The median of some steps, by so many threads of this process."""
        torch.set_num_threads(threads)
        return statistics.median(seconds for seconds, _ in decode_steps(runner, engine_config, prompts, _STEPS))

    turns = take_turns({"alone": lambda _: step_s(alone, _RANKS), "ranks": lambda _: step_s(split, 1)}, rounds)
    exchanged = _exchanged(split, engine_config, prompts)
    sums = config.num_layers * (1 if config.parallel_residual else 2) + 1
    fewest = concurrent * _ITEM_BYTES * (sums * config.hidden_size + -(-config.vocab_size // _RANKS))
    return ShardsRow(
        name,
        concurrent,
        exchanged.num_exchanges,
        exchanged.num_bytes / 1e3,
        fewest / 1e3,
        statistics.median(turns["alone"]) * 1e3,
        statistics.median(turns["ranks"]) * 1e3,
        paired_ratio(turns["ranks"], turns["alone"]),
    )


def _exchanged(split: ModelRunner, config: EngineConfig, prompts: list[list[int]]) -> TrafficCount:
    """In a step: all exchange the same."""
    steps = decode_steps(split, config, prompts, 2)
    next(steps)
    before = replace(split.model.traffic)
    next(steps)
    after = split.model.traffic
    return TrafficCount(after.num_exchanges - before.num_exchanges, after.num_bytes - before.num_bytes)
