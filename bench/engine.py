"""The engine alone against transformers, same weights, prompts, lengths; greedy; generated tokens per second."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from oasst_worker.engine import EngineConfig
from oasst_worker.runtime import RuntimeOptions, build_executor
from rich.table import Table
from transformers import GPTNeoXForCausalLM

from bench.checkpoints import random_prompts
from bench.greedy import generate_greedily
from bench.options import Measured, Options
from bench.peers.answering import Generate
from bench.peers.measure import agreement
from bench.peers.programs.transformers_continuous import continuous_batching
from bench.peers.programs.transformers_static import static_batch
from bench.turns import Ratio, paired_ratio, take_turns, timed

__all__ = ["OURS", "EngineRow", "compare_systems", "engine_table", "measure"]

OURS = "oasst-serve"
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class EngineRow:
    """One cell: a checkpoint, a number of concurrent sequences, tokens per second by system."""

    checkpoint: str
    concurrent: int
    tokens_per_s: dict[str, float]  # Of those that could do it.
    ratios: dict[str, Ratio]  # Of ours to each peer's.
    same_tokens: dict[str, float]  # Share of generated tokens before a sequence's first difference from ours.


def measure(options: Options) -> Measured:
    rows = [row for name, folder in options.checkpoints() for row in _measure_checkpoint(name, folder, options)]
    return rows, [engine_table(rows)]


def compare_systems(
    name: str, systems: Mapping[str, Generate], prompts: list[list[int]], *, new_tokens: int, rounds: int
) -> EngineRow:
    """The systems in turn, ours among them, each answering all prompts at once.

    Raises:
        RuntimeError: a system generated another number of tokens, so that the work would not be equal.
    """

    def turn_of(system: str) -> Callable[[int], tuple[float, list[list[int]]]]:
        def take(number: int) -> tuple[float, list[list[int]]]:
            num_tokens = new_tokens if number >= 0 else min(_WARM_UP_TOKENS, new_tokens)
            seconds, tokens = timed(lambda: systems[system](prompts, num_tokens))
            if [len(of_one) for of_one in tokens] != [num_tokens] * len(prompts):
                raise RuntimeError(f"{system} generated another number of tokens: the work would not be equal")
            return seconds, tokens

        return take

    turns = take_turns({system: turn_of(system) for system in systems}, rounds)
    seconds = {system: [took_s for took_s, _ in of_one] for system, of_one in turns.items()}
    ours = [tokens for _, tokens in turns[OURS]]
    return EngineRow(
        name,
        len(prompts),
        {system: len(prompts) * new_tokens / statistics.median(times) for system, times in seconds.items()},
        {system: paired_ratio(times, seconds[OURS]) for system, times in seconds.items() if system != OURS},
        {
            system: min(agreement(tokens, our) for (_, tokens), our in zip(of_one, ours, strict=True))
            for system, of_one in turns.items()
        },
    )


def engine_table(rows: list[EngineRow], dtype: str = "fp32") -> Table:
    peers = [peer for peer in dict.fromkeys(system for row in rows for system in row.tokens_per_s) if peer != OURS]
    table = Table(title=f"Engine alone: generated tokens per second, {dtype}, greedy, prefill included")
    for heading in ("checkpoint", "concurrent", OURS, *peers):
        table.add_column(heading, justify="right")
    for peer in peers:
        table.add_column(f"ratio to {peer.removeprefix('transformers ')}", justify="right")
    table.add_column("same tokens", justify="right")
    for row in rows:
        table.add_row(
            row.checkpoint,
            str(row.concurrent),
            *(f"{row.tokens_per_s[each]:.0f}" if each in row.tokens_per_s else "-" for each in (OURS, *peers)),
            *(str(row.ratios.get(peer, "-")) for peer in peers),
            f"{min(row.same_tokens.values()):.1%}",
        )
    return table


def _measure_checkpoint(name: str, folder: Path, options: Options) -> list[EngineRow]:
    systems = _systems(folder, max(options.concurrent), options.prompt_tokens + options.new_tokens)
    vocab_size = GPTNeoXForCausalLM.config_class.from_pretrained(folder).vocab_size
    return [
        compare_systems(
            name,
            systems,
            random_prompts(concurrent, options.prompt_tokens, vocab_size),
            new_tokens=options.new_tokens,
            rounds=options.rounds,
        )
        for concurrent in options.concurrent
    ]


def _systems(folder: Path, max_sequences: int, max_tokens: int) -> dict[str, Generate]:
    reference = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = RuntimeOptions(device="cpu", dtype="float32", max_sequences=max_sequences)
    runner = build_executor(folder, options)
    config = EngineConfig(
        eos_token_id=reference.config.eos_token_id,
        max_positions=reference.config.max_position_embeddings,
        max_sequences=max_sequences,
    )

    def ours(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return generate_greedily(runner, config, prompts, new_tokens)[0]

    return {
        OURS: ours,
        "transformers generate": static_batch(reference),
        "transformers continuous batching": continuous_batching(
            reference, max_sequences=max_sequences, max_tokens=max_tokens
        ),
    }
