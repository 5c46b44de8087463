"""The engine that is measured: what its steps compute."""

from oasst_worker.engine import EngineConfig
from oasst_worker.runtime import RuntimeOptions, build_executor

from bench.checkpoints import DEMO, random_prompts
from bench.greedy import decode_steps


def test_steps_that_decode_do_nothing_else_though_the_prompts_came_in_over_many_steps():
    runner = build_executor(DEMO, RuntimeOptions(device="cpu", dtype="float32", kv_tokens=2048))
    config = EngineConfig(eos_token_id=0, max_positions=512, max_sequences=3, step_tokens=32)
    batches = [batch for _, batch in decode_steps(runner, config, random_prompts(3, 64, 500), 4)]
    assert [[chunk.num_tokens for chunk in batch.chunks] for batch in batches] == [[1, 1, 1]] * 4
