"""Reuse of prompts: what looking for it costs where nothing is found, and what it saves where something is."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from oasst_worker.engine import Engine, EngineConfig, Executor, GenerationParams, Sequence
from oasst_worker.model.config import load_config
from oasst_worker.runtime import RuntimeOptions, build_executor
from rich.table import Table

from bench.checkpoints import random_prompts
from bench.executors import EmptyExecutor
from bench.options import Measured, Options
from bench.turns import Ratio, paired_ratio, take_turns, timed

__all__ = ["PrefixRow", "measure", "prefix_table"]

_PROMPTS = 4
_CHOICES = 4


@dataclass(frozen=True)
class PrefixRow:
    """Seconds to prefill the same prompts, the medians of the rounds."""

    checkpoint: str
    prompt_tokens: int
    without_s: float  # Reuse switched off.
    no_hit: Ratio  # Prompts nobody had before; of the time without reuse, as the next two.
    all_hit: Ratio  # The same prompts again.
    lookup: float  # What reuse adds to the engine's own time, measured without a model.
    choices: Ratio  # One prompt with four choices; of the time with one.


def measure(options: Options) -> Measured:
    rows = [
        _measure_checkpoint(name, folder, prompt_tokens=options.prefix_tokens, rounds=options.rounds)
        for name, folder in options.checkpoints()
    ]
    return rows, [prefix_table(rows)]


def prefix_table(rows: list[PrefixRow]) -> Table:
    table = Table(title="Reuse of prompts: time without it = 1")
    headings = ("checkpoint", "prompt", "without", "no hits", "all hits", "keys and lookups", f"{_CHOICES} choices / 1")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.checkpoint,
            str(row.prompt_tokens),
            f"{row.without_s * 1e3:.1f} ms",
            f"{row.no_hit:.3f}",
            f"{row.all_hit:.3f}",
            f"{row.lookup:.2%}",
            str(row.choices),
        )
    return table


def _measure_checkpoint(name: str, folder: Path, *, prompt_tokens: int, rounds: int) -> PrefixRow:
    """Prefills some prompts one after another, with one token generated for each."""
    model = load_config(folder)
    kv_tokens = 2 * _PROMPTS * (prompt_tokens + 64)
    runner = build_executor(folder, RuntimeOptions(device="cpu", dtype="float32", kv_tokens=kv_tokens))
    config = EngineConfig(model.eos_token_id, model.max_positions, step_tokens=2 * prompt_tokens + 64)
    reusing, forgetting = Engine(runner, config), Engine(_Forgetting(runner, prompt_tokens + 1), config)
    idle = EmptyExecutor(runner.num_blocks)
    idle_reusing, idle_forgetting = Engine(idle, config), Engine(_Forgetting(idle, prompt_tokens + 1), config)

    def prompts(number: int) -> list[list[int]]:
        """New ones for each round: the last is for the choices."""
        return random_prompts(_PROMPTS + 1, prompt_tokens, model.vocab_size, seed=1 + number)

    def prefill(*engines: Engine) -> Callable[[int], list[float]]:
        def take(number: int) -> list[float]:
            asked = prompts(number)[:-1]
            return [timed(partial(_prefill, engine, asked))[0] for engine in engines]

        return take

    def choose(count: int) -> Callable[[int], list[float]]:
        def take(number: int) -> list[float]:
            prompt = prompts(number)[-1]
            return [timed(partial(_generate_choices, reusing, prompt, count, salt=str(count).encode()))[0]]

        return take

    turns = take_turns(
        {
            "without": prefill(forgetting),
            "with": prefill(reusing, reusing),  # No hits, then all.
            "idle without": prefill(idle_forgetting),
            "idle with": prefill(idle_reusing),
            "one choice": choose(1),
            "choices": choose(_CHOICES),
        },
        rounds,
    )
    without_s = [took_s for [took_s] in turns["without"]]
    idle_without_s, idle_with_s = (
        statistics.median(took_s for [took_s] in turns[name]) for name in ("idle without", "idle with")
    )
    return PrefixRow(
        name,
        prompt_tokens,
        statistics.median(without_s),
        no_hit=paired_ratio([no_hit_s for no_hit_s, _ in turns["with"]], without_s),
        all_hit=paired_ratio([all_hit_s for _, all_hit_s in turns["with"]], without_s),
        lookup=(idle_with_s - idle_without_s) / statistics.median(without_s),
        choices=paired_ratio([took_s for [took_s] in turns["choices"]], [took_s for [took_s] in turns["one choice"]]),
    )


class _Forgetting:
    """The executor, said to reuse only tiles longer than any prompt: so none is looked for."""

    is_position_exact = False

    def __init__(self, executor: Executor, prefill_tile: int) -> None:
        self.execute = executor.execute
        self.num_blocks = executor.num_blocks
        self.block_size = executor.block_size
        self.prefill_tile = prefill_tile


def _prefill(engine: Engine, prompts: list[list[int]]) -> None:
    params = GenerationParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add(Sequence(str(number), prompt, params))
        _run_to_end(engine)


def _generate_choices(engine: Engine, prompt: list[int], count: int, salt: bytes) -> None:
    params = GenerationParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
    first = Sequence("0", prompt, params, salt=salt)
    for sequence in (first, *(first.sibling(str(number), params) for number in range(1, count))):
        engine.add(sequence)
    _run_to_end(engine)


def _run_to_end(engine: Engine) -> None:
    while engine.has_work():
        engine.step()
