"""Parts that processes exchange through shared memory arrive whole, in order, and are not waited for in vain."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import pytest
import torch
from oasst_worker.model.shared_memory import LostPartyError, SharedMemory

# The kernel's slots hold so many bytes: what is larger goes in pieces.
SLOT = 256 * 1024
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def by_all(tmp_path):
    """Calls a function by several parties at once, a thread each; their results."""

    def call(count, dtype, function):
        parties = [SharedMemory(tmp_path / f"{count}", index, count, dtype) for index in range(count)]
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(function, parties, range(count)))

    return call


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_sum_is_added_in_order_whatever_its_size(by_all, monkeypatch, count, dtype, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sizes = [1, 7, 64, SLOT // dtype.itemsize, SLOT // dtype.itemsize + 1, 200_001] * 3
    parts = [[torch.randn(size).to(dtype) for size in sizes] for _ in range(count)]
    expected = [list(accumulate(of_all, torch.add))[-1] for of_all in zip(*parts, strict=True)]
    results = by_all(count, dtype, lambda memory, index: [memory.sum_(part.clone()) for part in parts[index]])
    for of_one in results:
        assert all(torch.equal(ours, right) for ours, right in zip(of_one, expected, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(1, 3), (33, 1000), (5, SLOT // 4), (2, SLOT // 2 + 3)])
def test_columns_stand_side_by_side_at_the_first(by_all, shape, dtype):
    rows, width = shape
    columns = 3 * width - 2
    parts = [torch.randn(rows, width).to(dtype) for _ in range(3)]
    whole = torch.cat(parts, dim=1)[:, :columns]
    first, *others = by_all(3, dtype, lambda memory, index: memory.gather_columns(parts[index], columns))
    assert torch.equal(first, whole)
    assert all(torch.equal(ours, part) for ours, part in zip(others, parts[1:], strict=True))


def test_nobody_waits_for_a_process_that_has_ended(tmp_path):
    program = """
import sys, torch
from pathlib import Path
from oasst_worker.model.shared_memory import SharedMemory
SharedMemory(Path(sys.argv[1]), 1, 2, torch.float32)
"""
    ours = SharedMemory(tmp_path / "memory", 0, 2, FP32)
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "memory")], check=True, timeout=60)
    with pytest.raises(LostPartyError):
        ours.sum_(torch.ones(3))


def test_more_processes_than_there_is_room_for_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="65 processes"):
        SharedMemory(tmp_path / "memory", 64, 65, FP32)


def test_rows_that_no_kernel_knows_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="float16"):
        SharedMemory(tmp_path / "memory", 0, 2, torch.float16)
