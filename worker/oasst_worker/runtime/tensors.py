"""From a batch to tensors: the rows of one step."""

import torch
from torch import Tensor

from oasst_worker.engine import Batch
from oasst_worker.model.inputs import BLOCK_SIZE, AttentionSpan, StepInputs
from oasst_worker.model.transfer import to_device

__all__ = ["make_inputs"]


def make_inputs(
    batch: Batch, *, device: torch.device, every_row: bool = False, token_ids: Tensor | None = None
) -> StepInputs:
    """The step's rows, chunk under chunk. Logits are wanted of the rows that draw, or of `every_row`.

    `token_ids`, [rows] on the device, are the rows' own where the host does not know them yet.
    """
    known_ids: list[int] = []
    num_rows = 0
    positions: list[int] = []
    cells: list[int] = []
    spans: list[AttentionSpan] = []
    drawing_rows: list[int] = []
    for chunk in batch.chunks:
        sequence, blocks = chunk.sequence, chunk.sequence.blocks
        first_row, num_rows = num_rows, num_rows + chunk.num_tokens
        num_prompt_rows = max(0, min(chunk.end, sequence.num_prompt_tokens) - chunk.start)
        spans.append(AttentionSpan(first_row, chunk.num_tokens, chunk.start, num_prompt_rows, blocks))
        known_ids += sequence.token_ids[chunk.start : chunk.end]
        known_ids += chunk.drafts
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            positions.append(position)
            cells.append(blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        if every_row:
            drawing_rows += range(first_row, num_rows)
        elif chunk.draws:
            drawing_rows += range(num_rows - chunk.num_draws, num_rows)
    places = to_device([positions, cells], torch.int64, device)
    return StepInputs(
        token_ids=to_device(known_ids, torch.int64, device) if token_ids is None else token_ids,
        positions=places[0],
        cells=places[1],
        spans=spans,
        drawing_rows=to_device(drawing_rows, torch.int64, device),
    )
