"""The engine alone against transformers, same weights, prompts, lengths; greedy; generated tokens per second."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from oasst_worker.engine import Engine, EngineConfig, GenerationParams, Sequence
from oasst_worker.runtime import ModelRunner, RuntimeOptions, build_executor
from rich.table import Table
from transformers import GPTNeoXForCausalLM

from bench.checkpoints import random_prompts
from bench.peers.answering import Generate
from bench.peers.programs.transformers_continuous import continuous_batching
from bench.peers.programs.transformers_static import static_batch

__all__ = ["OURS", "EngineRow", "compare_systems", "engine_table", "generate_greedily", "measure_engine"]

OURS = "oasst-serve"


@dataclass(frozen=True)
class EngineRow:
    """One cell: a checkpoint, a number of concurrent sequences, tokens per second by system."""

    checkpoint: str
    concurrent: int
    tokens_per_s: dict[str, float]
    same_tokens: dict[str, float]  # Share of generated tokens equal to ours.

    def ratio(self, peer: str) -> float:
        return self.tokens_per_s[OURS] / self.tokens_per_s[peer]


def measure_engine(
    name: str, folder: Path, concurrencies: list[int], *, prompt_tokens: int, new_tokens: int, rounds: int
) -> list[EngineRow]:
    systems = _systems(folder, max(concurrencies), prompt_tokens + new_tokens)
    vocab_size = GPTNeoXForCausalLM.config_class.from_pretrained(folder).vocab_size
    prompts = [random_prompts(concurrent, prompt_tokens, vocab_size) for concurrent in concurrencies]
    return [compare_systems(name, systems, of_cell, new_tokens=new_tokens, rounds=rounds) for of_cell in prompts]


def compare_systems(
    name: str, systems: Mapping[str, Generate], prompts: list[list[int]], *, new_tokens: int, rounds: int
) -> EngineRow:
    """The systems in turn, ours among them, each answering all prompts at once."""
    for generate in systems.values():
        generate(prompts, 4)  # Warms up.
    generated: dict[str, list[list[int]]] = {}
    seconds: dict[str, list[float]] = {system: [] for system in systems}
    for _ in range(rounds):
        for system, generate in systems.items():
            start = time.perf_counter()
            generated[system] = generate(prompts, new_tokens)
            seconds[system].append(time.perf_counter() - start)
            if [len(of_one) for of_one in generated[system]] != [new_tokens] * len(prompts):
                raise RuntimeError(f"{system} generated another number of tokens: the work would not be equal")
    return EngineRow(
        name,
        len(prompts),
        {system: len(prompts) * new_tokens / statistics.median(times) for system, times in seconds.items()},
        {system: _share_equal(tokens, generated[OURS]) for system, tokens in generated.items()},
    )


def generate_greedily(
    runner: ModelRunner, config: EngineConfig, prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], float]:
    """The engine alone: what it generates for each prompt, and the seconds to its first token."""
    engine = Engine(runner, config)
    start = time.perf_counter()
    first_s = 0.0
    for number, prompt in enumerate(prompts):
        params = GenerationParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        engine.add(Sequence(str(number), prompt, params))
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    while engine.has_work():
        for output in engine.step():
            first_s = first_s or time.perf_counter() - start
            if output.token_id is not None:
                tokens[output.sequence_id].append(output.token_id)
    return list(tokens.values()), first_s


def engine_table(rows: list[EngineRow], dtype: str = "fp32") -> Table:
    peers = [system for system in rows[0].tokens_per_s if system != OURS]
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
            *(f"{row.tokens_per_s[system]:.0f}" for system in (OURS, *peers)),
            *(f"{row.ratio(peer):.2f}" for peer in peers),
            f"{min(row.same_tokens.values()):.1%}",
        )
    return table


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


def _share_equal(tokens: list[list[int]], ours: list[list[int]]) -> float:
    pairs = [pair for of_one, our in zip(tokens, ours, strict=True) for pair in zip(of_one, our, strict=True)]
    return sum(first == second for first, second in pairs) / len(pairs)
