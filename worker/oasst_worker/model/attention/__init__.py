"""Attention over a block KV cache: the plain path for any device, and faster ones where they can be had."""

import logging

import torch

from oasst_worker.model.attention.compiled import CompiledAttention, attention_kernel
from oasst_worker.model.attention.interface import FP8, INT8, Attend, Attention, kv_bytes
from oasst_worker.model.attention.paged import PagedAttention
from oasst_worker.model.attention.plain import PREFILL_TILE, PlainAttention
from oasst_worker.model.attention.trial import try_attention
from oasst_worker.model.config import NeoXConfig

__all__ = [
    "FP8",
    "INT8",
    "PREFILL_TILE",
    "Attend",
    "Attention",
    "CompiledAttention",
    "PagedAttention",
    "PlainAttention",
    "attention_kernel",
    "build_attention",
    "kv_bytes",
    "try_attention",
]

_log = logging.getLogger(__name__)


def build_attention(
    config: NeoXConfig, *, dtype: torch.dtype, device: torch.device, kv_dtype: torch.dtype | None = None
) -> Attention:
    """The best way for this device and dtype on this machine; the cache in `dtype`, or in FP8 or INT8."""
    try:
        if device.type == "cpu":
            return CompiledAttention(config, dtype=dtype, kv_dtype=kv_dtype)
        return _tried_on_device(config, dtype=dtype, device=device, kv_dtype=kv_dtype)
    except RuntimeError as error:
        _log.warning("attention runs on the plain path: %s", error)
    return PlainAttention(config, dtype=dtype, device=device, kv_dtype=kv_dtype)


def _tried_on_device(
    config: NeoXConfig, *, dtype: torch.dtype, device: torch.device, kv_dtype: torch.dtype | None
) -> Attention:
    try:
        try_attention(PagedAttention, config, dtype=dtype, device=device, kv_dtype=kv_dtype)
        return PagedAttention(config, dtype=dtype, device=device, kv_dtype=kv_dtype)
    except Exception as error:  # Triton, the compilers it starts and the driver each raise their own.
        raise RuntimeError(str(error)) from error
