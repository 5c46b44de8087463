"""Attention over a KV cache, in shapes that depend on a sequence alone.

Batch mates must not change a sequence's bits, so no product ever spans two sequences, and what a position attends
with depends only on that position:

- a generated token attends by itself, one query over the positions up to its own;
- a prompt attends in tiles: fixed ranges of `prefill_tile` positions counted from the prompt's start, the last one cut
  off by the prompt's end.

However a prompt is cut into chunks, whatever else runs, and when a preempted or resumed sequence is computed again,
each position meets the same operators with the same shapes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend_prompt_tile", "attend_token"]


def attend_token(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One position attends to all positions up to its own.

    query [1, heads, 1, head_dim], keys and values [1, heads, length, head_dim]; returns [1, heads, 1, head_dim].
    """
    return F.scaled_dot_product_attention(query, keys, values)


def attend_prompt_tile(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last `tile` positions of `length` attend, each to those up to its own.

    queries [1, heads, tile, head_dim], keys and values [1, heads, length, head_dim]; returns queries' shape. Scores and
    softmax in fp32.
    """
    tile, length = queries.shape[-2], keys.shape[-2]
    scores = torch.matmul(queries, keys.transpose(-1, -2)).float().mul_(1 / math.sqrt(queries.shape[-1]))
    future = torch.ones(tile, tile, dtype=torch.bool, device=scores.device).triu_(1)
    scores[..., length - tile :].masked_fill_(future, -math.inf)
    return torch.matmul(torch.softmax(scores, dim=-1).to(values.dtype), values)
