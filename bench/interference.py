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

__all__ = ["InterferenceRow", "interference_table", "measure_interference"]

_LONG_PROMPT = 2000
_SHORT_PROMPT = 32
_STEPS_ALONE = 40
_UNPACED = 1e6


@dataclass(frozen=True)
class InterferenceRow:
    """So many streams and one prompt; the medians of the rounds."""

    checkpoint: str
    streams: int
    is_paced: bool
    p99_alone_s: float  # Between two tokens of a stream.
    p99_during_s: float  # The same while the prompt comes in.
    first_token_s: float  # From the prompt's arrival to its first token.

    @property
    def growth(self) -> float:
        return self.p99_during_s / self.p99_alone_s


def measure_interference(name: str, folder: Path, streams: list[int], *, rounds: int) -> list[InterferenceRow]:
    """Paced prompts, and prompts that get the whole step, by turns."""
    model = load_config(folder)
    if model.max_positions < _LONG_PROMPT + 8:
        raise ValueError(f"{name} has {model.max_positions} positions, too few for a prompt of {_LONG_PROMPT}")
    runner = build_executor(folder, RuntimeOptions(device="cpu", dtype="float32"))
    rows = []
    for num_streams in streams:
        paced = EngineConfig(model.eos_token_id, model.max_positions, max_sequences=num_streams + 1)
        configs = {True: paced, False: replace(paced, max_slowdown=_UNPACED)}
        gaps: dict[bool, list[tuple[float, float, float]]] = {is_paced: [] for is_paced in configs}
        for _ in range(rounds):
            for is_paced, config in configs.items():
                gaps[is_paced].append(_interfere(runner, config, num_streams, model.vocab_size))
        for is_paced, measured in gaps.items():
            medians = (statistics.median(figures) for figures in zip(*measured, strict=True))
            rows.append(InterferenceRow(name, num_streams, is_paced, *medians))
    return rows


def interference_table(rows: list[InterferenceRow]) -> Table:
    table = Table(title=f"A prompt of {_LONG_PROMPT} tokens beside streams, fp32: p99 of the time between two tokens")
    headings = ("checkpoint", "streams", "prompt", "alone", "during", "growth", "prompt's first token")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.checkpoint,
            str(row.streams),
            "paced" if row.is_paced else "whole step",
            f"{row.p99_alone_s * 1e3:.1f} ms",
            f"{row.p99_during_s * 1e3:.1f} ms",
            f"{row.growth:.1f}",
            f"{row.first_token_s:.2f} s",
        )
    return table


def _interfere(
    executor: Executor, config: EngineConfig, num_streams: int, vocab_size: int
) -> tuple[float, float, float]:
    """p99 between tokens alone, during the prompt, and the prompt's seconds to its first token."""
    engine = Engine(executor, config)
    params = GenerationParams(config.max_positions - _SHORT_PROMPT, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(random_prompts(num_streams, _SHORT_PROMPT, vocab_size)):
        engine.add(Sequence(str(number), prompt, params))
    while engine.last_batch.num_tokens != num_streams:  # All prompts are in, and everything is warm.
        engine.step()
    for _ in range(_STEPS_ALONE // 4):
        engine.step()
    alone_s = [_timed_step(engine)[0] for _ in range(_STEPS_ALONE)]
    [prompt] = random_prompts(1, _LONG_PROMPT, vocab_size, seed=1)
    engine.add(Sequence("prompt", prompt, GenerationParams(1, temperature=0.0, ignore_eos=True)))
    during_s, has_begun = [], False
    while not has_begun:
        step_s, names = _timed_step(engine)
        has_begun = "prompt" in names
        during_s.append(step_s)
    return _p99(alone_s), _p99(during_s), sum(during_s)


def _timed_step(engine: Engine) -> tuple[float, set[str]]:
    """Every stream gets one token a step: a step's time is the time between two tokens."""
    started_s = time.perf_counter()
    outputs = engine.step()
    return time.perf_counter() - started_s, {output.sequence_id for output in outputs}


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) * 99 // 100]
