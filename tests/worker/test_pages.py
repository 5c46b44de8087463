"""Memory in large or small pages is memory like any other, and takes what it is said to take."""

import mmap
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oasst_worker.model.pages import zeros_in_large_pages, zeros_in_small_pages
from torch import Tensor

SHAPE = (3, 1 << 20)  # More than a large page holds.
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

Zeros = Callable[..., Tensor]
both = pytest.mark.parametrize("zeros", [zeros_in_large_pages, zeros_in_small_pages])


def kib_of(name: str, tensor: Tensor) -> int:
    """What the system tells of the mapping that the tensor lies in; of neighbours too, where it has merged them."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= tensor.data_ptr() < int(bounds[2], 16)
        elif found and line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {name} at {tensor.data_ptr():#x}")


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_it_holds_what_is_written(zeros: Zeros, dtype: torch.dtype) -> None:
    tensor = zeros(*SHAPE, dtype=dtype)
    values = torch.arange(3 << 20).view(SHAPE).to(dtype)
    assert not tensor.any()
    tensor.copy_(values)
    assert tensor.is_contiguous()
    assert tensor.equal(values)


@both
def test_a_view_keeps_it_alive(zeros: Zeros) -> None:
    view = zeros(*SHAPE, dtype=torch.float32)[1].fill_(2.0)
    assert view.sum() == 2.0 * SHAPE[1]


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the system gives no transparent huge pages"
)
def test_what_is_written_whole_lies_in_large_pages() -> None:
    tensor = zeros_in_large_pages(8, 1 << 20, dtype=torch.float32).fill_(1.0)
    assert kib_of("AnonHugePages", tensor) >= 16 << 10


def test_what_is_written_here_and_there_takes_little() -> None:
    tensor = zeros_in_small_pages(64, 1 << 20, dtype=torch.float32)
    before = kib_of("Rss", tensor)
    tensor[:, 0] = 1.0
    assert kib_of("Rss", tensor) - before <= 64 * 16


@both
def test_a_system_that_takes_no_advice_gives_memory_all_the_same(zeros: Zeros, monkeypatch: pytest.MonkeyPatch) -> None:
    for advice in ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE"):
        monkeypatch.delattr(mmap, advice, raising=False)
    assert zeros(2, 3, dtype=torch.bfloat16).fill_(1).sum() == 6
