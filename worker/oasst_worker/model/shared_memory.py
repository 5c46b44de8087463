"""Exchanges between ranks on the CPUs of one machine, through memory they share.

gloo takes a millisecond for a few kilobytes; `kernels/exchange.c` takes some microseconds.
"""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from oasst_worker.model.kernels import ROWS, load_kernels

__all__ = ["LostPartyError", "SharedMemory"]


class LostPartyError(RuntimeError):
    """A process that takes part in an exchange has ended."""


class _Party(ctypes.Structure):
    """The kernel's `party`, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("index", "count", "turn", "is_broken")),
        ("memory", ctypes.c_void_p),
    )


class SharedMemory:
    """One process's end of memory that it shares with others. All make the same calls in the same order.

    Raises:
        RuntimeError: at construction, where the kernel cannot be had for rows of this dtype, or not for so many.
        OSError: if the file cannot be opened, or there is no room for it.
    """

    def __init__(self, file: Path, index: int, count: int, dtype: torch.dtype) -> None:
        """This process is the `index`-th of `count`, which all name the same file. It may not exist yet."""
        library = load_kernels("exchange", *ROWS[dtype]) if dtype in ROWS else None
        if library is None:
            raise RuntimeError(f"no kernel to exchange rows of {dtype} here")
        library.size_of_memory.argtypes = (ctypes.c_int64,)
        library.size_of_memory.restype = ctypes.c_int64
        library.join.argtypes = (ctypes.c_void_p,)
        library.join.restype = None
        self._sum = library.sum
        self._sum.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        self._sum.restype = None
        self._gather_columns = library.gather_columns
        self._gather_columns.argtypes = (*(ctypes.c_void_p,) * 2, *(ctypes.c_int64,) * 3, ctypes.c_void_p)
        self._gather_columns.restype = None
        size = library.size_of_memory(count)
        if not size:
            raise RuntimeError(f"{count} processes are too many to share memory")
        with file.open("a+b") as opened:
            opened.truncate(size)  # To the same size by all, zeros at first.
            if sys.platform == "linux":  # Else a full file system would be noticed only by a signal, on writing.
                os.posix_fallocate(opened.fileno(), 0, size)
            self._memory = mmap.mmap(opened.fileno(), size)
        self.dtype = dtype
        self._is_first = index == 0
        # Of the kernel's `sum_by_team` and `party`, for other kernels; this object keeps them alive.
        self.sum_address = ctypes.cast(library.sum_by_team, ctypes.c_void_p).value
        self._party = _Party(index, count, 0, False, ctypes.addressof(ctypes.c_char.from_buffer(self._memory)))
        self.party_address = ctypes.addressof(self._party)
        library.join(self.party_address)

    def check(self) -> None:
        """What was exchanged so far has arrived.

        Raises:
            LostPartyError: if a process has ended.
        """
        if self._party.is_broken:
            raise LostPartyError("a process that shares this memory has ended")

    def sum_(self, part: Tensor) -> Tensor:
        """`part`, contiguous, becomes the sum of all processes' parts, in their order.

        Raises:
            LostPartyError: if a process has ended.
        """
        self._sum(self.party_address, torch.get_num_threads(), part.data_ptr(), part.numel())
        self.check()
        return part

    def gather_columns(self, part: Tensor, num_columns: int) -> Tensor:
        """[rows, width], contiguous, -> [rows, num_columns] at the first process; the others get their part back.

        Raises:
            LostPartyError: if a process has ended.
        """
        rows, width = part.shape
        out = part.new_empty(rows, num_columns) if self._is_first else None
        address = None if out is None else out.data_ptr()
        self._gather_columns(self.party_address, part.data_ptr(), rows, width, num_columns, address)
        self.check()
        return part if out is None else out
