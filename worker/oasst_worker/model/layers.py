"""All layers of the model in one call of a kernel, and the whole model, where every part has been compiled."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from oasst_worker.model.attention import Attention, CompiledAttention
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import StepInputs
from oasst_worker.model.linear import CompiledLinear, Linear
from oasst_worker.model.ranks import Ranks

__all__ = ["CompiledHead", "CompiledLayers", "CompiledModel", "LayerParts"]

_LINE = 64  # Bytes of the processor's cache: where each buffer begins.


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What one layer is made of."""

    norms: tuple[Tensor, ...]  # Weight and bias of the first and of the second.
    qkv: Linear
    dense: Linear
    mlp_in: Linear
    mlp_out: Linear


class _Layer(ctypes.Structure):
    """The kernel's `layer`, field for field."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"),
            *("qkv", "dense", "mlp_in", "mlp_out"),
        )
    )


class _Stack(ctypes.Structure):
    """The kernel's `stack`, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden_size", "is_parallel", "adds_residual")),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("layers", "attend", "sum", "party")),
    )


class _Head(ctypes.Structure):
    """The kernel's `head`, field for field."""

    _fields_ = (
        ("hidden_size", ctypes.c_int64),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("norm_weight", "norm_bias", "linear")),
    )


class _Model(ctypes.Structure):
    """The kernel's `model`, field for field."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("embedding", "layers", "head"))


class _Buffers(ctypes.Structure):
    """The kernel's `buffers`, field for field."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("hidden", "next", "normed", "qkv", "attended", "dense", "inner", "scratch")
    )


class CompiledLayers:
    """The layers by `kernels/layers.c`: one parallel region in a step, no operator between two parts.

    Raises:
        RuntimeError: at construction, where a part is not compiled, or ranks share no memory.
    """

    def __init__(
        self,
        config: NeoXConfig,
        layers: Sequence[LayerParts],
        attention: Attention,
        ranks: Ranks,
    ) -> None:
        """`layers` are those of the share of `ranks`."""
        share = ranks.share.of_config(config)
        hidden, heads, inner = config.hidden_size, share.num_heads * share.head_dim, share.intermediate_size
        shapes = ((hidden, 3 * heads), (heads, hidden), (hidden, inner), (inner, hidden))
        if ranks.share.num_ranks > 1 and ranks.memory is None:
            raise RuntimeError("ranks share no memory")
        linears = [(each.qkv, each.dense, each.mlp_in, each.mlp_out) for each in layers]
        if not isinstance(attention, CompiledAttention):
            raise RuntimeError("attention is not compiled")
        compiled = [[part for part in layer if isinstance(part, CompiledLinear)] for layer in linears]
        if any(tuple((part.in_features, part.out_features) for part in layer) != shapes for layer in compiled):
            raise RuntimeError("a linear layer is not compiled")
        self.library = compiled[0][0].library
        self.attention = attention
        self._num_layers = len(layers)
        self._kernel = self.library.apply_layers
        self._kernel.argtypes = (*(ctypes.c_void_p,) * 3, ctypes.c_int64, ctypes.c_void_p)
        self._kernel.restype = None
        self._scratch_words = 1 + max(part.num_words for layer in compiled for part in layer)
        self._widths = (hidden, hidden, hidden, 3 * heads, heads, hidden, inner)
        norms = [[norm.float() for norm in each.norms] for each in layers]
        table = (_Layer * len(layers))(
            *(
                _Layer(*(norm.data_ptr() for norm in layer_norms), *(part.address for part in layer))
                for layer_norms, layer in zip(norms, compiled, strict=True)
            )
        )
        self._stack = _Stack(
            len(layers),
            hidden,
            config.parallel_residual,
            ranks.share.is_first,
            config.layer_norm_eps,
            ctypes.addressof(table),
            attention.address,
            *((ranks.memory.sum_address, ranks.memory.party_address) if ranks.memory else (None, None)),
        )
        self._ranks = ranks
        self._num_sums = 0 if ranks.memory is None else len(layers) * (1 if config.parallel_residual else 2)
        self._alive = (norms, compiled, table)

    @property
    def address(self) -> int:
        """Of the kernel's `stack`; this object keeps it alive."""
        return ctypes.addressof(self._stack)

    def make_buffers(self, rows: int, dtype: torch.dtype) -> tuple[_Buffers, Tensor]:
        """The kernel's `buffers` for so many rows, and the memory they lie in."""
        row_bytes = [*(width * dtype.itemsize for width in self._widths), self._scratch_words * torch.int32.itemsize]
        ends = [*accumulate(-(-rows * size // _LINE) * _LINE for size in row_bytes)]
        memory = torch.empty(ends[-1], dtype=torch.uint8)
        return _Buffers(*(memory.data_ptr() + start for start in (0, *ends[:-1]))), memory

    def __call__(self, hidden: Tensor, inputs: StepInputs, cache: Tensor) -> Tensor:
        """[rows, hidden], which may be overwritten, -> [rows, hidden]; keys and values are in the cache."""
        following = torch.empty_like(hidden)
        buffers, memory = self.make_buffers(len(hidden), hidden.dtype)
        buffers.hidden, buffers.next = hidden.data_ptr(), following.data_ptr()
        step = self.attention.prepare(inputs)
        self._kernel(self.address, step.address, cache.data_ptr(), cache[0].nbytes, ctypes.addressof(buffers))
        del memory  # Until here it was needed.
        if self._ranks.memory:
            self._ranks.memory.check()
            self._ranks.traffic.add(hidden, self._num_sums)
        return following if self._num_layers % 2 else hidden


class CompiledHead:
    """The last norm and the head by `kernels/layers.c`.

    Raises:
        RuntimeError: at construction, where the head is not compiled.
    """

    def __init__(self, final_norm: tuple[Tensor, Tensor], epsilon: float, linear: Linear) -> None:
        """`final_norm` are weight and bias, [hidden] each."""
        if not isinstance(linear, CompiledLinear):
            raise RuntimeError("the head is not compiled")
        self.library = linear.library
        self.vocab_size = linear.out_features
        self._scratch_words = linear.num_words + 1
        self._kernel = self.library.apply_head
        self._kernel.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, *(ctypes.c_void_p,) * 5)
        self._kernel.restype = None
        norm = [each.float() for each in final_norm]
        as_floats = linear.giving_floats()
        addresses = (*(each.data_ptr() for each in norm), ctypes.addressof(as_floats))
        self._head = _Head(linear.in_features, epsilon, *addresses)
        self._alive = (norm, linear, as_floats)

    @property
    def address(self) -> int:
        """Of the kernel's `head`; this object keeps it alive."""
        return ctypes.addressof(self._head)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> logits [rows, vocab] fp32."""
        hidden, rows = hidden.contiguous(), torch.arange(len(hidden))
        normed = torch.empty_like(hidden)
        scratch = torch.empty(len(hidden) * self._scratch_words, dtype=torch.int32)
        logits = torch.empty(len(hidden), self.vocab_size)
        arrays = (rows, hidden, normed, scratch, logits)
        self._kernel(self.address, torch.get_num_threads(), len(hidden), *(array.data_ptr() for array in arrays))
        return logits


class CompiledModel:
    """The model from token ids to logits by `kernels/layers.c`: one call in a step.

    Raises:
        RuntimeError: at construction, where layers and head are of different kinds.
    """

    def __init__(self, embedding: Tensor, layers: CompiledLayers, head: CompiledHead) -> None:
        """`embedding` is [vocab, hidden]."""
        if head.library is not layers.library:
            raise RuntimeError("head and layers are compiled for numbers of different kinds")
        self._embedding = embedding.contiguous()
        self._layers = layers
        self._vocab_size = head.vocab_size
        self._kernel = layers.library.apply_model
        self._kernel.argtypes = (
            *(ctypes.c_void_p,) * 3,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int64,
            *(ctypes.c_void_p,) * 3,
        )
        self._kernel.restype = ctypes.c_int64
        self._model = _Model(self._embedding.data_ptr(), layers.address, head.address)
        self._alive = head

    def __call__(self, inputs: StepInputs, cache: Tensor) -> Tensor:
        """Returns the drawing rows' logits, [drawing, vocab] fp32; all rows' keys and values are in the cache.

        Raises:
            IndexError: if a token id is not in the vocabulary.
        """
        rows, drawing = len(inputs.token_ids), len(inputs.drawing_rows)
        buffers, memory = self._layers.make_buffers(rows, self._embedding.dtype)
        logits = torch.empty(drawing, self._vocab_size)
        step = self._layers.attention.prepare(inputs)
        taken = self._kernel(
            ctypes.addressof(self._model),
            step.address,
            cache.data_ptr(),
            cache[0].nbytes,
            inputs.token_ids.data_ptr(),
            drawing,
            inputs.drawing_rows.data_ptr(),
            ctypes.addressof(buffers),
            logits.data_ptr(),
        )
        del memory  # Until here it was needed.
        if taken < rows:
            raise IndexError(f"{inputs.token_ids[taken]} is not the id of one of {self._vocab_size} tokens")
        return logits
