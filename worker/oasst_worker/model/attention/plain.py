"""Attention over a block KV cache, in PyTorch's own operators: the plain path, for any device.

Batch mates must not change a sequence's bits, so no product ever spans two sequences, and what a position attends
with depends only on that position:

- a generated token attends by itself, one query over the positions up to its own;
- a prompt attends in tiles: fixed ranges of `PREFILL_TILE` positions counted from the prompt's start, the last one cut
  off by the prompt's end.

However a prompt is cut into chunks, whatever else runs, and when a preempted or resumed sequence is computed again,
each position meets the same operators with the same shapes.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from oasst_worker.model.attention.interface import FP8, INT8, Attend, from_int8, rotary_table, to_fp8, to_int8
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import BLOCK_SIZE, AttentionSpan, StepInputs

__all__ = ["PREFILL_TILE", "PlainAttention"]

PREFILL_TILE = 64


class PlainAttention:
    """Operators of PyTorch, sequence by sequence.

    The cache is [layers, 2, heads, positions, head_dim], keys before values: a sequence whose blocks follow each other
    is read as a plain view of every head, without copying. In fp8 and int8 what a position attends to is copied and
    widened; in int8 the four bytes of its scale stand behind each key and value.
    """

    is_position_exact = False

    def __init__(
        self, config: NeoXConfig, *, dtype: torch.dtype, device: torch.device, kv_dtype: torch.dtype | None = None
    ) -> None:
        """`kv_dtype` is the cache's: FP8, INT8, or `dtype` itself, as without it."""
        self._config = config
        self._dtype = dtype
        self._kv_dtype = kv_dtype or dtype
        self._device = device
        cos, sin = rotary_table(config, device)
        # What is to be narrowed is rounded once, from fp32.
        rotated_dtype = torch.float32 if self._kv_dtype in (FP8, INT8) else dtype
        self._cos, self._sin = cos.to(rotated_dtype), sin.to(rotated_dtype)

    def make_cache(self, num_blocks: int) -> Tensor:
        config = self._config
        size = config.head_dim + (torch.float32.itemsize if self._kv_dtype is INT8 else 0)
        shape = (config.num_layers, 2, config.num_heads, num_blocks * BLOCK_SIZE, size)
        return torch.empty(shape, dtype=self._kv_dtype, device=self._device)

    def prepare(self, inputs: StepInputs) -> Attend:
        cos, sin = self._cos[inputs.positions, None], self._sin[inputs.positions, None]
        groups = [group for span in inputs.spans for group in self._groups(span)]

        def attend(qkv: Tensor, cache: Tensor) -> Tensor:
            rows, heads, head_dim = qkv.shape[0], self._config.num_heads, self._config.head_dim
            qkv = qkv.view(rows, 3 * heads, head_dim).to(cos.dtype)
            _rotate_(qkv[:, : 2 * heads, : self._config.rotary_dim], cos, sin)
            keys_values = qkv[:, heads:].view(rows, 2, heads, head_dim).permute(1, 2, 0, 3)
            # Few operators know fp8; those that only move it take it for bytes.
            stored = cache.view(torch.uint8) if self._kv_dtype is FP8 else cache
            stored.index_copy_(2, inputs.cells, self._narrowed(keys_values))
            queries = qkv[:, :heads].to(self._dtype)
            attended = queries.new_empty(rows, heads * head_dim)
            for own_rows, cells, is_prompt in groups:
                keys, values = self._widened(stored[:, None, :, cells]).unbind()
                attend_group = _attend_prompt_tile if is_prompt else _attend_token
                outcome = attend_group(queries[own_rows].transpose(0, 1)[None], keys, values)
                attended[own_rows] = outcome[0].transpose(0, 1).flatten(1)
            return attended

        return attend

    def _narrowed(self, keys_values: Tensor) -> Tensor:
        if self._kv_dtype is INT8:
            return to_int8(keys_values)
        return to_fp8(keys_values).view(torch.uint8) if self._kv_dtype is FP8 else keys_values

    def _widened(self, stored: Tensor) -> Tensor:
        if self._kv_dtype is INT8:
            return from_int8(stored, self._dtype)
        return stored.view(FP8).to(self._dtype) if self._kv_dtype is FP8 else stored

    def _groups(self, span: AttentionSpan) -> Iterator[tuple[slice, slice | Tensor, bool]]:
        """Rows that attend together, the cells they attend to, and whether they are a prompt's."""
        located = self._locate(span)
        prompt_end = span.start + span.num_prompt_rows
        start = span.start
        while start < span.start + span.num_rows:
            is_prompt = start < prompt_end
            end = min(start - start % PREFILL_TILE + PREFILL_TILE, prompt_end) if is_prompt else start + 1
            rows = slice(span.first_row + start - span.start, span.first_row + end - span.start)
            cells = slice(located.start, located.start + end) if isinstance(located, slice) else located[:end]
            yield rows, cells, is_prompt
            start = end

    def _locate(self, span: AttentionSpan) -> slice | Tensor:
        """The cells of the sequence's blocks: a run, or an index of each."""
        first, last = span.blocks[0], span.blocks[-1]
        if span.blocks == list(range(first, first + len(span.blocks))):
            return slice(first * BLOCK_SIZE, (last + 1) * BLOCK_SIZE)
        blocks = torch.tensor(span.blocks, dtype=torch.int64, device=self._device)
        return (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=self._device)).flatten()


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary position embedding in place, halves rotated against each other.

    x [rows, heads, rotary_dim]; cos and sin [rows, 1, rotary_dim].
    """
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1).mul_(sin)
    x.mul_(cos).add_(rotated)


def _attend_token(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One position attends to all positions up to its own.

    query [1, heads, 1, head_dim], keys and values [1, heads, length, head_dim]; returns [1, heads, 1, head_dim].
    """
    return F.scaled_dot_product_attention(query, keys, values)


def _attend_prompt_tile(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last `tile` positions of `length` attend, each to those up to its own.

    queries [1, heads, tile, head_dim], keys and values [1, heads, length, head_dim]; returns queries' shape. Scores and
    softmax in fp32.
    """
    tile, length = queries.shape[-2], keys.shape[-2]
    # Unscaled, a score may lie beyond fp16.
    scores = torch.matmul(queries.float(), keys.float().transpose(-1, -2)).mul_(1 / math.sqrt(queries.shape[-1]))
    future = torch.ones(tile, tile, dtype=torch.bool, device=scores.device).triu_(1)
    scores[..., length - tile :].masked_fill_(future, -math.inf)
    return torch.matmul(torch.softmax(scores, dim=-1).to(values.dtype), values)
