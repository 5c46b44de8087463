"""Whether a way to attend computes here what the plain one computes: tried before it serves."""

from collections.abc import Callable
from dataclasses import replace

import torch

from oasst_worker.model.attention.interface import FP8, Attention
from oasst_worker.model.attention.plain import PlainAttention
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import BLOCK_SIZE, AttentionSpan, StepInputs

__all__ = ["try_attention"]

# Positions at most: a prompt of several tiles, then tokens one by one, in blocks out of order.
_LENGTH, _GENERATED = 145, 5
_BLOCKS = (7, 2, 9, 0, 5, 1, 8, 3, 6, 4)
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# Of a key that two ways rotate to numbers a last bit apart, fp8 can hold two neighbours, an eighth apart.
_FP8_TOLERANCE = 6e-2


@torch.inference_mode()
def try_attention(
    make: Callable[..., Attention],
    config: NeoXConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype | None = None,
) -> None:
    """`make` makes an attention that agrees with the plain one, on random rows of the model's shape.

    Raises:
        RuntimeError: if it does not. What making or computing raises passes through.
    """
    config = replace(config, num_layers=1)
    generator = torch.Generator().manual_seed(0)
    length, width = min(_LENGTH, config.max_positions), 3 * config.num_heads * config.head_dim
    prompt_end = length - _GENERATED
    rows = torch.randn(length, width, generator=generator).to(device, dtype)
    outcomes = []
    for kind in (make, PlainAttention):
        attention = kind(config, dtype=dtype, device=device, kv_dtype=kv_dtype)
        cache = attention.make_cache(len(_BLOCKS))[0]
        steps = ((0, prompt_end, prompt_end), (prompt_end, length, 0))
        outcomes.append(
            torch.cat(
                [
                    attention.prepare(_inputs(start, end, num_prompt_rows, device))(rows[start:end].clone(), cache)
                    for start, end, num_prompt_rows in steps
                ]
            )
        )
    tried, expected = (outcome.float() for outcome in outcomes)
    tolerance = max(_TOLERANCES[dtype], _FP8_TOLERANCE if kv_dtype is FP8 else 0)
    if not torch.allclose(tried, expected, rtol=tolerance, atol=tolerance):
        raise RuntimeError(f"it differs from the plain path by up to {(tried - expected).abs().max():.2g} in {dtype}")


def _inputs(start: int, end: int, num_prompt_rows: int, device: torch.device) -> StepInputs:
    positions = torch.arange(start, end)
    cells = torch.tensor(_BLOCKS)[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    none = torch.zeros(end - start, dtype=torch.int64, device=device)
    span = AttentionSpan(0, end - start, start, num_prompt_rows, _BLOCKS)
    return StepInputs(none, positions.to(device), cells.to(device), [span], none)
