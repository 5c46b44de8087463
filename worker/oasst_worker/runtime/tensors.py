"""From a batch to tensors: rows, cache positions and attention spans of one step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from oasst_worker.engine import Batch, Chunk
from oasst_worker.engine.blocks import BlockTable
from oasst_worker.model.neox import AttentionSpan, StepInputs

__all__ = ["make_inputs"]


def make_inputs(
    batch: Batch, *, block_size: int, prefill_tile: int, device: torch.device, every_row: bool = False
) -> StepInputs:
    """The step's rows, chunk under chunk. Logits are wanted of the rows that draw, or of `every_row`."""
    token_ids: list[int] = []
    positions: list[int] = []
    cache_positions: list[int] = []
    spans: list[AttentionSpan] = []
    drawing_rows: list[int] = []
    for chunk in batch.chunks:
        first_row = len(token_ids)
        located = _cache_positions(chunk.sequence.table, chunk.end, block_size, device)
        token_ids += chunk.sequence.token_ids[chunk.start : chunk.end]
        positions += range(chunk.start, chunk.end)
        cache_positions += (
            range(located.start + chunk.start, located.stop)
            if isinstance(located, slice)
            else located[chunk.start :].tolist()
        )
        for start, end, is_prompt in _spans(chunk, prefill_tile):
            attended = slice(located.start, located.start + end) if isinstance(located, slice) else located[:end]
            spans.append(AttentionSpan(first_row + start - chunk.start, end - start, attended, is_prompt))
        if every_row:
            drawing_rows += range(first_row, len(token_ids))
        elif chunk.draws:
            drawing_rows.append(len(token_ids) - 1)
    rows = torch.tensor([token_ids, positions, cache_positions], dtype=torch.int64).to(device, non_blocking=True)
    return StepInputs(
        token_ids=rows[0],
        positions=rows[1],
        cache_positions=rows[2],
        spans=spans,
        drawing_rows=torch.tensor(drawing_rows, dtype=torch.int64, device=device),
    )


def _spans(chunk: Chunk, prefill_tile: int) -> Iterator[tuple[int, int, bool]]:
    """The chunk's ranges (start, end, is_prompt) that attend together, as `oasst_worker.model.attention` wants them."""
    prompt_end = chunk.sequence.num_prompt_tokens
    start = chunk.start
    while start < min(chunk.end, prompt_end):
        end = min(start - start % prefill_tile + prefill_tile, chunk.end, prompt_end)
        yield start, end, True
        start = end
    for position in range(start, chunk.end):
        yield position, position + 1, False


def _cache_positions(table: BlockTable, num_tokens: int, block_size: int, device: torch.device) -> slice | Tensor:
    """Where the first `num_tokens` positions lie in the cache."""
    if table.is_contiguous:
        first = table.blocks[0] * block_size
        return slice(first, first + num_tokens)
    blocks = torch.tensor(table.blocks, dtype=torch.int64, device=device)
    offsets = torch.arange(block_size, device=device)
    return (blocks[:, None] * block_size + offsets).flatten()[:num_tokens]
