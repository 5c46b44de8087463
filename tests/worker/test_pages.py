"""Memory in large pages is memory like any other."""

import mmap

import pytest
import torch
from oasst_worker.model.pages import empty_in_large_pages

SHAPE = (3, 1 << 20)  # More than a large page holds.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_it_holds_what_is_written(dtype: torch.dtype) -> None:
    tensor = empty_in_large_pages(*SHAPE, dtype=dtype)
    values = torch.arange(3 << 20).view(SHAPE).to(dtype)
    tensor.copy_(values)
    assert tensor.is_contiguous()
    assert tensor.equal(values)


def test_a_view_keeps_it_alive() -> None:
    view = empty_in_large_pages(*SHAPE, dtype=torch.float32)[1].fill_(2.0)
    assert view.sum() == 2.0 * SHAPE[1]


def test_a_system_without_large_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert empty_in_large_pages(2, 3, dtype=torch.bfloat16).fill_(1).sum() == 6
