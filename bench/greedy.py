"""The engine alone, asked for greedy answers."""

import time
from collections.abc import Iterator
from dataclasses import replace

from oasst_worker.engine import (
    Batch,
    Engine,
    EngineConfig,
    GenerationParams,
    OutOfDeviceMemoryError,
    ScoreOutput,
    Sequence,
    TokenOutput,
)
from oasst_worker.runtime import ModelRunner

__all__ = ["UNPACED", "decode_steps", "generate_greedily", "num_decoded", "step_with_all"]

# As `max_slowdown`: a prompt gets the whole step.
UNPACED = 1e6


def generate_greedily(
    runner: ModelRunner, config: EngineConfig, prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], float]:
    """The engine alone: what it generates for each prompt, and the seconds to its first token."""
    engine = Engine(runner, config)
    start = time.perf_counter()
    first_s = 0.0
    _add(engine, prompts, new_tokens)
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    while engine.has_work():
        for output in engine.step():
            first_s = first_s or time.perf_counter() - start
            if output.token_id is not None:
                tokens[output.sequence_id].append(output.token_id)
    return list(tokens.values()), first_s


def decode_steps(
    runner: ModelRunner, config: EngineConfig, prompts: list[list[int]], num_steps: int
) -> Iterator[tuple[float, Batch]]:
    """Seconds and batch of so many steps in which every prompt's sequence decodes and nothing else is computed.

    Prompts come in unpaced. The first such step is left out: on a GPU it makes what those of its size need.

    Raises:
        OutOfDeviceMemoryError: if the device has no memory for all at once, and the engine went on with fewer.
    """
    engine = Engine(runner, replace(config, max_slowdown=UNPACED))
    _add(engine, prompts, num_decoded(config, prompts, num_steps))
    while engine.last_batch.num_tokens != len(prompts) or engine.num_waiting:
        step_with_all(engine)
    for _ in range(num_steps):
        start = time.perf_counter()
        step_with_all(engine)
        yield time.perf_counter() - start, engine.last_batch


def step_with_all(engine: Engine) -> list[TokenOutput | ScoreOutput]:
    """A step of an engine for which the device has always had memory.

    Raises:
        OutOfDeviceMemoryError: if it had not, and the engine went on with fewer sequences.
    """
    outputs = engine.step()
    if engine.num_out_of_memory:
        raise OutOfDeviceMemoryError("the device has no memory for all sequences at once")
    return outputs


def num_decoded(config: EngineConfig, prompts: list[list[int]], num_steps: int) -> int:
    """The most tokens that `decode_steps` generates for a sequence: the first decode while the last prompts come in."""
    return -(-sum(map(len, prompts)) // config.step_tokens) + num_steps + 2


def _add(engine: Engine, prompts: list[list[int]], new_tokens: int) -> None:
    params = GenerationParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add(Sequence(str(number), prompt, params))
