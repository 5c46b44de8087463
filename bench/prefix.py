"""Reuse of prompts: what looking for it costs where nothing is found, and what it saves where something is."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oasst_worker.engine import Batch, Engine, EngineConfig, Executor, GenerationParams, Sample, Sequence
from oasst_worker.model.config import load_config
from oasst_worker.runtime import RuntimeOptions, build_executor
from rich.table import Table

from bench.checkpoints import random_prompts

__all__ = ["PrefixRow", "measure_prefix", "prefix_table"]

_CHOICES = 4


@dataclass(frozen=True)
class PrefixRow:
    """Seconds to prefill the same prompts, the medians of the rounds."""

    checkpoint: str
    prompt_tokens: int
    without_s: float  # Reuse switched off.
    no_hit_s: float  # Prompts nobody had before.
    all_hit_s: float  # The same prompts again.
    lookup_s: float  # What reuse adds to the engine's own time, measured without a model.
    one_choice_s: float
    choices_s: float  # One prompt, four choices.


def measure_prefix(name: str, folder: Path, *, prompts: int, prompt_tokens: int, rounds: int) -> PrefixRow:
    """Prefills `prompts` prompts one after another, with one token generated for each."""
    model = load_config(folder)
    kv_tokens = 2 * prompts * (prompt_tokens + 64)
    runner = build_executor(folder, RuntimeOptions(device="cpu", dtype="float32", kv_tokens=kv_tokens))
    config = EngineConfig(model.eos_token_id, model.max_positions, step_tokens=2 * prompt_tokens + 64)
    reusing, forgetting = Engine(runner, config), Engine(_Forgetting(runner, prompt_tokens + 1), config)
    idle = _Idle(runner.num_blocks, runner.block_size)
    idle_reusing, idle_forgetting = Engine(idle, config), Engine(_Forgetting(idle, prompt_tokens + 1), config)
    per_round = prompts + 1
    drawn = random_prompts((rounds + 1) * per_round, prompt_tokens, model.vocab_size)
    seconds: dict[str, list[float]] = {}
    for start in range(0, len(drawn), per_round):
        *asked, last = drawn[start : start + per_round]
        runs = {
            "without": lambda asked=asked: _prefill(forgetting, asked),
            "no hit": lambda asked=asked: _prefill(reusing, asked),
            "all hit": lambda asked=asked: _prefill(reusing, asked),
            "idle without": lambda asked=asked: _prefill(idle_forgetting, asked),
            "idle no hit": lambda asked=asked: _prefill(idle_reusing, asked),
            "one choice": lambda last=last: _generate_choices(reusing, last, 1, salt=b"one"),
            "choices": lambda last=last: _generate_choices(reusing, last, _CHOICES, salt=b"choices"),
        }
        for kind, run in runs.items():
            seconds.setdefault(kind, []).append(_timed(run))
    median = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}  # The first round warms up.
    return PrefixRow(
        name,
        prompt_tokens,
        without_s=median["without"],
        no_hit_s=median["no hit"],
        all_hit_s=median["all hit"],
        lookup_s=median["idle no hit"] - median["idle without"],
        one_choice_s=median["one choice"],
        choices_s=median["choices"],
    )


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
            f"{row.no_hit_s / row.without_s:.3f}",
            f"{row.all_hit_s / row.without_s:.3f}",
            f"{row.lookup_s / row.without_s:.2%}",
            f"{row.choices_s / row.one_choice_s:.2f}",
        )
    return table


class _Forgetting:
    """The executor, said to reuse only tiles longer than any prompt: so none is looked for."""

    is_position_exact = False

    def __init__(self, executor: Executor, prefill_tile: int) -> None:
        self.execute = executor.execute
        self.num_blocks = executor.num_blocks
        self.block_size = executor.block_size
        self.prefill_tile = prefill_tile


@dataclass(frozen=True)
class _Idle:
    """Computes nothing: what is left is the engine's own time."""

    num_blocks: int
    block_size: int
    prefill_tile: int = 1
    is_position_exact: bool = True

    def execute(self, batch: Batch) -> list[Sample]:
        return [Sample(0) for chunk in batch.chunks if chunk.draws]


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


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
