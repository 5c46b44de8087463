"""Numbers between the host and a device, without one waiting for the other."""

import torch
from torch import Tensor

__all__ = ["Fetch", "to_device"]


def to_device(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers of (nested) sequences on a device. The host goes on at once: on a GPU they are copied meanwhile."""
    is_on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=is_on_gpu).to(device, non_blocking=is_on_gpu)


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
