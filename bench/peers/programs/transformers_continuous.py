"""transformers' continuous batching."""

import torch
from transformers import GenerationConfig, GPTNeoXForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from bench.peers.answering import Generate, Setup, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAGE_SIZE = 32
# On a CPU, where each step pays for a mask of the most tokens that it may have: 8192, its own default, takes twice as
# long.
STEP_TOKENS = 512


def load(setup: Setup) -> Generate:
    torch.set_num_threads(setup.threads)
    model = GPTNeoXForCausalLM.from_pretrained(setup.checkpoint, dtype=DTYPES[setup.dtype]).eval()
    return continuous_batching(model, max_sequences=setup.max_sequences, max_tokens=setup.max_tokens)


def continuous_batching(
    model: GPTNeoXForCausalLM, *, max_sequences: int, max_tokens: int, step_tokens: int = STEP_TOKENS
) -> Generate:
    # Its own choice of a cache is gigabytes, and most of its time; this one holds what is asked for.
    batching = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=max_sequences * (-(-max_tokens // PAGE_SIZE) + 1),
        max_batch_tokens=step_tokens,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        outputs = model.generate_batch(
            prompts,
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=1
            ),
            continuous_batching_config=batching,
        )
        by_number = sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[-1]))
        return [list(output.generated_tokens) for output in by_number]

    return generate


if __name__ == "__main__":
    serve(load)
