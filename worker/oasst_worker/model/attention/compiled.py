"""Attention on a CPU by a compiled kernel: all sequences of a layer in one parallel region.

`kernels/attention.c` gives a row the same bits however it came to be computed: as part of a prompt or by itself, in
any chunk, beside any others, in any blocks, by any number of threads.
"""

import ctypes
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from oasst_worker.model.attention.interface import INT8, rotary_table
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import BLOCK_SIZE, StepInputs
from oasst_worker.model.kernels import QUERIES, ROWS, SIZES, TILE, load_kernels
from oasst_worker.model.pages import zeros_in_small_pages

__all__ = ["CompiledAttention", "PreparedAttention", "attention_kernel"]

# The dimensions of values are padded to vectors of 16.
_LANES = 16


# The definitions of caches in other numbers than the rows.
_CACHES: dict[torch.dtype, tuple[str, ...]] = {INT8: ("KV_INT8",)}


def attention_kernel(dtype: torch.dtype, kv_dtype: torch.dtype) -> tuple[str, ...] | None:
    """What `load_kernels` is asked for; None where there is no such kernel."""
    if dtype not in ROWS or (kv_dtype is not dtype and kv_dtype not in _CACHES):
        return None
    return ("attention", *SIZES, *ROWS[dtype], *_CACHES.get(kv_dtype, ()))


class _Step(ctypes.Structure):
    """The kernel's `step`, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_rows", "num_tasks", "num_threads")),
        *((name, ctypes.c_int64) for name in ("heads", "head_dim", "rotary_dim", "scratch_size")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "positions", "cells", "spans", "blocks")),
        *((name, ctypes.c_void_p) for name in ("task_spans", "task_rows", "scratch")),
    )


class CompiledAttention:
    """The kernel of `kernels/attention.c`.

    The cache is [layers, blocks, 2, heads, BLOCK_SIZE * head_dim rounded up to 16]: keys of a block by dimension,
    values by position. In int8 the fp32 scales of a block's positions stand before its numbers.

    Raises:
        RuntimeError: at construction, where the kernel cannot be had for these dtypes on this machine.
    """

    is_position_exact = True

    def __init__(self, config: NeoXConfig, *, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> None:
        """`kv_dtype` is the cache's: INT8, or `dtype` itself, as without it."""
        self._kv_dtype = kv_dtype or dtype
        kernel = attention_kernel(dtype, self._kv_dtype)
        library = load_kernels(*kernel) if kernel else None
        if library is None:
            raise RuntimeError(f"no attention kernel for rows of {dtype} and a cache of {self._kv_dtype} here")
        # Of `attend_rows_of_step`, for a team that has begun already.
        self.address = ctypes.cast(library.attend_rows_of_step, ctypes.c_void_p).value
        self._kernel = library.attend
        self._kernel.argtypes = (ctypes.c_void_p,) * 4
        self._kernel.restype = None
        self._config = config
        self._cos, self._sin = rotary_table(config, torch.device("cpu"))

    def make_cache(self, num_blocks: int) -> Tensor:
        config = self._config
        padded = -(-config.head_dim // _LANES) * _LANES
        scales = BLOCK_SIZE * torch.float32.itemsize if self._kv_dtype is INT8 else 0
        shape = (config.num_layers, num_blocks, 2, config.num_heads, scales + BLOCK_SIZE * padded)
        return zeros_in_small_pages(*shape, dtype=self._kv_dtype)

    def prepare(self, inputs: StepInputs) -> "PreparedAttention":
        spans: list[int] = []
        blocks: list[int] = []
        task_spans: list[int] = []
        task_rows: list[int] = []
        for number, span in enumerate(inputs.spans):
            spans += (span.first_row, span.num_rows, span.start, len(blocks))
            blocks += span.blocks
            rows = range(0, span.num_rows, TILE)
            task_rows += rows
            task_spans += [number] * len(rows)
        num_threads = torch.get_num_threads()
        longest = max(span.start + span.num_rows for span in inputs.spans)
        scratch_size = self._config.head_dim + -(-longest // BLOCK_SIZE) * BLOCK_SIZE
        lists = (spans, blocks, task_spans, task_rows)
        arrays = (
            self._cos,
            self._sin,
            inputs.positions,
            inputs.cells,
            *torch.split(torch.tensor([*chain(*lists)]), [*map(len, lists)]),
            torch.empty(num_threads * 2 * QUERIES * scratch_size),
        )
        step = _Step(
            len(inputs.positions),
            len(task_rows),
            num_threads,
            self._config.num_heads,
            self._config.head_dim,
            self._config.rotary_dim,
            scratch_size,
            *(array.data_ptr() for array in arrays),
        )
        return PreparedAttention(self._kernel, step, arrays)


class PreparedAttention:
    """A step and the arrays it points to, alive together."""

    def __init__(self, kernel: Callable[..., None], step: _Step, arrays: tuple[Tensor, ...]) -> None:
        self._kernel = kernel
        self.address = ctypes.addressof(step)  # Of the kernel's `step`.
        self._alive = (step, arrays)

    def __call__(self, qkv: Tensor, cache: Tensor) -> Tensor:
        attended = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        self._kernel(self.address, qkv.data_ptr(), cache.data_ptr(), attended.data_ptr())
        return attended
