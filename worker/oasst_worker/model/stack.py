"""Layers that follow each other in one place, with the KV cache that is theirs.

Shapes as in `neox`.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from oasst_worker.model.attention import Attend, Attention, PagedAttention
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import DecodeInputs, StepInputs
from oasst_worker.model.layers import CompiledLayers, LayerParts
from oasst_worker.model.linear import Linear
from oasst_worker.model.ranks import Ranks
from oasst_worker.model.weights import LayerRun, LayerWeights

__all__ = ["LayerStack", "Norm"]


class LayerStack:
    """The layers of a run. Those whose place does not keep them are made anew, from their weights, in every step."""

    def __init__(
        self,
        config: NeoXConfig,
        run: LayerRun,
        make_linear: Callable[..., Linear],
        make_attention: Callable[..., Attention],
        ranks: Ranks,
        *,
        dtype: torch.dtype,
    ) -> None:
        self._device = torch.empty(0, device=run.place.device).device  # With its number, if it has one.
        share_config = replace(ranks.share.of_config(config), num_layers=run.place.num_layers)
        self._attention = make_attention(share_config, dtype=dtype, device=self._device)
        self._make_layers = partial(_Layers, config, make_linear, self._attention, ranks)
        self._kept = self._make_layers(run.weights) if run.place.is_kept else None
        self._unkept = () if run.place.is_kept else run.weights  # They hold the checkpoint's files open.

    @property
    def compiled(self) -> CompiledLayers | None:
        """All layers in one call, if they can be had so."""
        return self._kept.compiled if self._kept else None

    @property
    def is_position_exact(self) -> bool:
        """Keys and values of a position have the same bits however it is computed."""
        return self._attention.is_position_exact

    def is_kept_on(self, device: torch.device) -> bool:
        """All of the layers are in this device's memory."""
        return self._kept is not None and self._device == device

    @property
    def can_decode(self) -> bool:
        """`prepare_decode` works here."""
        return self._kept is not None and isinstance(self._attention, PagedAttention)

    def prepare_decode(self, inputs: DecodeInputs, cache: Tensor) -> Callable[[Tensor], Tensor]:
        """Computes [rows, hidden] -> [rows, hidden] for what stands in the inputs' tensors when it is called."""
        if self._kept is None or not isinstance(self._attention, PagedAttention):
            raise RuntimeError(f"{type(self._attention).__name__} cannot decode from tensors alone")
        return partial(self._kept.one_by_one, attend=self._attention.prepare_decode(inputs), cache=cache)

    def first_layer(self) -> LayerParts:
        """What the first layer is made of."""
        layers = self._kept or self._make_layers(islice(self._unkept, 1))
        return layers.layers[0].parts

    def make_cache(self, num_blocks: int) -> Tensor:
        """A KV cache of so many blocks, for these layers."""
        return self._attention.make_cache(num_blocks)

    def __call__(self, hidden: Tensor, inputs: StepInputs, cache: Tensor) -> Tensor:
        """[rows, hidden], which may be overwritten, -> [rows, hidden] on these layers' device."""
        hidden, inputs = hidden.to(self._device), inputs.to(self._device)
        if self._kept:
            return self._kept(hidden, inputs, cache)
        for weights, layer_cache in zip(self._unkept, torch.split(cache, 1), strict=True):
            hidden = self._make_layers([weights])(hidden, inputs, layer_cache)
        return hidden


class _Layers:
    """Layers in memory."""

    def __init__(
        self,
        config: NeoXConfig,
        make_linear: Callable[..., Linear],
        attention: Attention,
        ranks: Ranks,
        weights: Iterable[LayerWeights],
    ) -> None:
        self.layers = [_Layer(config, layer, make_linear, ranks) for layer in weights]
        self.compiled: CompiledLayers | None = None
        with suppress(RuntimeError):  # Then the layers are called one by one.
            here = replace(config, num_layers=len(self.layers))
            self.compiled = CompiledLayers(here, [layer.parts for layer in self.layers], attention, ranks)
        self._attention = attention

    def __call__(self, hidden: Tensor, inputs: StepInputs, cache: Tensor) -> Tensor:
        if self.compiled:
            return self.compiled(hidden, inputs, cache)
        return self.one_by_one(hidden, self._attention.prepare(inputs), cache)

    def one_by_one(self, hidden: Tensor, attend: Attend, cache: Tensor) -> Tensor:
        """As calling it, with what every layer attends by."""
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            hidden = layer(hidden, attend, layer_cache)
        return hidden


class _Layer:
    def __init__(
        self, config: NeoXConfig, weights: LayerWeights, make_linear: Callable[..., Linear], ranks: Ranks
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._norm1 = Norm(weights.norm1_weight, weights.norm1_bias, config.layer_norm_eps)
        self._norm2 = Norm(weights.norm2_weight, weights.norm2_bias, config.layer_norm_eps)
        self._qkv = make_linear(weights.qkv_weight, weights.qkv_bias)
        self._dense = make_linear(weights.dense_weight, weights.dense_bias)
        self._mlp_in = make_linear(weights.mlp_in_weight, weights.mlp_in_bias, config.hidden_act)
        self._mlp_out = make_linear(weights.mlp_out_weight, weights.mlp_out_bias)

    @property
    def parts(self) -> LayerParts:
        norms = (*self._norm1.tensors, *self._norm2.tensors)
        return LayerParts(norms, self._qkv, self._dense, self._mlp_in, self._mlp_out)

    def __call__(self, hidden: Tensor, attend: Attend, cache: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, hidden]. Each rank gives a part of the sum; the residual counts once."""
        attended = attend(self._qkv(self._norm1(hidden)), cache)
        if self._config.parallel_residual:
            attended = self._dense(attended)
            return self._ranks.sum(self._mlp_out(self._mlp_in(self._norm2(hidden)), attended, *self._once(hidden)))
        hidden = self._ranks.sum(self._dense(attended, *self._once(hidden)))
        return self._ranks.sum(self._mlp_out(self._mlp_in(self._norm2(hidden)), *self._once(hidden)))

    def _once(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """The residual, at the one rank that adds it."""
        return (hidden,) if self._ranks.share.is_first else ()


class Norm:
    """Layer norm, statistics in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self._weight = weight
        self._bias = bias
        self._eps = eps

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self._weight, self._bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)
