"""The engine alone, asked for greedy answers."""

import time

from oasst_worker.engine import Engine, EngineConfig, GenerationParams, Sequence
from oasst_worker.runtime import ModelRunner

__all__ = ["generate_greedily"]


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
