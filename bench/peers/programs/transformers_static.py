"""transformers' `generate`: the sequences as one static batch."""

import torch
from transformers import GenerationConfig, GPTNeoXForCausalLM

from bench.peers.answering import Generate, Setup, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(setup: Setup) -> Generate:
    torch.set_num_threads(setup.threads)
    return static_batch(GPTNeoXForCausalLM.from_pretrained(setup.checkpoint, dtype=DTYPES[setup.dtype]).eval())


def static_batch(model: GPTNeoXForCausalLM) -> Generate:
    @torch.inference_mode()
    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=model.device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=1
            ),
        )
        return output[:, ids.shape[1] :].tolist()

    return generate


if __name__ == "__main__":
    serve(load)
