"""Linear layers whose rows do not depend on each other, bit for bit.

Batching must not change a sequence's numbers. A matrix product's library picks its kernel by the number of rows, and
with the kernel the order of additions; so each layer here computes a row the same way whatever stands beside it:

- `CompiledLinear`: our own kernel on a CPU, for fp32, bf16 and int8 weights. Every output is one sum in one order, for
  any number of rows or threads, and activation and residuals are added on the way out.
- `PackedLinear`: oneDNN with the weight packed once, where nothing can be compiled. One kernel for 2 to 512 rows, and
  two to four times faster than the plain path at few rows.
- `TiledLinear`: the plain product, always of the same number of rows. Where oneDNN cannot pack, and on a GPU where
  it is asked for.
- `PlainLinear`: the plain product as it is: the reference, and the path of other devices than the CPU.
- `PlainQuantizedLinear`: the plain product of int8 weights, whose sums are exact in any order.

oneDNN's promise is not written down: `is_row_exact` tries a layer on the machine it runs on.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from oasst_worker.model.config import Activation
from oasst_worker.model.kernels import ROWS, SIZES, load_kernels
from oasst_worker.model.pages import zeros_in_large_pages
from oasst_worker.model.scales import int8_scales

__all__ = [
    "CompiledLinear",
    "Linear",
    "PackedLinear",
    "PlainLinear",
    "PlainQuantizedLinear",
    "QuantizedWeight",
    "TiledLinear",
    "build_linear",
    "build_quantized_linear",
    "build_row_exact_linear",
    "is_row_exact",
    "linear_kernel",
]

# Rows for which packed products were found to give each row the same bits; fewer are padded, more are split.
MIN_ROWS = 2
MAX_ROWS = 512
_TILE_ROWS = 32
# A GPU takes longer to read a weight than to multiply it with so many rows of fp16: fewer would hardly be faster.
_GPU_TILE_ROWS = 128

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

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation | None = None,
        *,
        tile_rows: int = _TILE_ROWS,
    ) -> None:
        self._plain = PlainLinear(weight, bias, activation)
        self._tile_rows = tile_rows

    def __call__(self, x: Tensor, *residuals: Tensor) -> Tensor:
        rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -rows % self._tile_rows))
        product = torch.cat([self._plain(tile) for tile in torch.split(padded, self._tile_rows)])[:rows]
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


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight in int8: `values * scales[:, None]`, the largest value of every output being 127 or -127."""

    values: Tensor  # [out_features, in_features] int8
    scales: Tensor  # [out_features] fp32

    @classmethod
    def of(cls, weight: Tensor) -> "QuantizedWeight":
        """The nearest to a floating-point weight, [out_features, in_features]."""
        scales = weight.abs().amax(dim=1).float() / 127
        scales = torch.where(scales == 0, 1.0, scales)
        values = (weight.float() / scales[:, None]).round().to(torch.int8)
        return cls(values, scales)


class PlainQuantizedLinear:
    """The product of int8 weights with rows brought to int8 each by its own largest number, as PyTorch computes it.

    Products and sums are of whole numbers: those of `_EXACT_INPUTS` inputs fit into fp32's 24 bits, so they are exact
    in any order.
    """

    _EXACT_INPUTS = 2**24 // 127**2
    # PyTorch's activations round a vector's numbers and the few behind the last vector differently: there are none.
    _WHOLE_VECTORS = 64

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> None:
        self._out_features = weight.shape[0]
        rest = -self._out_features % self._WHOLE_VECTORS
        self._weight = QuantizedWeight.of(F.pad(weight, (0, 0, 0, rest)))
        self._bias = None if bias is None else F.pad(bias.float(), (0, rest))
        self._activate = _ACTIVATIONS[activation][0] if activation else None

    def __call__(self, x: Tensor, *residuals: Tensor) -> Tensor:
        rows = x.float()
        scales = int8_scales(rows)
        product = self._sums((rows / scales).round()) * (scales * self._weight.scales)
        if self._bias is not None:
            product += self._bias
        if self._activate:
            product = self._activate(product)
        return _add_(product[:, : self._out_features], residuals).to(x.dtype, memory_format=torch.contiguous_format)

    def _sums(self, rows: Tensor) -> Tensor:
        weight = self._weight.values
        sums = torch.zeros(len(rows), len(weight), dtype=torch.float64)
        for start in range(0, weight.shape[1], self._EXACT_INPUTS):
            end = start + self._EXACT_INPUTS
            sums += F.linear(rows[:, start:end], weight[:, start:end].float())
        return sums.float()


class _Linear(ctypes.Structure):
    """The kernel's `linear`, field for field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "num_words", "activation", "gives_floats")),
        *((name, ctypes.c_void_p) for name in ("panels", "bias", "scales", "offsets")),
    )


# The kernel's names for weights.
_WEIGHTS = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.int8: "INT8"}
# By the size of a weight's number: how many of them make a word. Other than fp32, whole tiles of 16 words are read.
_INPUTS_OF_A_WORD = {4: 1, 2: 2, 1: 4}
_TILE_WORDS = 16
# Behind each output, while a weight is laid out: as many as a vector has lanes, at most.
_SPARE_WORDS = 16


def linear_kernel(dtype: torch.dtype, *, quantize: bool) -> tuple[str, ...] | None:
    """What `load_kernels` is asked for; None where there is no such kernel."""
    if dtype not in ROWS:
        return None
    return ("layers", f"WEIGHTS={_WEIGHTS[torch.int8 if quantize else dtype]}", *SIZES, *ROWS[dtype])


class CompiledLinear:
    """The product by `kernels/linear.h`, weight laid out in panels at construction. fp32 and bf16 on a CPU.

    With `quantize` the weight is held in int8, and rows are brought to int8 as they come.

    Raises:
        RuntimeError: at construction, for another dtype, or where the kernel cannot be compiled.
    """

    _ACTIVATIONS: ClassVar[dict[Activation | None, int]] = {None: 0, "gelu": 1, "gelu_tanh": 2}

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None, *, quantize: bool = False
    ) -> None:
        kernel = linear_kernel(weight.dtype, quantize=quantize)
        library = load_kernels(*kernel) if kernel else None
        if library is None:
            raise RuntimeError(f"no kernel for linear layers of {weight.dtype} here")
        self.library = library  # Of all kernels for numbers of its kind.
        self._kernel = library.apply
        self._kernel.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, *(ctypes.c_void_p,) * 5)
        self._kernel.restype = None
        self._dtype = weight.dtype
        self.out_features, self.in_features = weight.shape
        self.num_words = _words_of(self.in_features, 1 if quantize else weight.itemsize)
        width = library.prepare()
        num_panels = -(-self.out_features // width)
        panels = zeros_in_large_pages(num_panels, self.num_words, width, dtype=torch.int32)
        scales = torch.zeros(num_panels * width) if quantize else None
        offsets = torch.zeros(num_panels * width, dtype=torch.int32) if quantize else None
        if bias is not None:
            bias = F.pad(bias.float(), (0, num_panels * width - self.out_features)).contiguous()
        self._tensors = (panels, bias, scales, offsets)  # The kernel's structure points into these.
        self._linear = _Linear(
            self.in_features,
            self.out_features,
            self.num_words,
            self._ACTIVATIONS[activation],
            False,
            *(None if tensor is None else tensor.data_ptr() for tensor in self._tensors),
        )
        threads, weight = torch.get_num_threads(), weight.contiguous()
        scratch = torch.empty(threads * width * (self.num_words + _SPARE_WORDS), dtype=torch.int32)
        lay_out = library.lay_out
        lay_out.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
        lay_out.restype = None
        lay_out(self.address, threads, weight.data_ptr(), scratch.data_ptr())

    @property
    def address(self) -> int:
        """Of the kernel's `linear`; this object keeps it alive."""
        return ctypes.addressof(self._linear)

    def giving_floats(self) -> ctypes.Structure:
        """The kernel's `linear` for outputs widened to fp32 as they come; this object keeps alive what it needs."""
        linear = _Linear.from_buffer_copy(self._linear)
        linear.gives_floats = True
        return linear

    def __call__(self, x: Tensor, *residuals: Tensor) -> Tensor:
        rows = x.shape[0]
        if x.shape[1] != self.in_features or any(each.shape != (rows, self.out_features) for each in residuals):
            raise ValueError(f"{[*x.shape]} and residuals do not fit {self.in_features} -> {self.out_features}")
        if any(each.dtype != self._dtype for each in (x, *residuals)):
            raise ValueError(f"rows must be {self._dtype}")
        x, residuals = x.contiguous(), tuple(each.contiguous() for each in residuals)  # As a rule they are.
        product = x.new_empty(rows, self.out_features)
        scratch = torch.empty(rows * (self.num_words + 1), dtype=torch.int32)
        first, second = (*(each.data_ptr() for each in residuals), None, None)[:2]
        self._kernel(
            self.address,
            torch.get_num_threads(),
            rows,
            x.data_ptr(),
            scratch.data_ptr(),
            first,
            second,
            product.data_ptr(),
        )
        return product


def _words_of(inputs: int, itemsize: int) -> int:
    """How many words an output's inputs take in a panel."""
    inputs_of_a_word = _INPUTS_OF_A_WORD[itemsize]
    inputs_at_once = 1 if inputs_of_a_word == 1 else _TILE_WORDS * inputs_of_a_word
    return -(-inputs // inputs_at_once) * inputs_at_once // inputs_of_a_word


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


def build_row_exact_linear(weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Linear:
    """As `build_linear`, with rows that do not depend on each other on other devices than a CPU too."""
    if weight.device.type == "cpu":
        return build_linear(weight, bias, activation)
    return TiledLinear(weight, bias, activation, tile_rows=_GPU_TILE_ROWS)


def build_quantized_linear(weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Linear:
    """As `build_linear`, with the weight in int8. CPU only."""
    with suppress(RuntimeError):
        return CompiledLinear(weight, bias, activation, quantize=True)
    return PlainQuantizedLinear(weight, bias, activation)


@torch.inference_mode()
def is_row_exact(linear: Linear, in_features: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Rows come out the same, bit for bit, at several numbers of rows and in another order, here and now."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, in_features, generator=generator).to(device, dtype)
    whole = linear(x)
    order = torch.randperm(len(x), generator=generator)
    return torch.equal(linear(x[order]), whole[order]) and all(
        torch.equal(linear(x[:rows].clone()), whole[:rows]) for rows in (1, 2, 3, 5, 8, 13, 16, 31, 33, 64)
    )
