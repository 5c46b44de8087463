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
    memory = _private_memory(shape, dtype)
    # Where the system has none, or none is allowed, small pages do.
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return _view(memory, shape, dtype)


def zeros_in_small_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that take memory only where they are written, as little as that takes: for a KV cache.

    A first write to a large page clears 2 MiB of it, while streams wait.
    """
    return _view(_private_memory(shape, dtype), shape, dtype)


def _private_memory(shape: tuple[int, ...], dtype: torch.dtype) -> mmap.mmap:
    """What `mmap` shares by default, the system counts as a file, which has rules of its own for large pages."""
    size = math.prod(shape) * dtype.itemsize
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _view(memory: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)
