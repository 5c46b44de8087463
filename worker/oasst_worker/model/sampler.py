"""From logits to tokens: penalties, bans, the draw, log-probabilities.

A row's outcome depends on that row alone: neither the other rows nor their number change it.

Order of processing, as in transformers: repetition penalty, presence and frequency penalty, logit bias, bans,
temperature, top_k, top_p, min_p, typical_p. Temperature 0 takes the most likely token, the lowest id of equals.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from oasst_worker.model.philox import uniform_for
from oasst_worker.model.shortcuts import Columns, draw_from_bucket, draw_from_prefix
from oasst_worker.model.warpers import SamplingSpec, draw, warp

__all__ = [
    "Sampled",
    "Sampler",
    "SamplingRow",
    "SamplingSpec",
    "TokenLogprob",
    "processed_probabilities",
    "uniform_for",
]

# Lengths of the prefix tried one after the other; most rows are decided by the first.
_PREFIX_SIZES = (64, 1024, 4096)

# Colder is greedy: dividing logits by less would overflow fp32.
_COLDEST_TEMPERATURE = 1e-30
_LARGEST_SCORE = 1e38


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


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A drawn token's log-probability by the raw logits, and the most likely tokens with theirs, best first."""

    logprob: float
    alternatives: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a batch drew, one entry per row."""

    # None where the row's logits are not finite numbers, or no token is left to draw.
    token_ids: list[int | None]
    # None where the row asked for none or drew nothing.
    logprobs: list[TokenLogprob | None]

    @property
    def bad_rows(self) -> list[int]:
        """Rows that drew nothing."""
        return [row for row, token_id in enumerate(self.token_ids) if token_id is None]


class Sampler:
    """Draws the next token of many rows at once."""

    def __init__(self, vocab_size: int, banned_token_ids: Iterable[int], device: torch.device | str = "cpu") -> None:
        """`banned_token_ids` are never drawn by any row: padding rows of the embedding, control ids."""
        self._vocab_size = vocab_size
        self._banned_token_ids = torch.tensor(sorted(banned_token_ids), dtype=torch.int64, device=device)

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
        """Returns one token per row of `logits` [rows, vocab] fp32, which are overwritten."""
        if logits.shape != (len(rows), self._vocab_size):
            raise ValueError(f"logits of shape {list(logits.shape)} for {len(rows)} rows of {self._vocab_size}")
        broken = _rows_not_finite(logits)
        asking = [row for row in range(len(rows)) if rows[row].params.logprobs is not None and row not in broken]
        log_probabilities = logits[asking].log_softmax(dim=1)

        _penalize(logits, rows)
        logits.index_fill_(1, self._banned_token_ids, -torch.inf)
        broken += [row for row in _undrawable_rows(logits, rows) if row not in broken]
        logits[broken] = 0.0  # Out of the others' way; what they draw is dropped.
        token_ids = [None if row in broken else token_id for row, token_id in enumerate(_draw(logits, rows))]
        logprobs: list[TokenLogprob | None] = [None] * len(rows)
        for row, of_row in zip(asking, log_probabilities, strict=True):
            logprobs[row] = _describe(of_row, token_ids[row], rows[row].params.logprobs or 0)
        return Sampled(token_ids, logprobs)


def processed_probabilities(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Returns the distribution [rows, vocab] from which each row is drawn, by the plain path.

    `logits` stay as they are. What a `Sampler` bans for all rows is not known here: name it in the rows.
    """
    logits = logits.clone()
    _penalize(logits, rows)
    probabilities = torch.zeros_like(logits)
    for of_row, scores, row in zip(probabilities, logits, rows, strict=True):
        if _is_greedy(row.params):
            of_row[scores.argmax()] = 1.0
        else:
            of_row.copy_(warp(scores, row.params).softmax(dim=0))
    return probabilities


def _is_greedy(params: SamplingSpec) -> bool:
    return params.temperature < _COLDEST_TEMPERATURE


def _rows_not_finite(logits: Tensor) -> list[int]:
    """Returns the rows that hold a NaN or an infinity."""
    # An infinity or NaN always reaches the sum; a finite row's sum may overflow, so suspects are looked at closely.
    suspects = (~logits.sum(dim=1).isfinite()).nonzero().flatten().tolist()
    return [row for row in suspects if not logits[row].isfinite().all()]


def _undrawable_rows(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Returns the rows where no token is left, or whose best score does not fit fp32 after temperature."""
    limits = [math.inf if _is_greedy(row.params) else _LARGEST_SCORE * min(row.params.temperature, 1.0) for row in rows]
    peaks = logits.amax(dim=1).abs().tolist()
    return [row for row, (peak, limit) in enumerate(zip(peaks, limits, strict=True)) if not peak < limit]


def _penalize(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Applies penalties, logit bias and the rows' own bans in place."""
    if seen := {i: row.seen_ids for i, row in enumerate(rows) if row.params.repetition_penalty != 1}:
        cells = _cells(seen, logits)
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


def _cells(ids_by_row: Mapping[int, Collection[int]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns row and column of each named logit, in order."""
    lengths = torch.tensor([len(ids) for ids in ids_by_row.values()])
    rows = torch.tensor(list(ids_by_row)).repeat_interleave(lengths)
    columns = torch.tensor(list(chain.from_iterable(ids_by_row.values())), dtype=torch.int64)
    return rows.to(logits.device), columns.to(logits.device)


def _values(values: Iterable[float], logits: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=logits.dtype, device=logits.device)


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Returns each row's token."""
    greedy = [index for index, row in enumerate(rows) if _is_greedy(row.params)]
    # The first of the highest, as argmax finds it; on a CPU in a third of its time.
    token_ids = dict(zip(greedy, _take(logits, greedy).max(dim=1).indices.tolist(), strict=True))
    for size in _PREFIX_SIZES:
        tried = [index for index, row in enumerate(rows) if index not in token_ids and _fits(row.params, size)]
        if not tried:
            continue
        params, uniforms = [rows[index].params for index in tried], [rows[index].uniform for index in tried]
        columns = Columns.of(params, uniforms, logits.device)
        drawn, decided = draw_from_prefix(_take(logits, tried), columns, size)
        for index, token_id, is_decided in zip(tried, drawn.tolist(), decided.tolist(), strict=True):
            if is_decided:
                token_ids[index] = token_id
    for index, row in enumerate(rows):
        if index not in token_ids:
            token_ids[index] = _draw_row(logits[index], row)
    return [token_ids[index] for index in range(len(rows))]


def _fits(params: SamplingSpec, size: int) -> bool:
    """Whether a prefix of this size can decide such a row, and does it for less than the plain path."""
    plain_path_sorts = params.top_p < 1 or params.typical_p < 1
    return params.top_k < size and (size == _PREFIX_SIZES[0] or params.top_k > 0 or plain_path_sorts)


def _draw_row(scores: Tensor, row: SamplingRow) -> int:
    warped = warp(scores, row.params)
    token_id = draw_from_bucket(warped, row.uniform)
    return draw(warped, row.uniform) if token_id is None else token_id


def _take(logits: Tensor, rows: list[int]) -> Tensor:
    """Returns these rows, without a copy if they are all."""
    return logits if len(rows) == len(logits) else logits[rows]


def _describe(log_probabilities: Tensor, token_id: int | None, num_alternatives: int) -> TokenLogprob | None:
    if token_id is None:
        return None
    best = log_probabilities.topk(min(num_alternatives, len(log_probabilities)))
    return TokenLogprob(
        logprob=float(log_probabilities[token_id]),
        alternatives=tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
    )
