"""What one step hands to the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from oasst_worker.model.transfer import to_device

__all__ = ["BLOCK_SIZE", "AttentionSpan", "DecodeInputs", "StepInputs", "StepRows"]

# Positions in a block of the KV cache.
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class AttentionSpan:
    """The rows of one sequence in a step: its positions from `start` on, prompt before generated."""

    first_row: int
    num_rows: int
    start: int
    num_prompt_rows: int
    # Where the sequence's keys and values lie, in the order of its positions; at least up to the last row's own.
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepRows:
    """One step's rows as the host knows them, in the words of StepInputs."""

    token_ids: Sequence[int]
    positions: Sequence[int]
    cells: Sequence[int]
    spans: Sequence[AttentionSpan]
    drawing_rows: Sequence[int]

    def to(self, device: torch.device) -> "StepInputs":
        """The same on a device, in one copy."""
        parts = (self.token_ids, self.positions, self.cells, self.drawing_rows)
        numbers = to_device([*chain.from_iterable(parts)], torch.int64, device)
        token_ids, positions, cells, drawing_rows = torch.split(numbers, [len(part) for part in parts])
        return StepInputs(token_ids, positions, cells, self.spans, drawing_rows, rows=self)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's rows, sequence under sequence. All tensors on the model's device."""

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64, in the sequence
    cells: Tensor  # [rows] int64, block * BLOCK_SIZE + offset: where each row's key and value go
    spans: Sequence[AttentionSpan]
    drawing_rows: Tensor  # [drawing] int64, the rows whose logits are wanted
    rows: StepRows | None = None  # The same on the host, if it knows the token ids.

    def to(self, device: torch.device) -> "StepInputs":
        """The same, where a part of the model is."""
        if self.token_ids.device == device:
            return self
        tensors = ("token_ids", "positions", "cells", "drawing_rows")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Rows that are one generated token each, told by tensors alone: what stands in them may change between steps."""

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64, in the sequence
    cells: Tensor  # [rows] int64, as in StepInputs
    block_table: Tensor  # [rows, blocks] int64: each row's blocks; behind its own position's, anything
