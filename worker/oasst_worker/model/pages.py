"""Memory that a step walks through, page by page."""

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["zeros_in_large_pages", "zeros_in_small_pages"]


def zeros_in_large_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, in Linux's transparent huge pages if they are to be had: for what is read as a whole.

    A step reads every weight once. In pages of 4 KiB that is a search of the page table each, and the processor's own
    prefetching ends at a page's end.
    """
    return _zeros(shape, dtype, advice="MADV_HUGEPAGE")


def zeros_in_small_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that take memory only where they are written, as little as that takes: for a KV cache.

    A first write to a large page clears 2 MiB of it, while streams wait.
    """
    return _zeros(shape, dtype, advice="MADV_NOHUGEPAGE")


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, *, advice: str) -> Tensor:
    """By default `mmap` maps shared memory, for which Linux has separate rules of huge pages; hence MAP_PRIVATE."""
    size = math.prod(shape)
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # The system need not know the advice, nor follow it.
        memory.madvise(getattr(mmap, advice))
    return torch.frombuffer(memory, dtype=dtype, count=size).view(shape)
