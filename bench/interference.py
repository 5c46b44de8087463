"""What a long prompt does to those who are being answered: the time between their tokens while it comes in."""

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from oasst_worker.engine import Engine, EngineConfig, Executor, GenerationParams, Sequence
from oasst_worker.model.config import load_config
from oasst_worker.runtime import RuntimeOptions, build_executor
from rich.table import Table

from bench.checkpoints import random_prompts
from bench.greedy import UNPACED
from bench.options import Measured, Options
from bench.turns import Ratio, paired_ratio, take_turns

__all__ = ["InterferenceRow", "interference_table", "measure"]

_CHECKPOINT = "160m"
_LONG_PROMPT = 2000
_SHORT_PROMPT = 32
_STEPS_ALONE = 400
_WARM_UP_STEPS = 10


@dataclass(frozen=True)
class InterferenceRow:
    """So many streams and one prompt; the medians of the rounds. Times are those between two tokens of a stream."""

    checkpoint: str
    streams: int
    is_paced: bool
    median_alone_s: float
    median_during_s: float  # While the prompt comes in.
    median_growth: Ratio
    p99_alone_s: float
    p99_during_s: float
    p99_growth: Ratio
    steps_during: float
    first_token_s: float  # From the prompt's arrival to its first token.


@dataclass(frozen=True)
class _Gaps:
    """Seconds of each step, which are those between two tokens of every stream."""

    alone_s: list[float]
    during_s: list[float]


def measure(options: Options) -> Measured:
    rows = _measure_checkpoint(
        _CHECKPOINT, options.checkpoint(_CHECKPOINT), list(options.concurrent), rounds=options.rounds
    )
    return rows, [interference_table(rows)]


def interference_table(rows: list[InterferenceRow]) -> Table:
    title = f"A prompt of {_LONG_PROMPT} tokens beside streams of the {rows[0].checkpoint}, fp32: ms between two tokens"
    table = Table(title=title, padding=0)
    headings = (
        "streams",
        "prompt",
        "p50 alone",
        "during",
        "growth",
        "p99 alone",
        "during",
        "growth",
        "steps",
        "first token",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.streams),
            "paced" if row.is_paced else "whole step",
            f"{row.median_alone_s * 1e3:.1f}",
            f"{row.median_during_s * 1e3:.1f}",
            str(row.median_growth),
            f"{row.p99_alone_s * 1e3:.1f}",
            f"{row.p99_during_s * 1e3:.1f}",
            str(row.p99_growth),
            f"{row.steps_during:.0f}",
            f"{row.first_token_s:.2f} s",
        )
    return table


def _measure_checkpoint(name: str, folder: Path, streams: list[int], *, rounds: int) -> list[InterferenceRow]:
    """Paced prompts, and prompts that get the whole step, by turns."""
    model = load_config(folder)
    if model.max_positions < _LONG_PROMPT + 8:
        raise ValueError(f"{name} has {model.max_positions} positions, too few for a prompt of {_LONG_PROMPT}")
    runner = build_executor(folder, RuntimeOptions(device="cpu", dtype="float32"))
    rows = []
    for num_streams in streams:
        paced = EngineConfig(model.eos_token_id, model.max_positions, max_sequences=num_streams + 1)
        configs = {True: paced, False: replace(paced, max_slowdown=UNPACED)}
        # The unmeasured round writes the blocks that the others use: memory costs most when it is first touched.
        turns = take_turns(
            {
                is_paced: lambda _, config=config, num_streams=num_streams: _interfere(
                    runner, config, num_streams, model.vocab_size
                )
                for is_paced, config in configs.items()
            },
            rounds,
        )
        rows += [_row(name, num_streams, is_paced, gaps) for is_paced, gaps in turns.items()]
    return rows


def _row(name: str, num_streams: int, is_paced: bool, rounds: list[_Gaps]) -> InterferenceRow:
    p50_alone, p50_during = ([statistics.median(steps) for steps in side] for side in _sides(rounds))
    p99_alone, p99_during = ([_p99(steps) for steps in side] for side in _sides(rounds))
    return InterferenceRow(
        name,
        num_streams,
        is_paced,
        statistics.median(p50_alone),
        statistics.median(p50_during),
        paired_ratio(p50_during, p50_alone),
        statistics.median(p99_alone),
        statistics.median(p99_during),
        paired_ratio(p99_during, p99_alone),
        statistics.median(len(gaps.during_s) for gaps in rounds),
        statistics.median(sum(gaps.during_s) for gaps in rounds),
    )


def _sides(rounds: list[_Gaps]) -> tuple[list[list[float]], list[list[float]]]:
    return [gaps.alone_s for gaps in rounds], [gaps.during_s for gaps in rounds]


def _interfere(executor: Executor, config: EngineConfig, num_streams: int, vocab_size: int) -> _Gaps:
    """Half of the steps alone come before the prompt and half after it: the streams' own growth is on both sides.

    Raises:
        RuntimeError: the KV cache was too small.
    """
    engine = Engine(executor, config)
    params = GenerationParams(config.max_positions - _SHORT_PROMPT, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(random_prompts(num_streams, _SHORT_PROMPT, vocab_size)):
        engine.add(Sequence(str(number), prompt, params))
    while engine.last_batch.num_tokens != num_streams:  # All prompts are in.
        engine.step()
    for _ in range(_WARM_UP_STEPS):
        engine.step()
    alone_s = [_timed_step(engine)[0] for _ in range(_STEPS_ALONE // 2)]
    [prompt] = random_prompts(1, _LONG_PROMPT, vocab_size, seed=1)
    engine.add(Sequence("prompt", prompt, GenerationParams(1, temperature=0.0, ignore_eos=True)))
    during_s, has_begun = [], False
    while not has_begun:
        step_s, names = _timed_step(engine)
        has_begun = "prompt" in names
        during_s.append(step_s)
    alone_s += [_timed_step(engine)[0] for _ in range(_STEPS_ALONE // 2)]
    if engine.num_preemptions:
        raise RuntimeError("the KV cache does not hold the streams and the prompt")
    return _Gaps(alone_s, during_s)


def _timed_step(engine: Engine) -> tuple[float, set[str]]:
    """Every stream gets one token a step: a step's time is the time between two tokens."""
    started_s = time.perf_counter()
    outputs = engine.step()
    return time.perf_counter() - started_s, {output.sequence_id for output in outputs}


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100, method="inclusive")[98] if len(seconds) > 1 else seconds[0]
