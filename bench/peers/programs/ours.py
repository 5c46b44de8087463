"""oasst-serve's engine alone."""

from pathlib import Path

from oasst_worker.engine import EngineConfig
from oasst_worker.model.config import load_config
from oasst_worker.runtime import RuntimeOptions, build_executor

from bench.greedy import generate_greedily
from bench.peers.answering import Generate, Setup, serve


def load(setup: Setup) -> Generate:
    folder = Path(setup.checkpoint)
    runner = build_executor(folder, _options(setup))
    config = EngineConfig(
        eos_token_id=0,  # Ignored by what is generated here.
        max_positions=load_config(folder).max_positions,
        max_sequences=setup.max_sequences,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        # A new engine knows no prefix: the prompts of the round before are computed again.
        return generate_greedily(runner, config, prompts, new_tokens)[0]

    return generate


def _options(setup: Setup) -> RuntimeOptions:
    return RuntimeOptions(
        device="cpu",
        dtype="float32" if setup.dtype == "fp32" else "bfloat16",
        threads=setup.threads,
        max_sequences=setup.max_sequences,
        quantize="int8" if setup.dtype == "int8" else None,
    )


if __name__ == "__main__":
    serve(load)
