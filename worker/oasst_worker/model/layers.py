"""All layers of the model in one call of a kernel, where every part of them has been compiled."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oasst_worker.model.attention import Attention, CompiledAttention
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import StepInputs
from oasst_worker.model.kernels import load_kernels
from oasst_worker.model.linear import CompiledLinear, Linear

__all__ = ["CompiledLayers", "LayerParts"]


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
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden_size", "is_parallel")),
        ("epsilon", ctypes.c_double),
        ("layers", ctypes.c_void_p),
    )


class _Buffers(ctypes.Structure):
    """The kernel's `buffers`, field for field."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("hidden", "next", "normed", "qkv", "attended", "dense", "inner", "words")
    )


class CompiledLayers:
    """The layers by `kernels/layers.c`: one parallel region in a step, no operator between two parts.

    Raises:
        RuntimeError: at construction, where a part is not compiled, or only a share of a layer is here.
    """

    def __init__(
        self,
        config: NeoXConfig,
        layers: Sequence[LayerParts],
        attention: Attention,
    ) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        shapes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden))
        linears = [(each.qkv, each.dense, each.mlp_in, each.mlp_out) for each in layers]
        if not isinstance(attention, CompiledAttention):
            raise RuntimeError("attention is not compiled")
        compiled = [[part for part in layer if isinstance(part, CompiledLinear)] for layer in linears]
        if any(tuple((part.in_features, part.out_features) for part in layer) != shapes for layer in compiled):
            raise RuntimeError("a linear layer is not compiled, or not whole")
        library = load_kernels("layers", *compiled[0][0].definitions, *attention.definitions)
        if library is None:
            raise RuntimeError("no kernel for all layers here")
        library.prepare()
        self._config = config
        self._attention = attention
        self._kernel = library.apply_layers
        self._kernel.argtypes = (*(ctypes.c_void_p,) * 3, ctypes.c_int64, ctypes.c_void_p)
        self._kernel.restype = None
        self._most_words = max(part.words for layer in compiled for part in layer)
        norms = [[norm.float() for norm in each.norms] for each in layers]
        table = (_Layer * len(layers))(
            *(
                _Layer(*(norm.data_ptr() for norm in layer_norms), *(part.address for part in layer))
                for layer_norms, layer in zip(norms, compiled, strict=True)
            )
        )
        self._stack = _Stack(
            len(layers), hidden, config.parallel_residual, config.layer_norm_eps, ctypes.addressof(table)
        )
        self._alive = (norms, compiled, table)

    def __call__(self, hidden: Tensor, inputs: StepInputs, cache: Tensor) -> Tensor:
        """[rows, hidden], which may be overwritten, -> [rows, hidden]; keys and values are in the cache."""
        rows, size = hidden.shape
        widths = (size, 3 * size, size, size, self._config.intermediate_size)
        spare = hidden.new_empty(rows * sum(widths))
        starts = [0]
        for width in widths[:-1]:
            starts.append(starts[-1] + rows * width * spare.itemsize)
        following = torch.empty_like(hidden)
        words = torch.empty(rows * (self._most_words + 1), dtype=torch.int32)
        buffers = _Buffers(
            hidden.data_ptr(),
            following.data_ptr(),
            *(spare.data_ptr() + start for start in starts),
            words.data_ptr(),
        )
        step = self._attention.prepare(inputs)
        self._kernel(
            ctypes.addressof(self._stack), step.address, cache.data_ptr(), cache.stride(0), ctypes.addressof(buffers)
        )
        return following if self._config.num_layers % 2 else hidden
