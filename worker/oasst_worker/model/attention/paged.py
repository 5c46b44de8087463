"""Attention on a GPU by kernels in Triton: the whole of a layer in two to four launches, whatever the sequences.

As on the plain path a prompt attends in tiles and a generated token by itself, so a sequence that is computed again
gets the bits it had (see `kernels/paged.py`).
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from oasst_worker.model.attention.interface import FP8, Attend, rotary_table
from oasst_worker.model.attention.plain import PREFILL_TILE
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import BLOCK_SIZE, DecodeInputs, StepInputs
from oasst_worker.model.transfer import to_device

__all__ = ["PagedAttention"]

# Positions of a generated token that one program attends to. Fixed, because the order of additions follows from it: of
# 128 a single sequence still gives every processor of a GPU something to do, and what the parts leave to be joined is
# a hundredth of what they read.
_PART_SIZE = 128
# What a program holds at once: keys where it attends, as bytes of each dimension, and heads where it writes.
_KEY_BYTES = 128
_HEADS_AT_ONCE = 8
_SMALLEST_VECTOR = 16


class PagedAttention:
    """The kernels of `kernels/paged.py`. The cache is [layers, blocks, 2, heads, BLOCK_SIZE, head_dim].

    In fp8 it is handed to them as bytes: before capability 8.9 Triton has no such type.

    Raises:
        RuntimeError: at construction, where Triton is not installed.
    """

    is_position_exact = False

    def __init__(
        self, config: NeoXConfig, *, dtype: torch.dtype, device: torch.device, kv_dtype: torch.dtype | None = None
    ) -> None:
        """`kv_dtype` is the cache's: FP8, or `dtype` itself, as without it."""
        try:
            from oasst_worker.model.kernels import paged  # Only PyTorch's builds for GPUs bring Triton.
        except ImportError as error:
            raise RuntimeError(f"Triton is not installed: {error}") from error
        self._kernels = paged
        self._config = config
        self._kv_dtype = kv_dtype or dtype
        self._device = device
        self._cos, self._sin = rotary_table(config, device)
        self._scale = math.log2(math.e) / math.sqrt(config.head_dim)
        self._sizes = {
            "heads": config.num_heads,
            "head_dim": config.head_dim,
            "dims": max(_SMALLEST_VECTOR, 1 << (config.head_dim - 1).bit_length()),
        }
        self._keys = _KEY_BYTES // dtype.itemsize

    def make_cache(self, num_blocks: int) -> Tensor:
        config = self._config
        shape = (config.num_layers, num_blocks, 2, config.num_heads, BLOCK_SIZE, config.head_dim)
        return torch.empty(shape, dtype=self._kv_dtype, device=self._device)

    def prepare(self, inputs: StepInputs) -> Attend:
        tiles: list[int] = []
        rows: list[int] = []
        block_starts: list[int] = []
        blocks: list[int] = []
        for span in inputs.spans:
            for row in range(0, span.num_prompt_rows, PREFILL_TILE):
                num_rows = min(PREFILL_TILE, span.num_prompt_rows - row)
                tiles += (span.first_row + row, num_rows, len(blocks))
            generated = range(span.first_row + span.num_prompt_rows, span.first_row + span.num_rows)
            rows += generated
            block_starts += [len(blocks)] * len(generated)
            blocks += span.blocks
        longest = max((span.start + span.num_rows for span in inputs.spans), default=0)
        sizes = [len(tiles), len(rows), len(rows), len(blocks)]
        numbers = to_device([*tiles, *rows, *block_starts, *blocks], torch.int32, self._device)
        return self._prepare(inputs.positions, inputs.cells, torch.split(numbers, sizes), longest)

    def prepare_decode(self, inputs: DecodeInputs) -> Attend:
        """As `prepare`, for whatever will stand in the inputs' tensors when a layer calls it."""
        num_rows, num_blocks = inputs.block_table.shape
        rows = torch.arange(num_rows, dtype=torch.int32, device=self._device)
        numbers = (rows[:0], rows, rows * num_blocks, inputs.block_table)
        return self._prepare(inputs.positions, inputs.cells, numbers, self._config.max_positions)

    def _prepare(self, positions: Tensor, cells: Tensor, numbers: Sequence[Tensor], longest: int) -> Attend:
        """`longest` is the highest number of positions that a row attends to."""
        tiles, rows, block_starts, blocks = numbers
        kernels, sizes, heads, head_dim = self._kernels, self._sizes, self._config.num_heads, self._config.head_dim
        num_parts = -(-longest // _PART_SIZE)
        # Used by one layer after the other.
        sums = torch.empty(len(rows), heads, num_parts, head_dim, device=self._device)
        peaks, weights = torch.empty(2, len(rows), heads, num_parts, device=self._device)

        def attend(qkv: Tensor, cache: Tensor) -> Tensor:
            queries = qkv.new_empty(len(qkv), heads * head_dim)
            stored = cache.view(torch.uint8) if self._kv_dtype is FP8 else cache
            attended = torch.empty_like(queries)
            with self._launching():
                kernels.write_rows[len(qkv), -(-heads // _HEADS_AT_ONCE)](
                    qkv,
                    self._cos,
                    self._sin,
                    positions,
                    cells,
                    queries,
                    stored,
                    **sizes,
                    rotary_dim=self._config.rotary_dim,
                    block_size=BLOCK_SIZE,
                    heads_at_once=_HEADS_AT_ONCE,
                )
                if len(tiles):
                    kernels.attend_tile[len(tiles) // 3, heads](
                        queries,
                        stored,
                        positions,
                        tiles,
                        blocks,
                        attended,
                        self._scale,
                        **sizes,
                        block_size=BLOCK_SIZE,
                        tile_size=PREFILL_TILE,
                        keys=self._keys,
                    )
                if len(rows):
                    kernels.attend_part[len(rows), heads, num_parts](
                        queries,
                        stored,
                        positions,
                        rows,
                        block_starts,
                        blocks,
                        sums,
                        peaks,
                        weights,
                        self._scale,
                        **sizes,
                        block_size=BLOCK_SIZE,
                        part_size=_PART_SIZE,
                        keys=self._keys,
                    )
                    kernels.join_parts[len(rows), heads](
                        sums, peaks, weights, positions, rows, attended, num_parts, **sizes, part_size=_PART_SIZE
                    )
            return attended

        return attend

    def _launching(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, which need not be the cache's own."""
        is_interpreted = self._device.type == "cpu"
        return nullcontext() if is_interpreted else torch.cuda.device(self._device)
