"""GPT-NeoX, straight through.

Every step is one packed batch: the rows of all sequences stand one under the other, without padding, and meet in every
layer's products; only attention takes them apart again, sequence by sequence (see `attention`).

In one process of several (see `ranks`) the weights are a share: of the heads, of the MLP's inner dimension and of the
vocabulary. All processes make the same calls.

Shapes: `rows` new tokens in this step, `heads` attention heads of `head_dim`, `hidden` = heads * head_dim.
"""

from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from oasst_worker.model.attention import Attend, Attention, PagedAttention, build_attention
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import DecodeInputs, StepInputs
from oasst_worker.model.layers import CompiledLayers, LayerParts
from oasst_worker.model.linear import Linear, build_linear, is_row_exact
from oasst_worker.model.ranks import ALONE, Ranks
from oasst_worker.model.weights import LayerWeights, NeoXWeights

__all__ = ["NeoX"]


class NeoX:
    """The model's maths; weights in memory, nothing else kept between steps."""

    def __init__(
        self,
        config: NeoXConfig,
        weights: NeoXWeights,
        make_linear: Callable[..., Linear] = build_linear,
        make_attention: Callable[..., Attention] = build_attention,
        ranks: Ranks = ALONE,
    ) -> None:
        """`weights` are those of the share of `ranks`; their layers are taken one by one."""
        self.config = config
        self.ranks = ranks
        self._share_config = ranks.share.of_config(config)
        self._embedding = weights.embed_in  # [vocab, hidden]; of the vocabulary `_tokens`
        self._tokens = ranks.share.of(config.vocab_size)
        self._layers = [_Layer(config, layer, make_linear, ranks) for layer in weights.layers]
        self._final_norm = _Norm(weights.final_norm_weight, weights.final_norm_bias, config.layer_norm_eps)
        self._head = make_linear(weights.head, None)
        self._attention = make_attention(self._share_config, dtype=self.dtype, device=self.device)
        self._compiled: CompiledLayers | None = None
        with suppress(RuntimeError):  # Then the layers are called one by one.
            self._compiled = CompiledLayers(config, [layer.parts for layer in self._layers], self._attention)

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    def is_row_exact(self) -> bool:
        """On this machine no row's bits depend on the rows beside it; tried on one layer's products and the head."""
        share = self._share_config
        linears = self._layers[0].linears(share.hidden_size, share.num_heads * share.head_dim, share.intermediate_size)
        return all(
            is_row_exact(linear, in_features, self.dtype, self.device)
            for linear, in_features in [*linears, (self._head, share.hidden_size)]
        )

    @property
    def has_compiled_layers(self) -> bool:
        """A step's layers are one call."""
        return self._compiled is not None

    @property
    def is_position_exact(self) -> bool:
        """Keys and values of a position have the same bits however it is computed."""
        return self._attention.is_position_exact

    def make_cache(self, num_blocks: int) -> Tensor:
        """A KV cache of so many blocks, for `forward`."""
        return self._attention.make_cache(num_blocks)

    def make_rows(self, num_rows: int) -> Tensor:
        """Room for rows of `hidden`, [num_rows, hidden], not initialised."""
        return self._embedding.new_empty(num_rows, self.config.hidden_size)

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, cache: Tensor) -> Tensor:
        """Writes every row's keys and values and returns the drawing rows' logits, as `logits`."""
        return self.logits(self.hidden(inputs, cache)[inputs.drawing_rows])

    @torch.inference_mode()
    def hidden(self, inputs: StepInputs, cache: Tensor) -> Tensor:
        """Writes every row's keys and values and returns what the layers make of it, [rows, hidden]."""
        hidden = self._embed(inputs.token_ids)
        if self._compiled:
            return self._compiled(hidden, inputs, cache)
        return self._through_layers(hidden, self._attention.prepare(inputs), cache)

    @property
    def can_decode(self) -> bool:
        """`prepare_decode` works here."""
        return isinstance(self._attention, PagedAttention) and self.ranks is ALONE

    def prepare_decode(self, inputs: DecodeInputs, cache: Tensor) -> Callable[[], Tensor]:
        """A function that computes what stands in the inputs' tensors when it is called: every row's logits.

        It launches the same kernels on the same memory each time and waits for none of them.
        """
        if not isinstance(self._attention, PagedAttention):
            raise RuntimeError(f"{type(self._attention).__name__} cannot decode from tensors alone")
        attend = self._attention.prepare_decode(inputs)

        @torch.inference_mode()
        def decode() -> Tensor:
            return self.logits(self._through_layers(self._embed(inputs.token_ids), attend, cache))

        return decode

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of rows of `hidden`, [rows, vocab] in fp32; whole at the first rank, where tokens are drawn."""
        return self.ranks.gather_columns(self._head(self._final_norm(hidden)), self.config.vocab_size).float()

    def _through_layers(self, hidden: Tensor, attend: Attend, cache: Tensor) -> Tensor:
        for layer, layer_cache in zip(self._layers, cache, strict=True):
            hidden = layer(hidden, attend, layer_cache)
        return hidden

    def _embed(self, token_ids: Tensor) -> Tensor:
        if self.ranks is ALONE:
            return F.embedding(token_ids, self._embedding)
        rows = token_ids - self._tokens.start
        is_elsewhere = (rows < 0) | (rows >= len(self._embedding))
        embedded = F.embedding(rows.masked_fill(is_elsewhere, 0), self._embedding)
        return self.ranks.sum(embedded.masked_fill_(is_elsewhere[:, None], 0))


class _Layer:
    def __init__(
        self, config: NeoXConfig, weights: LayerWeights, make_linear: Callable[..., Linear], ranks: Ranks
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._norm1 = _Norm(weights.norm1_weight, weights.norm1_bias, config.layer_norm_eps)
        self._norm2 = _Norm(weights.norm2_weight, weights.norm2_bias, config.layer_norm_eps)
        self._qkv = make_linear(weights.qkv_weight, weights.qkv_bias)
        self._dense = make_linear(weights.dense_weight, weights.dense_bias)
        self._mlp_in = make_linear(weights.mlp_in_weight, weights.mlp_in_bias, config.hidden_act)
        self._mlp_out = make_linear(weights.mlp_out_weight, weights.mlp_out_bias)

    @property
    def parts(self) -> LayerParts:
        norms = (*self._norm1.tensors, *self._norm2.tensors)
        return LayerParts(norms, self._qkv, self._dense, self._mlp_in, self._mlp_out)

    def linears(self, hidden: int, attended: int, intermediate: int) -> list[tuple[Linear, int]]:
        """The layer's products with their numbers of input features."""
        return [
            (self._qkv, hidden),
            (self._dense, attended),
            (self._mlp_in, hidden),
            (self._mlp_out, intermediate),
        ]

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


class _Norm:
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
