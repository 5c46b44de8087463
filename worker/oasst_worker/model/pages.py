"""Memory that a step walks through: large pages, where the system has them."""

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["empty_in_large_pages"]


def empty_in_large_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised (in fact zero) tensor on the CPU, in Linux's transparent huge pages if they are to be had.

    A step reads every weight once and walks the KV cache block by block. In pages of 4 KiB that is a search of the page
    table each, and the processor's own prefetching ends at a page's end.
    """
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(1, count) * dtype.itemsize)
    # Where the system has none, or none is allowed, small pages do.
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
