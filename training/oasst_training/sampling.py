"""Which rows each micro batch has. It depends on seed and number alone, so a run can begin at any of them."""

from collections.abc import Sequence

import torch

__all__ = ["SampleOrder", "micro_batch_seed"]

# With `sort_by_length`: rows of so many micro batches are sorted together, so that order and lengths stay random.
_SORTED_TOGETHER = 16


class SampleOrder:
    """All rows in random order, epoch after epoch, in micro batches of equal size.

    The last micro batch of an epoch is filled with rows from its beginning.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int, sort_by_length: bool = False) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._sort_by_length = sort_by_length
        self._epoch = -1
        self._batches: list[list[int]] = []

    @property
    def num_batches_per_epoch(self) -> int:
        return -(-len(self._lengths) // self._batch_size)

    def micro_batch(self, number: int) -> list[int]:
        """The rows, by index, of a micro batch. They are counted from 0 over all epochs."""
        epoch, position = divmod(number, self.num_batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._draw(epoch)
        return self._batches[position]

    def _draw(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        size = self.num_batches_per_epoch * self._batch_size
        order = (order * -(-size // len(order)))[:size]
        if self._sort_by_length:
            order = self._sorted_in_runs(order)
        batches = [order[start : start + self._batch_size] for start in range(0, size, self._batch_size)]
        if self._sort_by_length:
            batches = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
        return batches

    def _sorted_in_runs(self, order: list[int]) -> list[int]:
        run = _SORTED_TOGETHER * self._batch_size
        runs = (order[start : start + run] for start in range(0, len(order), run))
        return [index for each in runs for index in sorted(each, key=self._lengths.__getitem__)]


def micro_batch_seed(rng_seed: int, number: int) -> int:
    """The seed of everything random in a micro batch: its windows and its dropout.

    Because it does not depend on who computes the micro batch, neither do they.
    """
    return rng_seed + number
