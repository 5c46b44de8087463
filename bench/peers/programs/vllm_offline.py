"""vLLM on its CPU platform, eager: to compile its graphs takes longer than all that is measured here."""

import os

from bench.peers.answering import Generate, Setup, serve

# Read when vLLM is imported. The engine stays in this process, so that one pair of threads is measured.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB
from vllm import LLM, SamplingParams

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def load(setup: Setup) -> Generate:
    cores = sorted(os.sched_getaffinity(0))[: setup.threads]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    llm = LLM(
        setup.checkpoint,
        dtype=DTYPES[setup.dtype],
        max_model_len=setup.max_tokens,
        max_num_seqs=setup.max_sequences,
        enable_prefix_caching=False,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


if __name__ == "__main__":
    serve(load)
