"""What a draw asks of whole rows of logits, on a CPU by a compiled kernel.

It takes the place of `penalties.penalize` and of `shortcuts.find_likely` and `find_typical`, which go over all logits
once for each operator.
"""

import ctypes
import math
from array import array
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from oasst_worker.model.kernels import load_kernels
from oasst_worker.model.penalties import SamplingRow, joined_ids
from oasst_worker.model.shortcuts import Survey, is_greedy, is_typical, largest_logit, needs_sums

__all__ = ["SURVEY_KERNEL", "CompiledSurvey"]

SURVEY_KERNEL = ("draw",)  # What `load_kernels` is asked for.

# The kernel's chunks hold at least so many tokens.
_CHUNK = 16


class _Request(ctypes.Structure):
    """The kernel's `request`, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_rows", "vocabulary", "size")),
        *((name, ctypes.c_void_p) for name in ("kinds", "seen_starts", "seen", "moved_starts", "moved")),
        *((name, ctypes.c_void_p) for name in ("temperatures", "limits", "penalties", "moves", "banned")),
        ("num_banned", ctypes.c_int64),
    )


class _Answer(ctypes.Structure):
    """The kernel's `answer`, field for field."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("is_good", "ids", "logits", "peaks", "totals", "moments"))


class CompiledSurvey:
    """By `kernels/draw.c`, a row after the other, all threads at once.

    Raises:
        RuntimeError: at construction, where the kernel cannot be compiled.
    """

    def __init__(self, vocab_size: int, banned_token_ids: Iterable[int]) -> None:
        """`banned_token_ids` are never drawn by any row."""
        library = load_kernels(*SURVEY_KERNEL)
        if library is None:
            raise RuntimeError("no kernel for draws here")
        self._kernel = library.survey
        self._kernel.argtypes = (*(ctypes.c_void_p,) * 3, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        self._kernel.restype = ctypes.c_int64
        self._vocab_size = vocab_size
        self._banned = array("q", banned_token_ids)

    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow], size: int) -> tuple[Survey, Tensor]:
        """The `size` most likely or most typical tokens of each row, and which rows may be drawn from, [rows] int64.

        `logits` [rows, vocab] fp32, contiguous, have penalties and bans applied afterwards.

        Raises:
            IndexError: if a row names a token id that is not in the vocabulary.
        """
        count, size = len(rows), min(size, self._vocab_size)
        moves = [_moves(row) for row in rows]
        seen = [row.seen_ids if row.params.repetition_penalty != 1 else () for row in rows]
        moved = [ids for ids, _ in moves]
        lists = (
            array("q", (is_typical(row.params) and not is_greedy(row.params) for row in rows)),
            _starts(seen),
            joined_ids(seen),
            _starts(moved),
            joined_ids(moved),
            array("f", (_temperature_of_sums(row) for row in rows)),
            array("f", (largest_logit(row.params) for row in rows)),
            array("f", (row.params.repetition_penalty for row in rows)),
            array("f", chain.from_iterable(values for _, values in moves)),
            self._banned,
        )
        request = _Request(count, self._vocab_size, size, *(each.buffer_info()[0] for each in lists), len(self._banned))
        is_good = torch.empty(count, dtype=torch.int64)
        ids = torch.empty(count, size, dtype=torch.int64)
        best = torch.empty(count, size)
        sums = torch.zeros(3, count, 1, dtype=torch.float64)
        answer = _Answer(*(each.data_ptr() for each in (is_good, ids, best, *sums)))
        threads = min(torch.get_num_threads(), count)
        scratch_size = max(size + -(-self._vocab_size // _CHUNK), *map(len, seen))
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
        return Survey(size == self._vocab_size, ids, best, *sums), is_good


def _starts(ids_by_row: Sequence[Collection[int]]) -> "array[int]":
    return array("q", accumulate(map(len, ids_by_row), initial=0))


def _temperature_of_sums(row: SamplingRow) -> float:
    """0 where the draw needs none."""
    return 0.0 if is_greedy(row.params) or not needs_sums(row.params) else row.params.temperature


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
