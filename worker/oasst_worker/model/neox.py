"""GPT-NeoX, straight through.

Every step is one packed batch: the rows of all sequences stand one under the other, without padding, and meet in every
layer's products; only attention takes them apart again, sequence by sequence (see `attention`).

Shapes: `rows` new tokens in this step, `heads` attention heads of `head_dim`, `hidden` = heads * head_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from oasst_worker.model.attention import attend_prompt_tile, attend_token
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.linear import Linear, build_linear, is_row_exact
from oasst_worker.model.weights import LayerWeights, NeoXWeights

__all__ = ["AttentionSpan", "NeoX", "StepInputs"]


@dataclass(frozen=True, slots=True)
class AttentionSpan:
    """Rows of one sequence that attend together: a tile of a prompt, or one generated token."""

    first_row: int
    num_rows: int
    # Where the sequence's positions lie in the cache, from its first to the last row's own: a run, or an index each.
    positions: slice | Tensor
    is_prompt: bool


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's rows. All tensors on the model's device."""

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64, in the sequence
    cache_positions: Tensor  # [rows] int64, in the KV cache: where each row's key and value go
    spans: Sequence[AttentionSpan]
    drawing_rows: Tensor  # [drawing] int64, the rows whose logits are wanted


class NeoX:
    """The model's maths; weights in memory, nothing else kept between steps."""

    def __init__(
        self,
        config: NeoXConfig,
        weights: NeoXWeights,
        make_linear: Callable[..., Linear] = build_linear,
    ) -> None:
        self.config = config
        self._embedding = weights.embed_in  # [vocab, hidden]
        self._layers = [_Layer(config, layer, make_linear) for layer in weights.layers]
        self._final_norm = _Norm(weights.final_norm_weight, weights.final_norm_bias, config.layer_norm_eps)
        self._head = make_linear(weights.head, None)
        self._cos, self._sin = _rotary_table(config, self._embedding.device, self._embedding.dtype)

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    def is_row_exact(self) -> bool:
        """On this machine no row's bits depend on the rows beside it; tried on one layer's products and the head."""
        hidden, intermediate = self.config.hidden_size, self.config.intermediate_size
        return all(
            is_row_exact(linear, in_features, self.dtype)
            for linear, in_features in [*self._layers[0].linears(hidden, intermediate), (self._head, hidden)]
        )

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, cache: Tensor) -> Tensor:
        """Writes every row's keys and values and returns the drawing rows' logits.

        `cache` is [layers, 2, heads, positions, head_dim], keys before values. Logits are [drawing, vocab] in fp32.
        """
        hidden = F.embedding(inputs.token_ids, self._embedding)
        cos, sin = self._cos[inputs.positions], self._sin[inputs.positions]
        for layer, layer_cache in zip(self._layers, cache, strict=True):
            hidden = layer(hidden, cos, sin, inputs, layer_cache)
        drawing = self._final_norm(hidden[inputs.drawing_rows])
        return self._head(drawing).float()


class _Layer:
    def __init__(self, config: NeoXConfig, weights: LayerWeights, make_linear: Callable[..., Linear]) -> None:
        self._config = config
        self._norm1 = _Norm(weights.norm1_weight, weights.norm1_bias, config.layer_norm_eps)
        self._norm2 = _Norm(weights.norm2_weight, weights.norm2_bias, config.layer_norm_eps)
        self._qkv = make_linear(weights.qkv_weight, weights.qkv_bias)
        self._dense = make_linear(weights.dense_weight, weights.dense_bias)
        self._mlp_in = make_linear(weights.mlp_in_weight, weights.mlp_in_bias, config.hidden_act)
        self._mlp_out = make_linear(weights.mlp_out_weight, weights.mlp_out_bias)

    def linears(self, hidden: int, intermediate: int) -> list[tuple[Linear, int]]:
        """The layer's products with their numbers of input features."""
        return [
            (self._qkv, hidden),
            (self._dense, hidden),
            (self._mlp_in, hidden),
            (self._mlp_out, intermediate),
        ]

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, inputs: StepInputs, cache: Tensor) -> Tensor:
        attended = self._dense(self._attend(self._norm1(hidden), cos, sin, inputs, cache))
        if self._config.parallel_residual:
            return self._mlp_out(self._mlp_in(self._norm2(hidden))).add_(attended).add_(hidden)
        hidden = attended.add_(hidden)
        return self._mlp_out(self._mlp_in(self._norm2(hidden))).add_(hidden)

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor, inputs: StepInputs, cache: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, hidden]; every row's key and value stand in the cache afterwards."""
        rows, heads, head_dim = x.shape[0], self._config.num_heads, self._config.head_dim
        qkv = self._qkv(x).view(rows, 3 * heads, head_dim)
        _rotate_(qkv[:, : 2 * heads, : self._config.rotary_dim], cos, sin)
        keys_values = qkv[:, heads:].view(rows, 2, heads, head_dim).permute(1, 2, 0, 3)
        cache.index_copy_(2, inputs.cache_positions, keys_values)
        queries = qkv[:, :heads]
        attended = torch.zeros_like(x)
        for span in inputs.spans:
            keys, values = cache[:, None, :, span.positions].unbind()
            own = slice(span.first_row, span.first_row + span.num_rows)
            attend = attend_prompt_tile if span.is_prompt else attend_token
            outcome = attend(queries[own].transpose(0, 1)[None], keys, values)
            attended[own] = outcome[0].transpose(0, 1).flatten(1)
        return attended


class _Norm:
    """Layer norm, statistics in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self._weight = weight
        self._bias = bias
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)


def _rotary_table(config: NeoXConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, [max_positions, 1, rotary_dim] each; computed in fp32."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device) / config.rotary_dim
    frequencies = 1.0 / (config.rotary_base**exponents)
    positions = torch.arange(config.max_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies).repeat(1, 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary position embedding in place, halves rotated against each other.

    x [rows, heads, rotary_dim]; cos and sin [rows, 1, rotary_dim].
    """
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1).mul_(sin)
    x.mul_(cos).add_(rotated)
