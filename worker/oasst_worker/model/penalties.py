"""What is done to a row's logits before temperature: penalties, logit bias, the row's own bans.

In this order, as in transformers: repetition penalty, presence and frequency penalty, logit bias, bans.
"""

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from oasst_worker.model.transfer import to_device
from oasst_worker.model.warpers import SamplingSpec

__all__ = ["SamplingRow", "joined_ids", "penalize"]


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row's draw depends on, besides its logits. Token ids must lie within the vocabulary."""

    params: SamplingSpec
    uniform: float  # The row's random number in [0, 1), see `uniform_for`; greedy rows ignore it.
    # Prompt and generated ids, for the repetition penalty; repeats do no harm.
    seen_ids: Collection[int] = ()
    # Generated id -> how often, for the presence and frequency penalties.
    output_counts: Mapping[int, int] = field(default_factory=dict)
    # Not to be drawn this time, such as end-of-text before min_new_tokens.
    banned_ids: Collection[int] = ()


def penalize(logits: Tensor, rows: Sequence[SamplingRow], last_ids: Tensor | None = None) -> None:
    """Changes `logits` [rows, vocab] in place. `last_ids` [rows] are ids that the rows have seen besides."""
    if seen := {i: row.seen_ids for i, row in enumerate(rows) if row.params.repetition_penalty != 1}:
        cells = _cells(seen, logits)
        if last_ids is not None:  # A cell that stands twice gets the same value twice.
            penalized = to_device(list(seen), torch.int64, logits.device)
            cells = torch.cat((cells[0], penalized)), torch.cat((cells[1], last_ids[penalized]))
        scores = logits[cells]
        penalties = _values((row.params.repetition_penalty for row in rows), logits)[cells[0]]
        logits[cells] = torch.where(scores < 0, scores * penalties, scores / penalties)
    if generated := {
        i: row.output_counts
        for i, row in enumerate(rows)
        if row.params.presence_penalty or row.params.frequency_penalty
    }:
        cells = _cells(generated, logits)
        counts = _values(chain.from_iterable(counts.values() for counts in generated.values()), logits)
        presence = _values((row.params.presence_penalty for row in rows), logits)[cells[0]]
        frequency = _values((row.params.frequency_penalty for row in rows), logits)[cells[0]]
        logits[cells] -= frequency * counts + presence
    if biased := {i: row.params.logit_bias for i, row in enumerate(rows) if row.params.logit_bias}:
        biases = _values(chain.from_iterable(bias.values() for bias in biased.values()), logits)
        logits[_cells(biased, logits)] += biases
    if banned := {i: row.banned_ids for i, row in enumerate(rows) if row.banned_ids}:
        logits[_cells(banned, logits)] = -torch.inf


def joined_ids(ids_by_row: Iterable[Collection[int]]) -> "array[int]":
    """The ids of all rows, one row's behind another's. Quick where they stand in arrays."""
    joined = array("q")
    for ids in ids_by_row:
        joined.extend(ids)
    return joined


def _cells(ids_by_row: Mapping[int, Collection[int]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns row and column of each named logit, in order."""
    rows = np.repeat(np.fromiter(ids_by_row, np.int64), [len(ids) for ids in ids_by_row.values()])
    columns = np.frombuffer(joined_ids(ids_by_row.values()), np.int64)
    cells = to_device(np.stack((rows, columns)), torch.int64, logits.device)
    return cells[0], cells[1]


def _values(values: Iterable[float], logits: Tensor) -> Tensor:
    return to_device(list(values), logits.dtype, logits.device)
