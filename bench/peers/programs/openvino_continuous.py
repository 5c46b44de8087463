"""OpenVINO GenAI's continuous batching, on a model that its own converter exported."""

from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer

from bench.peers.answering import Generate, Setup, converted, serve

# Left to itself it would compute in bf16 where it can, and cache keys and values in eight bits.
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16" if HAS_BF16 else "f32"}


def load(setup: Setup) -> Generate:
    folder = Path(setup.converted)
    if not folder.exists():
        with converted(folder) as unfinished:
            model = OVModelForCausalLM.from_pretrained(
                setup.checkpoint, export=True, compile=False, load_in_8bit=setup.dtype == "int8"
            )
            model.save_pretrained(unfinished)
            # The pipeline asks for a tokenizer; none of its text is read here.
            tokenizer = AutoTokenizer.from_pretrained(setup.checkpoint)
            for name, part in zip(
                ("tokenizer", "detokenizer"), convert_tokenizer(tokenizer, with_detokenizer=True), strict=True
            ):
                openvino.save_model(part, unfinished / f"openvino_{name}.xml")
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 4  # GiB
    scheduler.max_num_seqs = setup.max_sequences
    scheduler.max_num_batched_tokens = setup.max_sequences * setup.max_tokens
    scheduler.enable_prefix_caching = False
    precision = PRECISIONS[setup.dtype]
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        str(folder),
        scheduler,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": setup.threads,
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
        },
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        config = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, do_sample=False, ignore_eos=True)
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = pipeline.generate(inputs, [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in results]

    return generate


if __name__ == "__main__":
    serve(load)
