"""Linear layers whose rows do not depend on each other, bit for bit.

Batching must not change a sequence's numbers. A matrix product's library picks its kernel by the number of rows, and
with the kernel the order of additions; so each layer here computes a row the same way whatever stands beside it:

- `PackedLinear`: oneDNN with the weight packed once. One kernel for 2 to 512 rows, and two to four times faster than
  the plain path at few rows, because the weight lies in memory in the order the kernel reads it.
- `TiledLinear`: the plain product, always of the same number of rows. Where oneDNN cannot pack.
- `PlainLinear`: the plain product as it is: the reference, and the path of other devices than the CPU.

oneDNN's promise is not written down: `is_row_exact` tries a layer on the machine it runs on.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from oasst_worker.model.config import Activation

__all__ = ["Linear", "PackedLinear", "PlainLinear", "TiledLinear", "build_linear", "is_row_exact"]

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
    """`activation(x @ weight.T + bias)`."""

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]."""
        ...


class PlainLinear:
    """The product as PyTorch's own operator computes it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> None:
        self._weight = weight
        self._bias = bias
        self._activate = _ACTIVATIONS[activation][0] if activation else None

    def __call__(self, x: Tensor) -> Tensor:
        product = F.linear(x, self._weight, self._bias)
        return self._activate(product) if self._activate else product


class TiledLinear:
    """The plain product in tiles of a fixed number of rows, the last one padded."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> None:
        self._plain = PlainLinear(weight, bias, activation)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -rows % _TILE_ROWS))
        return torch.cat([self._plain(tile) for tile in torch.split(padded, _TILE_ROWS)])[:rows]


class PackedLinear:
    """The product by oneDNN, weight packed at construction, activation inside the kernel. CPU only.

    Raises:
        RuntimeError: at construction, where this processor has no such kernel for the weight's dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._bias = bias
        _, self._activation, self._variant = _ACTIVATIONS[activation] if activation else (None, "none", "")

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows < MIN_ROWS:
            return self._product(F.pad(x, (0, 0, 0, MIN_ROWS - rows)))[:rows]
        if rows > MAX_ROWS:
            return torch.cat([self(tile) for tile in torch.split(x, MAX_ROWS)])
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, self._activation, [], self._variant
        )
        return product


def build_linear(weight: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Linear:
    """The best layer for the weight's device and dtype on this machine.

    `weight` is [out_features, in_features], `bias` [out_features]; `activation` follows the product.
    """
    if weight.device.type != "cpu":
        return PlainLinear(weight, bias, activation)
    if weight.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        try:
            return PackedLinear(weight, bias, activation)
        except (RuntimeError, AttributeError):  # No kernel on this processor, or not in this build of PyTorch.
            pass
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
