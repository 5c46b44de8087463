"""GPT-NeoX, straight through.

Every step is one packed batch: the rows of all sequences stand one under the other, without padding, and meet in every
layer's products; only attention takes them apart again, sequence by sequence (see `attention`).

In one process of several (see `ranks`) the weights are a share: of the heads, of the MLP's inner dimension and of the
vocabulary. All processes make the same calls.

Shapes: `rows` new tokens in this step, `heads` attention heads of `head_dim`, `hidden` = heads * head_dim.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from oasst_worker.model.attention import Attention, build_attention
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import DecodeInputs, StepInputs
from oasst_worker.model.layers import CompiledHead, CompiledModel
from oasst_worker.model.linear import Linear, build_linear, is_row_exact
from oasst_worker.model.ranks import ALONE, Ranks
from oasst_worker.model.stack import LayerStack, Norm
from oasst_worker.model.weights import NeoXWeights

__all__ = ["KVCache", "NeoX"]

# Of each place the cache of its layers.
KVCache = list[Tensor]


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
        """`weights` are those of the share of `ranks`; layers are taken one by one."""
        self.config = config
        self.ranks = ranks
        self._share_config = ranks.share.of_config(config)
        self._embedding = weights.embed_in  # [vocab, hidden]; of the vocabulary `_tokens`
        self._tokens = ranks.share.of(config.vocab_size)
        self._stacks = [
            LayerStack(config, run, make_linear, make_attention, ranks, dtype=self.dtype) for run in weights.runs
        ]
        self._final_norm = Norm(weights.final_norm_weight, weights.final_norm_bias, config.layer_norm_eps)
        self._head = make_linear(weights.head, None)
        self._compiled_head: CompiledHead | None = None
        self._compiled: CompiledModel | None = None
        if ranks is ALONE:
            with suppress(RuntimeError):  # Then the parts are called one by one.
                self._compiled_head = CompiledHead(self._final_norm.tensors, config.layer_norm_eps, self._head)
                if len(self._stacks) == 1 and (layers := self._stacks[0].compiled):
                    self._compiled = CompiledModel(self._embedding, layers, self._compiled_head)

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @cached_property
    def is_row_exact(self) -> bool:
        """On this machine no row's bits depend on the rows beside it; tried on one layer's products and the head."""
        hidden, parts = self.config.hidden_size, self._stacks[0].first_layer()
        linears = [
            (parts.qkv, hidden),
            (parts.dense, self._share_config.num_heads * self.config.head_dim),
            (parts.mlp_in, hidden),
            (parts.mlp_out, self._share_config.intermediate_size),
            (self._head, hidden),
        ]
        return all(is_row_exact(linear, in_features, self.dtype, self.device) for linear, in_features in linears)

    @property
    def has_compiled_layers(self) -> bool:
        """A step's layers are one call for each place."""
        return all(stack.compiled is not None for stack in self._stacks)

    @property
    def is_position_exact(self) -> bool:
        """Keys and values of a position have the same bits however it is computed."""
        return all(stack.is_position_exact for stack in self._stacks)

    @property
    def is_on_one_device(self) -> bool:
        """All of the model is in the memory of `device`: nothing is moved, or read from disk, while it computes."""
        return all(stack.is_kept_on(self.device) for stack in self._stacks)

    def make_cache(self, num_blocks: int) -> KVCache:
        """A KV cache of so many blocks, for `forward`."""
        return [stack.make_cache(num_blocks) for stack in self._stacks]

    def make_rows(self, num_rows: int) -> Tensor:
        """Room for rows of `hidden`, [num_rows, hidden], not initialised."""
        return self._embedding.new_empty(num_rows, self.config.hidden_size)

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Writes every row's keys and values and returns the drawing rows' logits, as `logits`."""
        if self._compiled:
            return self._compiled(inputs, cache[0])
        return self.logits(self.hidden(inputs, cache)[inputs.drawing_rows])

    @torch.inference_mode()
    def hidden(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        """Writes every row's keys and values and returns what the layers make of it, [rows, hidden]."""
        hidden = self._embed(inputs.token_ids)
        for stack, stack_cache in zip(self._stacks, cache, strict=True):
            hidden = stack(hidden, inputs, stack_cache)
        return hidden.to(self.device)

    @property
    def can_decode(self) -> bool:
        """`prepare_decode` works here."""
        is_one_stack = len(self._stacks) == 1 and self.is_on_one_device
        return is_one_stack and self._stacks[0].can_decode and self.ranks is ALONE

    def prepare_decode(self, inputs: DecodeInputs, cache: KVCache) -> Callable[[], Tensor]:
        """A function that computes what stands in the inputs' tensors when it is called: every row's logits.

        It launches the same kernels on the same memory each time and waits for none of them.
        """
        [stack], [stack_cache] = self._stacks, cache
        through_layers = stack.prepare_decode(inputs, stack_cache)

        @torch.inference_mode()
        def decode() -> Tensor:
            return self.logits(through_layers(self._embed(inputs.token_ids)))

        return decode

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of rows of `hidden`, [rows, vocab] in fp32; whole at the first rank, where tokens are drawn."""
        if self._compiled_head:
            return self._compiled_head(hidden)
        return self.ranks.gather_columns(self._head(self._final_norm(hidden)), self.config.vocab_size).float()

    def _embed(self, token_ids: Tensor) -> Tensor:
        if self.ranks is ALONE:
            return F.embedding(token_ids, self._embedding)
        rows = token_ids - self._tokens.start
        is_elsewhere = (rows < 0) | (rows >= len(self._embedding))
        embedded = F.embedding(rows.masked_fill(is_elsewhere, 0), self._embedding)
        return self.ranks.sum(embedded.masked_fill_(is_elsewhere[:, None], 0))
