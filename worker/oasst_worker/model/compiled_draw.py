"""The draws of a batch on a CPU, by a compiled kernel.

It takes the place of `penalties.penalize` and of the prefix of 64 tokens in `shortcuts`, which go over all logits once
for each operator, and then over few numbers with many operators.
"""

import ctypes
import math
import struct
from array import array
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from oasst_worker.model.kernels import load_kernels
from oasst_worker.model.penalties import SamplingRow, joined_ids
from oasst_worker.model.shortcuts import is_greedy, is_typical, largest_logit

__all__ = ["DRAW_KERNEL", "PREFIX_SIZE", "CompiledDraw"]

DRAW_KERNEL = ("draw",)  # What `load_kernels` is asked for.

PREFIX_SIZE = 64  # Tokens among which the kernel draws.

# The kernel's chunks hold at least so many tokens.
_CHUNK = 16

_GREEDY, _LIKELY, _TYPICAL = range(3)
_SPEC = struct.Struct("2q7d")  # The kernel's `spec`, field for field.


class _Request(ctypes.Structure):
    """The kernel's `request`, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_rows", "vocabulary")),
        *((name, ctypes.c_void_p) for name in ("specs", "seen_starts", "seen", "moved_starts", "moved", "moves")),
        ("banned", ctypes.c_void_p),
        ("num_banned", ctypes.c_int64),
    )


class _Answer(ctypes.Structure):
    """The kernel's `answer`, field for field."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("token_ids", "is_decided", "is_good"))


class CompiledDraw:
    """By `kernels/draw.c`, a row after the other, all threads at once.

    Raises:
        RuntimeError: at construction, where the kernel cannot be compiled.
    """

    def __init__(self, vocab_size: int, banned_token_ids: Iterable[int]) -> None:
        """`banned_token_ids` are never drawn by any row."""
        library = load_kernels(*DRAW_KERNEL)
        if library is None:
            raise RuntimeError("no kernel for draws here")
        self._kernel = library.draw
        self._kernel.argtypes = (*(ctypes.c_void_p,) * 3, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        self._kernel.restype = ctypes.c_int64
        self._vocab_size = vocab_size
        self._banned = array("q", banned_token_ids)

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Returns [3, rows] int64: token ids, whether each is decided, and whether its row may be drawn from at all.

        `logits` [rows, vocab] fp32, contiguous, have penalties and bans applied afterwards.

        Raises:
            IndexError: if a row names a token id that is not in the vocabulary.
        """
        moves = [_moves(row) for row in rows]
        seen = [row.seen_ids if row.params.repetition_penalty != 1 else () for row in rows]
        moved = [ids for ids, _ in moves]
        lists = (
            array("b", b"".join(map(_pack, rows))),
            _starts(seen),
            joined_ids(seen),
            _starts(moved),
            joined_ids(moved),
            array("f", chain.from_iterable(values for _, values in moves)),
            self._banned,
        )
        addresses = (each.buffer_info()[0] for each in lists)
        request = _Request(len(rows), self._vocab_size, *addresses, len(self._banned))
        told = torch.empty(3, len(rows), dtype=torch.int64)
        answer = _Answer(*(each.data_ptr() for each in told))
        threads = min(torch.get_num_threads(), len(rows))
        scratch_size = max(-(-self._vocab_size // _CHUNK), *map(len, seen))
        scratch = torch.empty(threads, scratch_size)
        is_done = self._kernel(
            ctypes.addressof(request),
            ctypes.addressof(answer),
            logits.data_ptr(),
            threads,
            scratch.data_ptr(),
            scratch_size,
        )
        if not is_done:
            raise IndexError(f"a penalty or bias is for a token id that is none of {self._vocab_size}")
        return told


def _pack(row: SamplingRow) -> bytes:
    params = row.params
    kind = _GREEDY if is_greedy(params) else _TYPICAL if is_typical(params) else _LIKELY
    filters = (params.top_p, params.min_p, params.typical_p)
    limit, penalty = largest_logit(params), params.repetition_penalty
    return _SPEC.pack(kind, params.top_k, params.temperature, *filters, row.uniform, limit, penalty)


def _starts(ids_by_row: Sequence[Collection[int]]) -> "array[int]":
    return array("q", accumulate(map(len, ids_by_row), initial=0))


def _moves(row: SamplingRow) -> tuple[list[int], list[float]]:
    """Ids and what is added to their logits, in the order of `penalties.penalize` and in its fp32."""
    params = row.params
    ids: list[int] = []
    values: list[float] = []
    if params.presence_penalty or params.frequency_penalty:
        counts = np.fromiter(row.output_counts.values(), np.float32)
        ids += row.output_counts
        values += (-(np.float32(params.frequency_penalty) * counts + np.float32(params.presence_penalty))).tolist()
    ids += params.logit_bias
    values += params.logit_bias.values()
    ids += row.banned_ids
    values += [-math.inf] * len(row.banned_ids)
    return ids, values
