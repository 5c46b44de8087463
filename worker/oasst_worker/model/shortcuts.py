"""The draw without sorting the vocabulary: the fast paths.

*Prefix*: what a row draws almost always lies among its few most likely (or most typical) tokens. These are selected,
put in order and filtered in float64; the rest of the row enters only as a sum. *Bucket*: where many tokens share the
mass, a histogram over the scores tells in which bucket the draw falls, and only that bucket is put in order.

Both decide a row only if no comparison was so close that the rounding of the plain path (`warpers`) could turn it. So
a decided row has the plain path's token; the others are left to the next path, the plain one last.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oasst_worker.model.transfer import to_device
from oasst_worker.model.warpers import SamplingSpec

__all__ = [
    "Columns",
    "draw_from_bucket",
    "draw_from_likely",
    "draw_from_typical",
    "is_greedy",
    "is_typical",
    "largest_logit",
]

# Wider than the error of a sum of fp32 probabilities, ours or the plain path's.
_MASS_MARGIN = 2e-6
# Wider than the error of an fp32 log-probability or entropy.
_DISTANCE_MARGIN = 2e-5
# Wider than the difference between two orders of a float64 sum over a vocabulary.
_SUM_MARGIN = 1e-10
# A weight of e^-80 is nothing beside 1; the bound keeps 0 * -inf and slow denormal numbers away.
_LOG_NOTHING = -80.0

# Colder is greedy: dividing logits by less would overflow fp32.
_COLDEST_TEMPERATURE = 1e-30
_LARGEST_SCORE = 1e38

# Buckets are this wide, in nats, and reach this far down from the most likely token; the last holds all below.
_BUCKET_WIDTH = 1 / 128
_NUM_BUCKETS = 32 * 128


@dataclass(frozen=True, slots=True)
class Columns:
    """The parameters of a batch, one row each, [rows, 1]."""

    specs: Sequence[SamplingSpec]  # The same on the host, where it is decided what is launched.
    temperature: Tensor  # fp32, as the plain path divides
    top_k: Tensor  # int64
    is_cut: Tensor  # bool
    top_p: Tensor  # float64, as all below
    min_p: Tensor
    typical_p: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, specs: Sequence[SamplingSpec], uniforms: Sequence[float], device: torch.device) -> "Columns":
        values = [
            [row.temperature, row.top_k, _is_cut(row), row.top_p, row.min_p, row.typical_p, uniform]
            for row, uniform in zip(specs, uniforms, strict=True)
        ]
        temperature, top_k, is_cut, *others = to_device(values, torch.float64, device).T.unsqueeze(2).unbind()
        return cls(specs, temperature.float(), top_k.long(), is_cut.bool(), *others)

    @property
    def is_typical(self) -> Tensor:
        return self.typical_p < 1


def is_greedy(spec: SamplingSpec) -> bool:
    """The row takes its most likely token."""
    return spec.temperature < _COLDEST_TEMPERATURE


def largest_logit(spec: SamplingSpec) -> float:
    """What a row's highest logit must stay below, to fit fp32 after temperature."""
    return math.inf if is_greedy(spec) else _LARGEST_SCORE * min(spec.temperature, 1.0)


def is_typical(spec: SamplingSpec) -> bool:
    """The row is drawn from its most typical tokens, not from its most likely ones."""
    return spec.typical_p < 1 and not _is_cut(spec)


def _needs_sums(spec: SamplingSpec) -> bool:
    """The draw depends on what all tokens of the row weigh."""
    return not spec.top_k and (spec.top_p < 1 or not _is_cut(spec))


def draw_from_bucket(scores: Tensor, uniform: float) -> int | None:
    """Returns the token that `warpers.draw` draws from one row's final scores [vocab], or None if it is too close."""
    depths = scores.amax() - scores.double()
    weights = (-depths).exp()
    buckets = (depths / _BUCKET_WIDTH).clamp_(max=_NUM_BUCKETS - 1).long()
    sums = torch.bincount(buckets, weights, minlength=_NUM_BUCKETS).cumsum(0)
    total = float(sums[-1])
    target = uniform * total
    bucket = int((sums <= target).sum().clamp(max=_NUM_BUCKETS - 1))

    members = (buckets == bucket).nonzero().flatten().flip(0)  # Of equals the highest id first.
    order = depths[members].sort(stable=True).indices
    sums_within = weights[members[order]].cumsum(0) + (sums[bucket - 1] if bucket else 0.0)
    drawn = int((sums_within <= target).sum())
    is_close = bool(((sums_within - target).abs() < _SUM_MARGIN * total).any())
    return None if is_close or drawn == len(members) else int(members[order[drawn]])


def _is_cut(spec: SamplingSpec) -> bool:
    """Whether a filter by likelihood keeps only the head of the row."""
    return spec.top_k > 0 or spec.top_p < 1 or spec.min_p > 0


@dataclass(slots=True)
class _Prefix:
    """Some tokens of each row, most likely first; of equals the highest id first, as `warpers.draw` orders them."""

    ids: Tensor  # [rows, size] int64
    scores: Tensor  # [rows, size] float64, after temperature
    peak: Tensor  # [rows, 1], the highest score of the whole row
    weights: Tensor  # [rows, size], e^(score - peak); 0 once a token is removed
    doubtful: Tensor  # [rows, 1], whether some comparison was too close

    @classmethod
    def of(cls, scores: Tensor, ids: Tensor, peak: Tensor) -> "_Prefix":
        ids, order = ids.sort(dim=1)
        scores, order = scores.gather(1, order).sort(dim=1, stable=True)
        ids, scores = ids.gather(1, order).flip(1), scores.flip(1).double()
        return cls(ids, scores, peak, (scores - peak).exp(), torch.zeros_like(peak, dtype=torch.bool))

    def total(self) -> Tensor:
        """Returns the weight of all tokens still kept, [rows, 1]."""
        return self.weights.sum(dim=1, keepdim=True)

    def lowest_score(self) -> Tensor:
        """Returns the score of the least likely token still kept, [rows, 1]."""
        return self.scores.masked_fill(self.weights == 0, torch.inf).amin(dim=1, keepdim=True)

    def distances(self, total: Tensor, entropy: Tensor) -> Tensor:
        """Returns how far each token's information content lies from `entropy`, if all tokens weigh `total`."""
        surprise = self.peak + total.log() - self.scores
        return (surprise - entropy).abs().masked_fill(self.weights == 0, torch.inf)

    def keep(self, kept: Tensor, where: Tensor, close: Tensor | None = None) -> None:
        """In rows `where` [rows, 1] only `kept` tokens stay; a row with any `close` comparison becomes doubtful."""
        self.weights = self.weights.where(kept | ~where, 0.0)
        if close is not None:
            self.doubtful |= where & close.any(dim=1, keepdim=True)

    def keep_top_p(self, top_p: Tensor, total: Tensor, where: Tensor) -> None:
        before = (self.weights.cumsum(dim=1) - self.weights) / total
        self.keep(before < top_p, where, close=(before - top_p).abs() < _MASS_MARGIN)

    def keep_min_p(self, min_p: Tensor, where: Tensor) -> None:
        self.keep(self.weights >= min_p, where, close=(self.weights - min_p).abs() < _MASS_MARGIN * min_p)

    def keep_typical(self, distances: Tensor, mass: Tensor, total: Tensor, where: Tensor) -> Tensor:
        """Keeps the tokens of smallest distance up to `mass`; returns the largest distance kept, [rows, 1]."""
        ascending, order = distances.sort(dim=1)
        sums = (self.weights / total).gather(1, order).cumsum(dim=1)
        last = (sums < mass).sum(dim=1, keepdim=True).clamp(max=sums.shape[1] - 1)
        limit = ascending.gather(1, last)
        # Equal scores have equal distances on both paths; only others can change sides.
        others = self.scores != self.scores.gather(1, order.gather(1, last))
        close = others & ((distances - limit).abs() < _DISTANCE_MARGIN) | ((sums - mass).abs() < _MASS_MARGIN)
        self.keep(distances <= limit, where, close)
        return limit

    def draw(self, uniform: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Returns token ids [rows] and which are beyond doubt [rows], if all tokens weigh `total` [rows, 1]."""
        sums = self.weights.cumsum(dim=1)
        target = uniform * total
        drawn = (sums <= target).sum(dim=1, keepdim=True)
        close = ((sums - target).abs() <= _MASS_MARGIN * total).any(dim=1, keepdim=True)
        in_prefix = drawn < sums.shape[1]
        token_ids = self.ids.gather(1, drawn.clamp(max=sums.shape[1] - 1))
        return token_ids.squeeze(1), (in_prefix & ~close & ~self.doubtful).squeeze(1)


def draw_from_likely(logits: Tensor, columns: Columns, size: int) -> tuple[Tensor, Tensor]:
    """Draws from the `size` most likely tokens of each row of `logits` [rows, vocab], with any filters or none.

    Returns token ids [rows] and which rows are decided [rows]; the ids of others mean nothing.
    """
    size = min(size, logits.shape[1])
    is_whole = size == logits.shape[1]
    # Temperature keeps the order, so the prefix can be chosen before it.
    best, ids = logits.topk(size)
    scores = best / columns.temperature
    prefix = _Prefix.of(scores, ids, peak=scores[:, :1].double())
    # No token outside the prefix has a higher score than this.
    outside = torch.full_like(prefix.peak, -torch.inf) if is_whole else prefix.scores[:, -1:]
    has_top_k, has_top_p, has_min_p = columns.top_k > 0, columns.top_p < 1, columns.min_p > 0

    kth_score = prefix.scores.gather(1, (columns.top_k - 1).clamp(0, size - 1))
    prefix.keep(prefix.scores >= kth_score, where=has_top_k)
    # A row is closed once no token outside the prefix can be kept.
    closed = (outside == -torch.inf) | (has_top_k & (columns.top_k <= size) & (kth_score > outside))

    total = prefix.total()
    if not is_whole and (wanting := [row for row, spec in enumerate(columns.specs) if _needs_sums(spec)]):
        rows = slice(None) if len(wanting) == len(logits) else to_device(wanting, torch.int64, logits.device)
        depths = (logits[rows] / columns.temperature[rows]).sub_(prefix.peak[rows].float())
        total[rows] = depths.exp_().sum(dim=1, keepdim=True).double()
    prefix.keep_top_p(columns.top_p, total, where=has_top_p)
    prefix.keep_min_p(columns.min_p, where=has_min_p)
    closed |= ~has_top_k & (has_top_p | has_min_p) & (prefix.lowest_score() > outside)

    if any(spec.typical_p < 1 for spec in columns.specs):
        kept_total = prefix.total()
        probabilities = prefix.weights / kept_total
        entropy = -(probabilities * probabilities.log().clamp(min=_LOG_NOTHING)).sum(dim=1, keepdim=True)
        distances = prefix.distances(kept_total, entropy)
        prefix.keep_typical(distances, columns.typical_p, kept_total, where=columns.is_typical)
    prefix.doubtful |= columns.is_cut & ~closed
    total = torch.where(closed, prefix.total(), total)
    prefix.keep(prefix.scores > outside, where=~closed)  # Equals of the lowest may lie outside, of any id.
    return prefix.draw(columns.uniform, total)


def draw_from_typical(logits: Tensor, columns: Columns, size: int) -> tuple[Tensor, Tensor]:
    """The same from the most typical tokens, in rows without any other filter.

    These are the tokens whose information content is closest to the row's entropy.
    """
    size = min(size, logits.shape[1])
    scaled = logits / columns.temperature
    peaks = scaled.amax(dim=1, keepdim=True)
    # Measured from the peak, where fp32 is exact enough, however large the scores are.
    depths = scaled.sub_(peaks).clamp_(min=_LOG_NOTHING)
    weights = depths.exp()
    totals = weights.sum(dim=1, keepdim=True).double()
    moments = weights.mul_(depths).sum(dim=1, keepdim=True).double()
    ids = depths.sub_((moments / totals).float()).abs_().topk(size, largest=False).indices

    prefix = _Prefix.of(logits.gather(1, ids) / columns.temperature, ids, peaks.double())
    distances = prefix.distances(totals, totals.log() - moments / totals)
    limit = prefix.keep_typical(distances, columns.typical_p, totals, where=columns.is_typical)
    if size < logits.shape[1]:
        prefix.doubtful |= limit > distances.amax(dim=1, keepdim=True) - _DISTANCE_MARGIN
    return prefix.draw(columns.uniform, prefix.total())
