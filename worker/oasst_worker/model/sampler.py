"""From logits to tokens: penalties, bans, the draw, log-probabilities.

A row's outcome depends on that row alone: neither the other rows nor their number change it.

Order of processing, as in transformers: repetition penalty, presence and frequency penalty, logit bias, bans,
temperature, top_k, top_p, min_p, typical_p. Temperature 0 takes the most likely token, the lowest id of equals.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat

import numpy as np
import torch
from torch import Tensor

from oasst_worker.model.philox import uniform_for
from oasst_worker.model.shortcuts import Columns, draw_from_bucket, draw_from_prefix
from oasst_worker.model.transfer import Fetch, to_device
from oasst_worker.model.warpers import SamplingSpec, draw, warp

__all__ = [
    "Draw",
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
    # What the device told before anybody looked: another token where that did not decide the row.
    at_once: list[int]

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

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
        """Returns one token per row of `logits` [rows, vocab] fp32, which are overwritten."""
        return self.launch(logits, rows).wait()

    @torch.inference_mode()
    def launch(self, logits: Tensor, rows: Sequence[SamplingRow], last_ids: Tensor | None = None) -> "Draw":
        """Begins to draw one token per row of `logits` [rows, vocab] fp32, which are the draw's own from now on.

        On a GPU the host goes on meanwhile. `last_ids` [rows] int64 are the rows' last tokens, if `seen_ids` lack them.
        """
        if logits.shape != (len(rows), self._vocab_size):
            raise ValueError(f"logits of shape {list(logits.shape)} for {len(rows)} rows of {self._vocab_size}")
        asking = [row for row in range(len(rows)) if rows[row].params.logprobs is not None]
        of_asking = _take(logits, asking).log_softmax(dim=1) if asking else ()
        log_probabilities = dict(zip(asking, of_asking, strict=True))
        is_greedy = all(_is_greedy(row.params) for row in rows)
        draw_at_once = self._take_best if is_greedy and logits.device.type == "cpu" else self._draw_at_once
        return Draw(logits, rows, draw_at_once(logits, rows, last_ids), log_probabilities)

    def _draw_at_once(self, logits: Tensor, rows: Sequence[SamplingRow], last_ids: Tensor | None) -> Tensor:
        """Returns what a `Draw` is told of each row, without waiting for the device."""
        is_good = logits.amin(dim=1).isfinite() & logits.amax(dim=1).isfinite()  # A NaN is both.
        self._process(logits, rows, last_ids)
        is_good &= _is_drawable(logits, rows)
        token_ids, is_decided = _draw_groups(logits, rows)
        return torch.stack((token_ids, is_decided, is_good))

    def _take_best(self, logits: Tensor, rows: Sequence[SamplingRow], last_ids: Tensor | None) -> Tensor:
        """The same for greedy rows on a CPU, by NumPy: fewer calls, and its search takes a sixth of the time."""
        scores = logits.numpy()
        is_good = np.isfinite(scores.min(axis=1)) & np.isfinite(scores.max(axis=1))
        self._process(logits, rows, last_ids)
        token_ids = scores.argmax(axis=1)  # The first of the highest, or of NaNs.
        is_good &= np.isfinite(scores[np.arange(len(rows)), token_ids])
        return torch.from_numpy(np.stack((token_ids, np.ones_like(token_ids), is_good)))

    def _process(self, logits: Tensor, rows: Sequence[SamplingRow], last_ids: Tensor | None) -> None:
        """Everything that comes before temperature, in place."""
        _penalize(logits, rows, last_ids)
        logits.index_fill_(1, self._banned_token_ids, -torch.inf)


class Draw:
    """Tokens that are being drawn. A row that takes a closer look is drawn when it is waited for."""

    def __init__(
        self,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        told: Tensor,
        log_probabilities: Mapping[int, Tensor],
    ) -> None:
        """`told` [3, rows] int64: token ids, whether each is decided, and whether its row may be drawn from at all.

        `log_probabilities` [vocab] are those of each row that asks for some, by the raw logits.
        """
        # [rows] int64 on the device; those of undecided rows mean nothing.
        self.token_ids = told[0]
        self._logits = logits
        self._rows = rows
        self._fetch = Fetch(told)
        self._log_probabilities = log_probabilities

    @torch.inference_mode()
    def wait(self) -> Sampled:
        rows = self._rows
        at_once, is_decided, is_good = self._fetch.wait().tolist()
        token_ids: list[int | None] = [
            token_id if good else None for token_id, good in zip(at_once, is_good, strict=True)
        ]
        undecided = [row for row in range(len(rows)) if is_good[row] and not is_decided[row]]
        for row, token_id in zip(undecided, _draw_closely(self._logits, rows, undecided), strict=True):
            token_ids[row] = token_id
        logprobs: list[TokenLogprob | None] = [None] * len(rows)
        for row, of_row in self._log_probabilities.items():
            logprobs[row] = _describe(of_row, token_ids[row], rows[row].params.logprobs or 0)
        return Sampled(token_ids, logprobs, at_once)


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


def _is_drawable(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Where a token is left, and the best score fits fp32 after temperature: [rows] bool."""
    limits = [math.inf if _is_greedy(row.params) else _LARGEST_SCORE * min(row.params.temperature, 1.0) for row in rows]
    return logits.amax(dim=1).abs() < _values(limits, logits)


def _penalize(logits: Tensor, rows: Sequence[SamplingRow], last_ids: Tensor | None = None) -> None:
    """Applies penalties, logit bias and the rows' own bans in place."""
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


def _cells(ids_by_row: Mapping[int, Collection[int]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns row and column of each named logit, in order."""
    rows = chain.from_iterable(repeat(row, len(ids)) for row, ids in ids_by_row.items())
    columns = chain.from_iterable(ids_by_row.values())
    cells = to_device([list(rows), list(columns)], torch.int64, logits.device)
    return cells[0], cells[1]


def _values(values: Iterable[float], logits: Tensor) -> Tensor:
    return to_device(list(values), logits.dtype, logits.device)


def _draw_groups(logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
    """Returns each row's token, [rows] int64, and which of them are decided, [rows] bool; waits for neither."""
    kinds: dict[int | None, list[int]] = {}  # Length of the prefix -> rows; None for greedy ones.
    for index, row in enumerate(rows):
        if _is_greedy(row.params):
            kinds.setdefault(None, []).append(index)
        elif sizes := _fitting_sizes(row.params):
            kinds.setdefault(sizes[0], []).append(index)
    token_ids = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
    is_decided = torch.zeros(len(rows), dtype=torch.bool, device=logits.device)
    for size, indices in kinds.items():
        drawn, decided = _draw_group(_take(logits, indices), [rows[index] for index in indices], size)
        if len(indices) == len(rows):
            return drawn, decided
        at = to_device(indices, torch.int64, logits.device)
        token_ids[at], is_decided[at] = drawn, decided
    return token_ids, is_decided


def _draw_group(logits: Tensor, rows: Sequence[SamplingRow], size: int | None) -> tuple[Tensor, Tensor]:
    if size is None:
        token_ids = logits.max(dim=1).indices  # The first of the highest.
        return token_ids, torch.ones_like(token_ids, dtype=torch.bool)
    columns = Columns.of([row.params for row in rows], [row.uniform for row in rows], logits.device)
    return draw_from_prefix(logits, columns, size)


def _draw_closely(logits: Tensor, rows: Sequence[SamplingRow], undecided: list[int]) -> list[int]:
    """Returns the tokens of rows that their first prefix does not decide: by longer ones, then by the plain path."""
    token_ids: dict[int, int] = {}
    for size in _PREFIX_SIZES:
        left = [index for index in undecided if index not in token_ids]
        tried = [index for index in left if size in _fitting_sizes(rows[index].params)[1:]]
        if not tried:
            continue
        drawn, decided = _draw_group(_take(logits, tried), [rows[index] for index in tried], size)
        for index, token_id, is_decided in zip(tried, drawn.tolist(), decided.tolist(), strict=True):
            if is_decided:
                token_ids[index] = token_id
    return [token_ids[index] if index in token_ids else _draw_row(logits[index], rows[index]) for index in undecided]


def _fitting_sizes(params: SamplingSpec) -> list[int]:
    """Lengths of the prefixes that can decide such a row, and do it for less than the plain path."""
    plain_path_sorts = params.top_p < 1 or params.typical_p < 1
    return [
        size
        for size in _PREFIX_SIZES
        if params.top_k < size and (size == _PREFIX_SIZES[0] or params.top_k > 0 or plain_path_sorts)
    ]


def _draw_row(scores: Tensor, row: SamplingRow) -> int:
    warped = warp(scores, row.params)
    token_id = draw_from_bucket(warped, row.uniform)
    return draw(warped, row.uniform) if token_id is None else token_id


def _take(logits: Tensor, rows: list[int]) -> Tensor:
    """Returns these rows, without a copy if they are all."""
    return logits if len(rows) == len(logits) else logits[to_device(rows, torch.int64, logits.device)]


def _describe(log_probabilities: Tensor, token_id: int | None, num_alternatives: int) -> TokenLogprob | None:
    if token_id is None:
        return None
    best = log_probabilities.topk(min(num_alternatives, len(log_probabilities)))
    return TokenLogprob(
        logprob=float(log_probabilities[token_id]),
        alternatives=tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
    )
