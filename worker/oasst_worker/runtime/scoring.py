"""The targets of a batch: which rows score them, and what the model says of each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oasst_worker.engine import Batch, Scores, TargetScore
from oasst_worker.model.scorer import score_targets

__all__ = ["BatchTargets", "find_targets", "score_batch"]

# Rows whose logits are in memory at once: at 50,288 tokens 26 MB of fp32, and as much of log-probabilities.
_ROWS_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class BatchTargets:
    """All targets of a batch, chunk under chunk."""

    rows: Sequence[int]  # Of the batch, those whose logits are wanted.
    target_rows: Sequence[int]  # Which of `rows` scores each target; never falls.
    target_ids: Sequence[int]
    num_by_chunk: Sequence[int]  # Targets of each chunk that has some.


def find_targets(batch: Batch) -> BatchTargets:
    rows: list[int] = []
    target_rows: list[int] = []
    target_ids: list[int] = []
    num_by_chunk: list[int] = []
    first_row = 0
    for chunk in batch.chunks:
        targets = chunk.targets
        for target in targets:
            row = first_row + target.position - chunk.start
            if not rows or rows[-1] != row:
                rows.append(row)
            target_rows.append(len(rows) - 1)
            target_ids.append(target.token_id)
        if targets:
            num_by_chunk.append(len(targets))
        first_row += chunk.num_tokens
    return BatchTargets(rows, target_rows, target_ids, num_by_chunk)


def score_batch(targets: BatchTargets, hidden: Tensor, to_logits: Callable[[Tensor], Tensor]) -> list[Scores]:
    """One entry for each chunk with targets, in order; `hidden` are the batch's rows."""
    scores = [score for part in _parts(targets, hidden, to_logits) for score in part]
    of_chunks, start = [], 0
    for num_targets in targets.num_by_chunk:
        of_chunk = scores[start : start + num_targets]
        of_chunks.append(Scores(None if None in of_chunk else [score for score in of_chunk if score is not None]))
        start += num_targets
    return of_chunks


def _parts(
    targets: BatchTargets, hidden: Tensor, to_logits: Callable[[Tensor], Tensor]
) -> Iterator[list[TargetScore | None]]:
    """Scores of the targets of a few rows at a time; None where a row is not finite."""
    device = hidden.device
    rows = torch.tensor(targets.rows, dtype=torch.int64, device=device)
    target_rows = torch.tensor(targets.target_rows, dtype=torch.int64, device=device)
    target_ids = torch.tensor(targets.target_ids, dtype=torch.int64, device=device)
    for start in range(0, len(targets.rows), _ROWS_AT_ONCE):
        end = min(start + _ROWS_AT_ONCE, len(targets.rows))
        within = (target_rows >= start) & (target_rows < end)
        logits = to_logits(hidden[rows[start:end]])
        scored = score_targets(logits, target_rows[within] - start, target_ids[within])
        yield [
            TargetScore(logprob, is_best) if is_finite else None
            for logprob, is_best, is_finite in zip(*(each.tolist() for each in scored), strict=True)
        ]
