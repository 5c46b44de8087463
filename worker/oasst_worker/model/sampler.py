"""From logits to tokens: penalties, bans, the draw, log-probabilities.

A row's outcome depends on that row alone: neither the other rows nor their number change it.

Order of processing, as in transformers: repetition penalty, presence and frequency penalty, logit bias, bans,
temperature, top_k, top_p, min_p, typical_p. Temperature 0 takes the most likely token, the lowest id of equals.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from oasst_worker.model.compiled_draw import PREFIX_SIZE, CompiledDraw
from oasst_worker.model.penalties import SamplingRow, penalize
from oasst_worker.model.philox import uniform_for
from oasst_worker.model.shortcuts import (
    Columns,
    draw_from_bucket,
    draw_from_likely,
    draw_from_typical,
    is_greedy,
    is_typical,
    largest_logit,
)
from oasst_worker.model.transfer import Fetch, to_device
from oasst_worker.model.warpers import SamplingSpec, draw, warp

__all__ = [
    "Draw",
    "Sampled",
    "Sampler",
    "SamplingRow",
    "SamplingSpec",
    "TokenLogprob",
    "uniform_for",
]

# Lengths of the prefix tried one after the other; most rows are decided by the first.
_PREFIX_SIZES = (PREFIX_SIZE, 1024, 4096)


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
    # The device's first answer. In a row that it could not decide, this may differ from the token drawn.
    at_once: list[int]


class Sampler:
    """Draws the next token of many rows at once."""

    def __init__(self, vocab_size: int, banned_token_ids: Iterable[int], device: torch.device | str = "cpu") -> None:
        """`banned_token_ids` are never drawn by any row: padding rows of the embedding, control ids."""
        self._vocab_size = vocab_size
        self._banned_token_ids = torch.tensor(sorted(banned_token_ids), dtype=torch.int64, device=device)
        self._draw_compiled: CompiledDraw | None = None
        if self._banned_token_ids.device.type == "cpu":
            with suppress(RuntimeError):  # Then PyTorch's operators do it.
                self._draw_compiled = CompiledDraw(vocab_size, self._banned_token_ids.tolist())

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
        logits = logits.contiguous()  # Columns of several ranks are not.
        asking = [row for row in range(len(rows)) if rows[row].params.logprobs is not None]
        log_probabilities = _take(logits, asking).log_softmax(dim=1) if asking else None  # Before logits change.
        told, tried = self._draw_at_once(logits, rows, last_ids)
        logprobs = None
        if log_probabilities is not None:
            numbers = [rows[row].params.logprobs or 0 for row in asking]
            logprobs = _Logprobs(log_probabilities, _take(told[0], asking), asking, numbers)
        return Draw(logits, rows, told, tried, logprobs)

    def _draw_at_once(
        self, logits: Tensor, rows: Sequence[SamplingRow], last_ids: Tensor | None
    ) -> tuple[Tensor, list[int]]:
        """Returns what a `Draw` is told of each row, without waiting for it, and the prefix that was tried for it."""
        if self._draw_compiled and last_ids is None:
            return self._draw_compiled(logits, rows), [PREFIX_SIZE] * len(rows)
        is_finite = logits.amin(dim=1).isfinite() & logits.amax(dim=1).isfinite()  # A NaN is both.
        penalize(logits, rows, last_ids)
        logits.index_fill_(1, self._banned_token_ids, -torch.inf)
        sizes = [_first_size(row.params) for row in rows]
        told = torch.stack((*_draw_groups(logits, rows, sizes), is_finite & _is_drawable(logits, rows)))
        return told, sizes


class Draw:
    """Tokens that are being drawn. A row that takes a closer look is drawn when it is waited for."""

    def __init__(
        self,
        logits: Tensor,
        rows: Sequence[SamplingRow],
        told: Tensor,
        tried: Sequence[int],
        logprobs: "_Logprobs | None",
    ) -> None:
        """`told` [3, rows] int64: token ids, whether each is decided, and whether its row may be drawn from at all.

        `tried` is the length of the prefix by which each row was not decided; 0 for none.
        """
        # [rows] int64 on the device; those of undecided rows mean nothing.
        self.token_ids = told[0]
        self._logits = logits
        self._rows = rows
        self._tried = tried
        self._fetch = Fetch(told)
        self._logprobs = logprobs

    @torch.inference_mode()
    def wait(self) -> Sampled:
        rows = self._rows
        at_once, is_decided, is_good = self._fetch.wait().tolist()
        token_ids: list[int | None] = [
            token_id if good else None for token_id, good in zip(at_once, is_good, strict=True)
        ]
        undecided = [row for row in range(len(rows)) if is_good[row] and not is_decided[row]]
        if undecided:
            drawn = _draw_closely(self._logits, rows, undecided, self._tried)
            for row, token_id in zip(undecided, drawn, strict=True):
                token_ids[row] = token_id
        logprobs: list[TokenLogprob | None] = [None] * len(rows)
        for row, logprob in self._logprobs.wait(token_ids, at_once) if self._logprobs else ():
            logprobs[row] = logprob
        return Sampled(token_ids, logprobs, at_once)


class _Logprobs:
    """What some rows of a draw ask for, on its way to the host beside their tokens."""

    def __init__(self, log_probabilities: Tensor, drawn: Tensor, rows: list[int], numbers: list[int]) -> None:
        """`log_probabilities` [asking, vocab] are those of these rows of the draw, by the raw logits.

        `drawn` [asking] are the tokens that the device knows of; `numbers` are how many alternatives each row asks for.
        """
        self._log_probabilities = log_probabilities
        self._rows = rows
        vocab_size = log_probabilities.shape[1]
        ids = drawn.clamp(0, vocab_size - 1)  # Anything may stand where nothing can be drawn.
        self._of_drawn = Fetch(log_probabilities.gather(1, ids[:, None]))
        # By number: which of equals come first may depend on it, and must not on what others ask for.
        self._best: list[tuple[list[int], Fetch, Fetch]] = []
        for number in set(numbers):
            places = [place for place, of_place in enumerate(numbers) if of_place == number]
            best = _take(log_probabilities, places).topk(min(number, vocab_size))
            self._best.append((places, Fetch(best.indices), Fetch(best.values)))

    def wait(self, token_ids: list[int | None], at_once: list[int]) -> Iterator[tuple[int, TokenLogprob]]:
        """By row, of those that drew a token: `token_ids`, of which the device knew `at_once`."""
        of_drawn = self._of_drawn.wait().flatten().tolist()
        alternatives: dict[int, tuple[tuple[int, float], ...]] = {}
        for places, ids, values in self._best:
            for place, *best in zip(places, ids.wait().tolist(), values.wait().tolist(), strict=True):
                alternatives[place] = tuple(zip(*best, strict=True))
        for place, row in enumerate(self._rows):
            token_id, logprob = token_ids[row], of_drawn[place]
            if token_id is None:
                continue
            if token_id != at_once[row]:  # It took a closer look.
                logprob = float(self._log_probabilities[place, token_id])
            yield row, TokenLogprob(logprob, alternatives[place])


def _is_drawable(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Where a token is left, and the best score fits fp32 after temperature: [rows] bool."""
    limits = [largest_logit(row.params) for row in rows]
    return logits.amax(dim=1).abs() < to_device(limits, logits.dtype, logits.device)


def _draw_groups(logits: Tensor, rows: Sequence[SamplingRow], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns each row's token, [rows] int64, and which of them are decided, [rows] bool; waits for neither.

    `sizes` are the lengths of the prefixes to draw from; rows of 0 are not decided.
    """
    token_ids = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
    is_decided = torch.zeros(len(rows), dtype=torch.bool, device=logits.device)
    for size, indices in _group(sizes, rows):
        drawn, decided = _draw_group(logits, rows, indices, size)
        if len(indices) == len(rows):
            return drawn, decided
        at = to_device(indices, torch.int64, logits.device)
        token_ids[at], is_decided[at] = drawn, decided
    return token_ids, is_decided


def _group(sizes: Sequence[int], rows: Sequence[SamplingRow]) -> Iterator[tuple[int, list[int]]]:
    """Rows that are drawn in one way from a prefix of one length, and that; without those of 0."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, size in enumerate(sizes):
        if size:
            groups.setdefault((size, is_typical(rows[index].params)), []).append(index)
    for (size, _), indices in groups.items():
        yield size, indices


def _draw_group(logits: Tensor, rows: Sequence[SamplingRow], indices: list[int], size: int) -> tuple[Tensor, Tensor]:
    """As `_draw_groups`, of rows that are drawn in one way."""
    of_group = _take(logits, indices)
    if size == 1:
        token_ids = of_group.max(dim=1).indices  # The first of the highest.
        return token_ids, torch.ones_like(token_ids, dtype=torch.bool)
    params = [rows[index].params for index in indices]
    columns = Columns.of(params, [rows[index].uniform for index in indices], logits.device)
    draw_from = draw_from_typical if is_typical(params[0]) else draw_from_likely
    return draw_from(of_group, columns, size)


def _draw_closely(logits: Tensor, rows: Sequence[SamplingRow], undecided: list[int], tried: Sequence[int]) -> list[int]:
    """Returns the tokens of rows that a first prefix does not decide: by longer ones, then by the plain path."""
    token_ids: dict[int, int] = {}
    for size in _PREFIX_SIZES:
        sizes = [0] * len(rows)
        for index in undecided:
            if index not in token_ids and size > tried[index] and size in _fitting_sizes(rows[index].params):
                sizes[index] = size
        for _, indices in _group(sizes, rows):
            drawn, decided = _draw_group(logits, rows, indices, size)
            for index, token_id, is_decided in zip(indices, drawn.tolist(), decided.tolist(), strict=True):
                if is_decided:
                    token_ids[index] = token_id
    return [token_ids[index] if index in token_ids else _draw_row(logits[index], rows[index]) for index in undecided]


def _first_size(params: SamplingSpec) -> int:
    """Length of the prefix that is tried first; 0 where none fits."""
    return 1 if is_greedy(params) else next(iter(_fitting_sizes(params)), 0)


def _fitting_sizes(params: SamplingSpec) -> list[int]:
    """Lengths of the prefixes that can decide such a row, and do it for less than the plain path."""
    plain_path_sorts = params.top_p < 1 or params.typical_p < 1
    return [
        size
        for size in _PREFIX_SIZES
        if params.top_k < size and (size == PREFIX_SIZE or params.top_k > 0 or plain_path_sorts)
    ]


def _draw_row(scores: Tensor, row: SamplingRow) -> int:
    warped = warp(scores, row.params)
    token_id = draw_from_bucket(warped, row.uniform)
    return draw(warped, row.uniform) if token_id is None else token_id


def _take(logits: Tensor, rows: list[int]) -> Tensor:
    """Returns these rows, without a copy if they are all."""
    return logits if len(rows) == len(logits) else logits[to_device(rows, torch.int64, logits.device)]
