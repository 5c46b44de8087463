"""A model over two processes on a CPU: what a step exchanges, and what it takes beside one process."""

import statistics
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from oasst_worker.engine import Engine, EngineConfig, GenerationParams, Sequence
from oasst_worker.model.config import NeoXConfig, load_config
from oasst_worker.runtime import ModelRunner, RuntimeOptions, build_executor
from rich.table import Table

from bench.checkpoints import random_prompts
from bench.options import Measured, Options

__all__ = ["ShardsRow", "measure", "shards_table"]

_RANKS = 2
_STEPS = 16
_ITEM_BYTES = 4


@dataclass(frozen=True)
class ShardsRow:
    """Steps that decode one token for each of so many sequences."""

    checkpoint: str
    concurrent: int
    num_exchanges: float  # In a step.
    exchanged_kb: float  # In a step, given by the first rank.
    fewest_kb: float  # A sum of rows for each layer and one for the embedding, and a part of the logits.
    one_process_ms: float  # With a thread for each rank that the other has.
    ranks_ms: float
    overhead: float  # Of the ranks' time over one process's, from pairs of steps. An ideal split has 1.


def measure(options: Options) -> Measured:
    rows = [row for name, folder in options.checkpoints() for row in _measure_checkpoint(name, folder, options)]
    return rows, [shards_table(rows)]


def _measure_checkpoint(name: str, folder: Path, options: Options) -> list[ShardsRow]:
    """Two ranks of one thread each beside one process of two, step by step in turn."""
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
            f"{row.num_exchanges:.0f}",
            f"{row.exchanged_kb:.0f}",
            f"{row.fewest_kb:.0f}",
            f"{row.one_process_ms:.2f}",
            f"{row.ranks_ms:.2f}",
            f"{row.overhead:.2f}",
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
    alone_s, split_s = [], []
    num_exchanges = num_bytes = 0
    for _ in range(rounds):
        of_alone = _prefill(alone, config, concurrent, context)
        of_split = _prefill(split, config, concurrent, context)
        before = replace(split.model.traffic)
        while of_split.has_work():
            alone_s.append(_step(of_alone, threads=_RANKS))
            split_s.append(_step(of_split, threads=1))
        num_exchanges += split.model.traffic.num_exchanges - before.num_exchanges
        num_bytes += split.model.traffic.num_bytes - before.num_bytes
    sums = config.num_layers * (1 if config.parallel_residual else 2) + 1
    fewest = concurrent * _ITEM_BYTES * (sums * config.hidden_size + -(-config.vocab_size // _RANKS))
    return ShardsRow(
        name,
        concurrent,
        num_exchanges / len(split_s),
        num_bytes / len(split_s) / 1e3,
        fewest / 1e3,
        statistics.median(alone_s) * 1e3,
        statistics.median(split_s) * 1e3,
        statistics.median(ranks_s / one_s for ranks_s, one_s in zip(split_s, alone_s, strict=True)),
    )


def _prefill(runner: ModelRunner, config: NeoXConfig, concurrent: int, context: int) -> Engine:
    """What is left is to decode, for so many sequences."""
    step_tokens = concurrent * context
    engine = Engine(runner, EngineConfig(config.eos_token_id, config.max_positions, concurrent, step_tokens))
    params = GenerationParams(max_new_tokens=_STEPS + 1, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(random_prompts(concurrent, context, config.vocab_size)):
        engine.add(Sequence(str(number), prompt, params))
    engine.step()
    return engine


def _step(engine: Engine, *, threads: int) -> float:
    """The seconds of a step, by so many threads of this process."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start
