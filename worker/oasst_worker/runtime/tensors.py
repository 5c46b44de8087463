"""From a batch to tensors: the rows of one step."""

from dataclasses import replace

import torch
from torch import Tensor

from oasst_worker.engine import Batch
from oasst_worker.model.inputs import BLOCK_SIZE, AttentionSpan, StepInputs, StepRows

__all__ = ["make_inputs"]


def make_inputs(
    batch: Batch, *, device: torch.device, every_row: bool = False, drawn_ids: Tensor | None = None
) -> StepInputs:
    """The step's rows, chunk under chunk. Logits are wanted of the rows that draw, or of `every_row`.

    `drawn_ids`, [rows] on the device, are the rows' tokens where the host does not know them yet.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    cells: list[int] = []
    spans: list[AttentionSpan] = []
    drawing_rows: list[int] = []
    for chunk in batch.chunks:
        sequence, blocks = chunk.sequence, chunk.sequence.blocks
        first_row = len(token_ids)
        num_prompt_rows = max(0, min(chunk.end, sequence.num_prompt_tokens) - chunk.start)
        spans.append(AttentionSpan(first_row, chunk.num_tokens, chunk.start, num_prompt_rows, blocks))
        token_ids += chunk.token_ids
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            positions.append(position)
            cells.append(blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        if every_row:
            drawing_rows += range(first_row, len(token_ids))
        elif chunk.draws:
            drawing_rows += range(len(token_ids) - chunk.num_draws, len(token_ids))
    inputs = StepRows(token_ids, positions, cells, spans, drawing_rows).to(device)
    return inputs if drawn_ids is None else replace(inputs, token_ids=drawn_ids, rows=None)
