"""CTranslate2's Generator: the sequences as one batch."""

from pathlib import Path

from ctranslate2 import Generator
from ctranslate2.converters import TransformersConverter

from bench.peers.answering import Generate, Setup, converted, serve

COMPUTE_TYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8_float32"}
# It must have a token to end at, which it bans until a sequence is as long as asked for: one that is padding.
END_TOKEN = 50287


def load(setup: Setup) -> Generate:
    model = Path(setup.converted)
    if not model.exists():
        with converted(model) as unfinished:
            TransformersConverter(setup.checkpoint).convert(str(unfinished), quantization=COMPUTE_TYPES[setup.dtype])
    generator = Generator(
        str(model),
        device="cpu",
        compute_type=COMPUTE_TYPES[setup.dtype],
        inter_threads=1,
        intra_threads=setup.threads,
    )
    # It computes in fp32, without a word, where the processor or the build has no such numbers.
    if generator.compute_type != COMPUTE_TYPES[setup.dtype]:
        raise NotImplementedError(f"CTranslate2 computes in {generator.compute_type} here, not {setup.dtype}")

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        results = generator.generate_batch(
            [[str(token_id) for token_id in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            end_token=[END_TOKEN],
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return generate


if __name__ == "__main__":
    serve(load)
