"""Numbers between the host and a device, without one waiting for the other."""

import torch
from torch import Tensor

__all__ = ["Fetch", "to_device"]


def to_device(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers of an array or of (nested) sequences on a device. The copy to a GPU goes on in the background."""
    on_host = torch.as_tensor(values, dtype=dtype)
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host.to(device)


class Fetch:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._on_host = tensor.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived:
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor on the host, once all that was launched before it was fetched is done."""
        if self._arrived:
            self._arrived.synchronize()
        return self._on_host
