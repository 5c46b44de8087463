"""Linear layers whose rows do not depend on each other, bit for bit.

Batching must not change a sequence's numbers. A matrix product's library picks its kernel by the number of rows, and
with the kernel the order of additions; so each layer here computes a row the same way whatever stands beside it:

- `CompiledLinear`: our own kernel, fp32 on a CPU. Every output is one sum in one order, for any number of rows or
  threads, and activation and residuals are added on the way out.
- `PackedLinear`: oneDNN with the weight packed once, for bf16 or where nothing can be compiled. One kernel for 2 to 512
  rows, and two to four times faster than the plain path at few rows.
- `TiledLinear`: the plain product, always of the same number of rows. Where oneDNN cannot pack.
- `PlainLinear`: the plain product as it is: the reference, and the path of other devices than the CPU.

oneDNN's promise is not written down: `is_row_exact` tries a layer on the machine it runs on.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from oasst_worker.model.config import Activation
from oasst_worker.model.kernels import load_kernels

__all__ = ["CompiledLinear", "Linear", "PackedLinear", "PlainLinear", "TiledLinear", "build_linear", "is_row_exact"]

# Rows for which packed products were found to give each row the same bits; fewer are padded, more are split.
MIN_ROWS = 2
MAX_ROWS = 512
_TILE_ROWS = 32

# Activation -> (the function, oneDNN's name for it, oneDNN's variant of it).
_ACTIVATIONS: dict[Activation, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "gelu": (F.gelu, "gelu", "none"),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu", "tanh"),
}


class Linear(Protocol):
    """`activation(x @ weight.T + bias)`, and residuals added to it in the order they are given."""

    def __call__(self, x: Tensor, *residuals: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]. At most two residuals, [rows, out_features] each."""
        ...


class PlainLinear:
    """The product as PyTorch's own operator computes it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> None:
        self._weight = weight
        self._bias = bias
        self._activate = _ACTIVATIONS[activation][0] if activation else None

    def __call__(self, x: Tensor, *residuals: Tensor) -> Tensor:
        product = F.linear(x, self._weight, self._bias)
        return _add_(self._activate(product) if self._activate else product, residuals)


class TiledLinear:
    """The plain product in tiles of a fixed number of rows, the last one padded."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> None:
        self._plain = PlainLinear(weight, bias, activation)

    def __call__(self, x: Tensor, *residuals: Tensor) -> Tensor:
        rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -rows % _TILE_ROWS))
        product = torch.cat([self._plain(tile) for tile in torch.split(padded, _TILE_ROWS)])[:rows]
        return _add_(product, residuals)


class PackedLinear:
    """The product by oneDNN, weight packed at construction, activation inside the kernel. CPU only.

    Raises:
        RuntimeError: at construction, where this processor has no such kernel for the weight's dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias
        _, self._activation, self._variant = _ACTIVATIONS[activation] if activation else (None, "none", "")

    def __call__(self, x: Tensor, *residuals: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows < MIN_ROWS:
            product = self._product(F.pad(x, (0, 0, 0, MIN_ROWS - rows)))[:rows]
        else:
            tiles = [self._product(tile) for tile in torch.split(x, MAX_ROWS)]
            product = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
        return _add_(product, residuals)

    def _product(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, self._activation, [], self._variant
        )
        return product


class _Layer(ctypes.Structure):
    """The kernel's `layer`, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "activation")),
        *((name, ctypes.c_void_p) for name in ("panels", "bias")),
    )


class CompiledLinear:
    """The product by `kernels/linear.c`, weight laid out in panels at construction. fp32 on a CPU only.

    Raises:
        RuntimeError: at construction, for another dtype, or where the kernel cannot be compiled.
    """

    _ACTIVATIONS: ClassVar[dict[Activation | None, int]] = {None: 0, "gelu": 1, "gelu_tanh": 2}

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> None:
        library = load_kernels("linear") if weight.dtype == torch.float32 else None
        if library is None:
            raise RuntimeError(f"no kernel for linear layers of {weight.dtype} here")
        self._kernel = library.apply
        self._kernel.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, *(ctypes.c_void_p,) * 4)
        self._kernel.restype = None
        self._out_features, self._in_features = weight.shape
        self._panels = _into_panels(weight, library.panel_width())
        self._bias = bias
        self._layer = _Layer(
            self._in_features,
            self._out_features,
            self._ACTIVATIONS[activation],
            self._panels.data_ptr(),
            None if bias is None else bias.data_ptr(),
        )

    def __call__(self, x: Tensor, *residuals: Tensor) -> Tensor:
        rows = x.shape[0]
        if x.shape[1] != self._in_features or any(each.shape != (rows, self._out_features) for each in residuals):
            raise ValueError(f"{[*x.shape]} and residuals do not fit {self._in_features} -> {self._out_features}")
        x, residuals = x.contiguous(), tuple(each.contiguous() for each in residuals)  # As a rule they are.
        product = x.new_empty(rows, self._out_features)
        first, second = (*(each.data_ptr() for each in residuals), None, None)[:2]
        layer = ctypes.addressof(self._layer)
        self._kernel(layer, torch.get_num_threads(), rows, x.data_ptr(), first, second, product.data_ptr())
        return product


def _into_panels(weight: Tensor, width: int) -> Tensor:
    """[out_features, in_features] -> [panels, in_features, width], the last panel filled up with zeros."""
    padded = F.pad(weight, (0, 0, 0, -weight.shape[0] % width))
    return padded.view(-1, width, weight.shape[1]).transpose(1, 2).contiguous()


def _add_(product: Tensor, residuals: tuple[Tensor, ...]) -> Tensor:
    for residual in residuals:
        product.add_(residual)
    return product


def build_linear(weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Linear:
    """The best layer for the weight's device and dtype on this machine.

    `weight` is [out_features, in_features], `bias` [out_features]; `activation` follows the product.
    """
    if weight.device.type != "cpu":
        return PlainLinear(weight, bias, activation)
    kinds: list[Callable[..., Linear]] = [CompiledLinear]
    if weight.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        kinds.append(PackedLinear)
    for kind in kinds:
        with suppress(RuntimeError, AttributeError):  # No such kernel here, or not in this build of PyTorch.
            return kind(weight, bias, activation)
    return TiledLinear(weight, bias, activation)


@torch.inference_mode()
def is_row_exact(linear: Linear, in_features: int, dtype: torch.dtype) -> bool:
    """Rows come out the same, bit for bit, at several numbers of rows and in another order, here and now."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, in_features, generator=generator).to(dtype)
    whole = linear(x)
    order = torch.randperm(len(x), generator=generator)
    return torch.equal(linear(x[order]), whole[order]) and all(
        torch.equal(linear(x[:rows].clone()), whole[:rows]) for rows in (1, 2, 3, 5, 8, 13, 16, 31, 33, 64)
    )
