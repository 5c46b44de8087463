"""What a runner's model says behind every token of a text, which no request asks for: an oracle of tests."""

from dataclasses import replace

from oasst_worker.engine import Batch, Chunk, GenerationParams, Sequence
from oasst_worker.model.inputs import BLOCK_SIZE
from oasst_worker.runtime import ModelRunner
from oasst_worker.runtime.tensors import make_rows
from torch import Tensor

__all__ = ["prompt_logits"]


def prompt_logits(runner: ModelRunner, token_ids: list[int]) -> Tensor:
    """The logits after each token of a prompt, [tokens, vocab] fp32. The runner's cache must be idle."""
    sequence = Sequence("prompt", token_ids, GenerationParams(max_new_tokens=1))
    sequence.blocks += range(-(-len(token_ids) // BLOCK_SIZE))
    rows = make_rows(Batch((Chunk(sequence, 0, len(token_ids)),)))
    every_row = replace(rows, drawing_rows=range(len(token_ids)))
    return runner.model.forward(every_row.to(runner.device), runner.cache)
