"""From a batch to tensors: the rows of one step."""

from dataclasses import replace

import torch
from torch import Tensor

from oasst_worker.engine import Batch
from oasst_worker.model.inputs import BLOCK_SIZE, AttentionSpan, StepInputs, StepRows

__all__ = ["make_inputs", "make_rows"]


def make_inputs(batch: Batch, *, device: torch.device, drawn_ids: Tensor | None = None) -> StepInputs:
    """The step's rows on the device.

    `drawn_ids`, [rows] on the device, are the rows' tokens where the host does not know them yet.
    """
    inputs = make_rows(batch).to(device)
    return inputs if drawn_ids is None else replace(inputs, token_ids=drawn_ids, rows=None)


def make_rows(batch: Batch) -> StepRows:
    """The step's rows, chunk under chunk. Logits are wanted of those that draw."""
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
        if chunk.draws:
            drawing_rows += range(len(token_ids) - chunk.num_draws, len(token_ids))
    return StepRows(token_ids, positions, cells, spans, drawing_rows)
