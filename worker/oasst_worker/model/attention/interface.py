"""What the model asks of a way to attend."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import StepInputs
from oasst_worker.model.scales import int8_scales

__all__ = ["FP8", "INT8", "Attend", "Attention", "from_int8", "kv_bytes", "rotary_table", "to_fp8", "to_int8"]

# What a cache may hold instead of the model's dtype: e4m3, without scales. Its precision is relative, so a scale would
# add range alone.
FP8 = torch.float8_e4m3fn
# Or whole numbers, with an fp32 scale for each key and each value of a head: its largest number is 127 or -127.
INT8 = torch.int8
_SCALE_BYTES = 4

# One layer of one step. From `qkv` [rows, 3 * hidden] and the layer's cache to [rows, hidden]: queries and keys are
# rotated, keys and values stand in the cache, and every row has attended to the positions up to its own. `qkv` may be
# overwritten.
Attend = Callable[[Tensor, Tensor], Tensor]


class Attention(Protocol):
    """A way to attend, with the layout of the KV cache that it needs."""

    @property
    def is_position_exact(self) -> bool:
        """A row's bits depend on its own positions alone, be it a prompt's or generated, in any chunk."""
        ...

    def make_cache(self, num_blocks: int) -> Tensor:
        """A cache of all layers, one at each index. Not initialised: no position is read before it was written."""
        ...

    def prepare(self, inputs: StepInputs) -> Attend:
        """What every layer of this step calls."""
        ...


def to_fp8(x: Tensor) -> Tensor:
    """`x` in FP8, rounded to the nearest and ties to even. What is too large becomes the largest, +-448.

    FP8 knows no infinity: what is not finite becomes NaN, so that a broken sequence is still seen to be one.
    """
    largest = torch.finfo(FP8).max
    return torch.where(x.isfinite(), x.clamp(-largest, largest), torch.nan).to(FP8)


def to_int8(x: Tensor) -> Tensor:
    """[..., size] as [..., size + 4] int8: whole numbers, then the bytes of the scale they are to be multiplied by.

    Rounded to the nearest, ties to even. Where a number is not finite the scale is NaN.
    """
    x = x.float()
    scales = int8_scales(x)
    return torch.cat(((x / scales).nan_to_num().round().to(INT8), scales.view(INT8)), dim=-1)


def from_int8(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_int8` made, in `dtype`."""
    scales = stored[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return (stored[..., :-_SCALE_BYTES] * scales).to(dtype)


def kv_bytes(config: NeoXConfig, kv_dtype: torch.dtype) -> int:
    """Of a position's keys and values in one layer of a cache."""
    scales = 2 * config.num_heads * _SCALE_BYTES if kv_dtype is INT8 else 0
    return 2 * config.hidden_size * kv_dtype.itemsize + scales


def rotary_table(config: NeoXConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, [max_positions, rotary_dim] each, fp32."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device) / config.rotary_dim
    frequencies = 1.0 / (config.rotary_base**exponents)
    positions = torch.arange(config.max_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()
