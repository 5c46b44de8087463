"""Where a decode step's time goes on this CPU, by operator, and what share of the machine's floor it reaches.

The floor of a step is the longer of two: reading all weights of the linear layers and the KV cache once, at the rate at
which PyTorch's dot product was just seen to read here; and the products' arithmetic, at the rate of its best square
product. A better way to read passes 100 %.
Times are minima over the steps of all rounds: other processes only ever add to a step.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from oasst_worker.engine import Batch, EngineConfig
from oasst_worker.model.attention import INT8, Attend, build_attention, kv_bytes
from oasst_worker.model.config import NeoXConfig, load_config
from oasst_worker.model.inputs import BLOCK_SIZE
from oasst_worker.model.linear import Linear, build_linear, build_quantized_linear
from oasst_worker.model.neox import NeoX
from oasst_worker.model.weights import load_weights
from oasst_worker.runtime import ModelRunner
from rich.table import Table
from torch import Tensor

from bench.checkpoints import random_prompts
from bench.greedy import decode_steps, num_decoded
from bench.options import Measured, Options
from bench.turns import timed

__all__ = ["ProfileRow", "Roofline", "fastest", "measure", "profile_table", "roofline_table"]

_STEPS = 24


@dataclass(frozen=True)
class Numbers:
    """What a model is made of."""

    rows: torch.dtype
    cache: torch.dtype
    make_linear: Callable[..., Linear]
    weight_bytes: int
    products: str  # Whose rate of the roofline is theirs.


PATHS = {
    "fp32": Numbers(torch.float32, torch.float32, build_linear, 4, "fp32"),
    "bf16": Numbers(torch.bfloat16, torch.bfloat16, build_linear, 2, "bf16"),
    "int8": Numbers(torch.bfloat16, torch.bfloat16, build_quantized_linear, 1, "int8"),
    "int8, int8 cache": Numbers(torch.bfloat16, INT8, build_quantized_linear, 1, "int8"),
}


@dataclass(frozen=True)
class Roofline:
    """What this machine does at best, by all threads."""

    read_gb_s: float
    matrix_gflop_s: dict[str, float]  # By the products' kind.


@dataclass(frozen=True)
class ProfileRow:
    """One decode step of `concurrent` sequences, `context` tokens each; milliseconds."""

    checkpoint: str
    path: str
    concurrent: int
    context: int
    step_ms: float  # As served: all layers in one call, the engine and the sampling around it.
    operators_ms: dict[str, float]  # The same step with its operators called one by one.
    floor_ms: float

    @property
    def share_of_floor(self) -> float:
        return self.floor_ms / self.step_ms


def measure(options: Options) -> Measured:
    roofline = _measure_roofline()
    rows = [
        row for name, folder in options.checkpoints() for row in _measure_checkpoint(name, folder, roofline, options)
    ]
    return [roofline, *rows], [roofline_table(roofline), profile_table(rows)]


def fastest(call: Callable[[], Any], times: int = 12) -> float:
    """Seconds of so many calls' fastest."""
    return min(timed(call)[0] for _ in range(times))


def _measure_roofline() -> Roofline:
    block = torch.zeros(2**27)  # 512 MiB: more than a cache that is one's own.
    read_s = fastest(lambda: torch.dot(block, block))
    square = torch.randn(2048, 2048)
    as_bf16, as_int8 = square.bfloat16(), square.to(torch.int8)
    seconds = {
        "fp32": fastest(lambda: square @ square),
        "bf16": fastest(lambda: as_bf16 @ as_bf16),
        "int8": fastest(lambda: torch._int_mm(as_int8, as_int8)),
    }
    operations = 2 * len(square) ** 3
    return Roofline(block.nbytes / read_s / 1e9, {kind: operations / one / 1e9 for kind, one in seconds.items()})


def _measure_checkpoint(name: str, folder: Path, roofline: Roofline, options: Options) -> list[ProfileRow]:
    """Every path at every number of sequences."""
    context, rounds = options.prompt_tokens, options.rounds
    config = load_config(folder)
    rows = []
    for path, numbers in PATHS.items():
        weights = load_weights(folder, config, dtype=numbers.rows)
        clock = _Clock()
        make_attention = partial(build_attention, kv_dtype=numbers.cache)
        served = NeoX(config, weights, numbers.make_linear, make_attention)
        make_timed = clock.linears(numbers.make_linear, config.vocab_size)
        apart = NeoX(config, weights, make_timed, clock.attention(make_attention))
        for concurrent in options.concurrent:
            step_s = min(step_s for steps in _decoding(served, concurrent, context, rounds) for step_s, _ in steps)
            floor_s = _floor_s(config, roofline, numbers, concurrent, context)
            operators = _operators_ms(apart, clock, concurrent, context, rounds)
            rows.append(ProfileRow(name, path, concurrent, context, step_s * 1e3, operators, floor_s * 1e3))
    return rows


def roofline_table(roofline: Roofline) -> Table:
    table = Table(title="What this machine does at best")
    table.add_column("reading, GB/s", justify="right")
    for kind in roofline.matrix_gflop_s:
        table.add_column(f"{kind} products, GFLOP/s", justify="right")
    table.add_row(f"{roofline.read_gb_s:.1f}", *(f"{rate:.0f}" for rate in roofline.matrix_gflop_s.values()))
    return table


def profile_table(rows: list[ProfileRow]) -> Table:
    operators = list(rows[0].operators_ms)
    table = Table(title=f"A decode step, {rows[0].context} tokens of context: ms as served, one by one, and the floor")
    for heading in ("checkpoint", "path", "rows", "served", *operators, "floor", "of the floor"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.checkpoint,
            row.path,
            str(row.concurrent),
            f"{row.step_ms:.2f}",
            *(f"{row.operators_ms[operator]:.2f}" for operator in operators),
            f"{row.floor_ms:.2f}",
            f"{row.share_of_floor:.0%}",
        )
    return table


class _Clock:
    """Seconds spent in each kind of operator."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, kind: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*arguments: Any) -> Tensor:
            start = time.perf_counter()
            outcome = function(*arguments)
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - start
            return outcome

        return timed

    def linears(self, make_linear: Callable[..., Linear], vocab_size: int) -> Callable[..., Linear]:
        def make(weight: Tensor, *arguments: Any) -> Linear:
            kind = "vocabulary" if weight.shape[0] == vocab_size else "linears"
            return self.time(kind, make_linear(weight, *arguments))

        return make

    def attention(self, make_attention: Callable[..., Any]) -> Callable[..., Any]:
        def make(config: NeoXConfig, **options: Any) -> Any:
            attention = make_attention(config, **options)
            return _TimedAttention(attention, self)

        return make


class _TimedAttention:
    def __init__(self, attention: Any, clock: _Clock) -> None:
        self._attention = attention
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)

    def prepare(self, inputs: Any) -> Attend:
        return self._clock.time("attention", self._attention.prepare(inputs))


def _decoding(model: NeoX, concurrent: int, context: int, rounds: int) -> Iterator[Iterator[tuple[float, Batch]]]:
    """So many rounds of steps that decode and do nothing else."""
    prompts = random_prompts(concurrent, context, model.config.vocab_size)
    config = EngineConfig(0, model.config.max_positions, max_sequences=concurrent, step_tokens=concurrent * context)
    blocks_each = -(-(context + num_decoded(config, prompts, _STEPS)) // BLOCK_SIZE) + 1
    runner = ModelRunner(model, num_blocks=concurrent * blocks_each)
    for _ in range(rounds):
        yield decode_steps(runner, config, prompts, _STEPS)


def _operators_ms(model: NeoX, clock: _Clock, concurrent: int, context: int, rounds: int) -> dict[str, float]:
    """The fastest step's, with what is neither of them as the rest."""
    fastest, operators = float("inf"), {}
    for steps in _decoding(model, concurrent, context, rounds):
        next(steps)  # Until here the clock ran for the prompts as well.
        clock.seconds = {}
        for step_s, _ in steps:
            if step_s < fastest:
                fastest = step_s
                operators = {kind: seconds * 1e3 for kind, seconds in clock.seconds.items()}
                operators["rest"] = step_s * 1e3 - sum(operators.values())
            clock.seconds = {}
    return operators


def _floor_s(config: NeoXConfig, roofline: Roofline, numbers: Numbers, concurrent: int, context: int) -> float:
    hidden = config.hidden_size
    weights = config.num_layers * (4 * hidden**2 + 2 * hidden * config.intermediate_size) + config.vocab_size * hidden
    cache_bytes = config.num_layers * kv_bytes(config, numbers.cache) * context * concurrent
    read_s = (weights * numbers.weight_bytes + cache_bytes) / roofline.read_gb_s / 1e9
    return max(read_s, 2 * weights * concurrent / roofline.matrix_gflop_s[numbers.products] / 1e9)
