"""Batches that a device still computes."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from oasst_worker.engine import Batch, OutOfDeviceMemoryError, Sample, TokenLogprob
from oasst_worker.model.sampler import Draw, Sampled
from oasst_worker.model.transfer import Fetch, to_device

__all__ = ["DrawnBatch", "GivenTokens", "UndrawnBatch", "as_samples", "within_memory"]

_T = TypeVar("_T")


class DrawnBatch:
    """A batch of chunks that draw, an `oasst_worker.engine.Launched`."""

    def __init__(self, batch: Batch, draw: Draw, given: "GivenTokens | None" = None) -> None:
        """`given` are the chunks' own tokens, if the batch before draws them."""
        self._batch = batch
        self._draw = draw
        self._given = given
        self._sampled: Sampled | None = None

    def wait(self) -> Items[Sample | None]:
        """What was drawn; None behind another token than the batch before has drawn, once it was looked at.

        Raises:
            OutOfDeviceMemoryError: if the device has no memory left for a closer look.
        """
        self._sampled = within_memory(self._draw.wait)
        samples = as_samples(self._sampled)
        given, self._given = self._given, None  # Else each batch would keep all before it.
        if given is None:
            return samples
        return [sample if is_right else None for sample, is_right in zip(samples, given.are_right(), strict=True)]

    def given_to(self, batch: Batch) -> "GivenTokens":
        """What this batch draws for the sequences of a batch behind it, a chunk each."""
        row_of = {chunk.sequence: row for row, chunk in enumerate(self._batch.chunks)}
        rows = [row_of[chunk.sequence] for chunk in batch.chunks]
        token_ids = self._draw.token_ids
        return GivenTokens(self, rows, token_ids[to_device(rows, torch.int64, token_ids.device)])

    def is_final(self, row: int) -> bool:
        """The device had drawn the row's token before anybody looked at it. This batch was waited for."""
        sampled = self._sampled
        return sampled is not None and sampled.token_ids[row] == sampled.at_once[row]


class UndrawnBatch:
    """A batch of chunks of which none draws, an `oasst_worker.engine.Launched`."""

    def __init__(self, logits: Tensor) -> None:
        """`logits` [0, vocab] are the batch's: no numbers, which come to the host when it is computed all the same."""
        self._fetch = Fetch(logits)

    def wait(self) -> Items[Sample]:
        """Nothing, once keys and values of every chunk are in the cache."""
        self._fetch.wait()
        return ()


@dataclass(frozen=True, slots=True)
class GivenTokens:
    """The tokens that a batch begins with, which the one before draws."""

    before: DrawnBatch
    rows: list[int]  # Of that one, for each chunk.
    token_ids: Tensor  # [chunks] int64, on the device

    def are_right(self) -> list[bool]:
        """Whether each is what was drawn in the end. The batch before was waited for."""
        return [self.before.is_final(row) for row in self.rows]


def as_samples(sampled: Sampled) -> list[Sample]:
    """The same in the engine's words."""
    return [
        Sample(token_id, TokenLogprob(logprob.logprob, logprob.alternatives) if logprob else None)
        for token_id, logprob in zip(sampled.token_ids, sampled.logprobs, strict=True)
    ]


def within_memory(compute: Callable[[], _T]) -> _T:
    """What is computed.

    Raises:
        OutOfDeviceMemoryError: if the device has no memory left for it.
    """
    try:
        return compute()
    except torch.OutOfMemoryError as error:
        message = str(error)
    # Behind the handler, whose traceback holds the tensors of what failed.
    torch.cuda.empty_cache()
    raise OutOfDeviceMemoryError(message)
