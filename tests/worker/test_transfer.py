"""Numbers find their way from the host to a device, whatever holds them."""

import numpy as np
import pytest
import torch
from oasst_worker.model.transfer import to_device

NUMBERS = [[1, 2], [3, 4]]


@pytest.mark.parametrize("values", [NUMBERS, np.array(NUMBERS)], ids=["lists", "array"])
def test_what_goes_to_a_gpu_is_pinned_and_not_waited_for(values, monkeypatch):
    pinned, sent = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: sent.append((tensor, where, how)) or tensor)
    gpu = torch.device("cuda", 0)  # None is needed: it is only named.
    tensor = to_device(values, torch.int64, gpu)
    assert tensor.tolist() == NUMBERS
    assert pinned == [tensor]
    assert sent == [(tensor, (gpu,), {"non_blocking": True})]
