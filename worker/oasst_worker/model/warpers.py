"""Which tokens may be drawn, and the draw: the plain path, one row at a time.

The warpers are transformers' (`transformers.generation.logits_process`, min_tokens_to_keep 1), in its order and in its
arithmetic: fp32, the same sums in the same order, the same comparisons at the edges. `shortcuts` is the fast path
beside this one; whatever it cannot decide beyond rounding is decided here.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["SamplingSpec", "draw", "warp"]


class SamplingSpec(Protocol):
    """How one row is drawn; meaning and range of each value stand in `oasst/v1/generation.proto`."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def typical_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def logit_bias(self) -> Mapping[int, float]: ...
    @property
    def logprobs(self) -> int | None: ...


def warp(scores: Tensor, params: SamplingSpec) -> Tensor:
    """Returns one row's scores [vocab] after temperature and filters; removed tokens are -inf."""
    scores = scores / params.temperature
    if params.top_k > 0:
        scores = _keep_top_k(scores, params.top_k)
    if params.top_p < 1:
        scores = _keep_top_p(scores, params.top_p)
    if params.min_p > 0:
        scores = _keep_min_p(scores, params.min_p)
    if params.typical_p < 1:
        scores = _keep_typical(scores, params.typical_p)
    return scores


def draw(scores: Tensor, uniform: float) -> int:
    """Returns the token at which the running sum of probabilities passes `uniform`.

    The sum runs, in float64, from the most likely token down; of equal tokens the one with the highest id comes first
    (the order in which `top_p` keeps them).
    """
    kept = (scores > -torch.inf).nonzero().flatten()
    ascending, order = scores[kept].sort(stable=True)
    weights = (ascending.flip(0).double() - ascending[-1]).exp()
    sums = weights.cumsum(0)
    drawn = (sums <= uniform * sums[-1]).sum()
    return int(kept[order.flip(0)[drawn]])


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    kth = scores.topk(min(top_k, len(scores))).values[-1]
    return scores.masked_fill(scores < kth, -torch.inf)


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    ascending, order = scores.sort(stable=True)
    removed = ascending.softmax(0).cumsum(0) <= 1 - top_p
    removed[-1] = False
    return scores.masked_fill(removed.scatter(0, order, removed), -torch.inf)


def _keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    probabilities = scores.softmax(0)
    return scores.masked_fill(probabilities < min_p * probabilities.amax(), -torch.inf)


def _keep_typical(scores: Tensor, mass: float) -> Tensor:
    log_probabilities = scores.log_softmax(0)
    entropy = -(log_probabilities * log_probabilities.exp()).nansum()
    distances = (-log_probabilities - entropy).abs()
    ascending, order = distances.sort(stable=True)
    sums = scores[order].softmax(0).cumsum(0)
    last = (sums < mass).sum().clamp(max=len(scores) - 1)
    return scores.masked_fill(distances > ascending[last], -torch.inf)
