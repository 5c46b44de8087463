"""llama.cpp through its C interface: a batch of one token for each sequence, all prompts in one batch before."""

import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np

from bench.peers.answering import Generate, Setup, converted, serve

CONVERTER = Path(__file__).parent / "llama_cpp_convert.py"
OUT_TYPES = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0"}
# Of the KV cache. fp16 is its own choice and is not fp32.
CACHE_TYPES = {
    "fp32": llama_cpp.GGML_TYPE_F32,
    "bf16": llama_cpp.GGML_TYPE_F16,
    "int8": llama_cpp.GGML_TYPE_F16,
}
MICRO_BATCH = 512


def load(setup: Setup) -> Generate:
    file = Path(setup.converted).with_suffix(".gguf")
    if not file.exists():
        with converted(file) as unfinished:
            command = [sys.executable, str(CONVERTER), setup.checkpoint, "--outtype", OUT_TYPES[setup.dtype]]
            subprocess.run([*command, "--outfile", str(unfinished)], check=True)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {file}")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    capacity = setup.max_sequences * setup.max_tokens
    context = llama_cpp.llama_init_from_model(model, _context_params(setup, capacity))
    if not context:
        raise RuntimeError("llama.cpp made no context")
    batch = llama_cpp.llama_batch_init(capacity, 0, 1)

    def decode(sequences: list[list[int]], first_position: int) -> list[int]:
        """The next token of each sequence, which go on at `first_position` with these tokens."""
        size = 0
        for number, tokens in enumerate(sequences):
            for position, token_id in enumerate(tokens, first_position):
                batch.token[size] = token_id
                batch.pos[size] = position
                batch.n_seq_id[size] = 1
                batch.seq_id[size][0] = number
                batch.logits[size] = False
                size += 1
            batch.logits[size - 1] = True
        batch.n_tokens = size
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(sequences), vocab_size))
        return logits.argmax(axis=1).tolist()

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        length = len(prompts[0])
        steps = [decode(prompts, 0)]
        while len(steps) < new_tokens:
            steps.append(decode([[token_id] for token_id in steps[-1]], length + len(steps) - 1))
        return [list(tokens) for tokens in zip(*steps, strict=True)]

    return generate


def _context_params(setup: Setup, capacity: int) -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = capacity
    params.n_batch = capacity
    params.n_ubatch = MICRO_BATCH
    params.n_seq_max = setup.max_sequences
    params.n_threads = params.n_threads_batch = setup.threads
    params.type_k = params.type_v = CACHE_TYPES[setup.dtype]
    return params


if __name__ == "__main__":
    serve(load)
