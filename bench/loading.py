"""How fast a checkpoint comes into memory, beside plainly reading its files, and what memory that takes."""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from oasst_worker.model.config import load_config
from oasst_worker.model.ranks import ALONE, Share
from oasst_worker.model.weights import load_weights
from oasst_worker.runtime.build import RuntimeOptions, open_share
from rich.table import Table

from bench.checkpoints import random_checkpoint
from bench.options import Measured, Options
from bench.turns import Ratio, paired_ratio, turns

__all__ = ["LoadingRow", "loading_table", "measure"]

_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class LoadingRow:
    """One way to load, from files that the system has in memory or has not."""

    way: str
    is_cached: bool
    size_gb: float  # Of the weight files.
    seconds: float
    read_seconds: float  # Plainly reading the files, in the same state.
    share: Ratio  # Of the rate of plain reading.
    peak_gb: float  # By how much the process grew, at most.
    largest_file_gb: float


def measure(options: Options) -> Measured:
    with tempfile.TemporaryDirectory(prefix="oasst-bench-") as folder:
        rows = _measure(random_checkpoint("1b", Path(folder), dtype=torch.bfloat16), options.rounds)
    return rows, [loading_table(rows)]


def _measure(folder: Path, rounds: int) -> list[LoadingRow]:
    """A checkpoint of bf16, loaded as such; plain reading and each way in turn, each in a process of its own."""
    files = sorted(folder.glob("*.safetensors"))
    sizes = [file.stat().st_size / 1e9 for file in files]
    rows = []
    for is_cached in (False, True):
        measured: dict[Callable[[Path], float], list[tuple[float, float]]] = {way: [] for way in (_read, *_WAYS)}
        for _, way in turns(list(measured), rounds, warms_up=False):
            if not is_cached:
                _drop(files)
            measured[way].append(_in_a_process(way, folder))
        seconds = {way: [took_s for took_s, _ in figures] for way, figures in measured.items()}
        rows += [
            LoadingRow(
                name,
                is_cached,
                sum(sizes),
                statistics.median(seconds[way]),
                statistics.median(seconds[_read]),
                paired_ratio(seconds[_read], seconds[way]),
                max(peak for _, peak in measured[way]) / 1e9,
                max(sizes),
            )
            for way, name in _WAYS.items()
        ]
    return rows


def loading_table(rows: list[LoadingRow]) -> Table:
    table = Table(title=f"Loading {rows[0].size_gb:.1f} GB of bf16, files of up to {rows[0].largest_file_gb:.1f} GB")
    for heading in ("what", "files", "seconds", "GB/s", "plain reading, GB/s", "share", "peak memory, GB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.way,
            "in the system's cache" if row.is_cached else "dropped from it",
            f"{row.seconds:.1f}",
            f"{row.size_gb / row.seconds:.2f}",
            f"{row.size_gb / row.read_seconds:.2f}",
            str(row.share),
            f"{row.peak_gb:.2f}",
        )
    return table


def _in_a_process(way: Callable[[Path], float], folder: Path) -> tuple[float, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_watch, way, folder).result()


def _watch(way: Callable[[Path], float], folder: Path) -> tuple[float, float]:
    """Seconds, and the bytes by which this process grew at most."""
    Path("/proc/self/clear_refs").write_text("5")  # The peak counts from here.
    before = _memory("VmRSS")
    return way(folder), _memory("VmHWM") - before


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _read(folder: Path) -> float:
    """By as many threads as the loader copies with; the system is told of every file before, as the loader tells it."""
    num_threads = torch.get_num_threads()
    start = time.perf_counter()
    descriptors = [os.open(file, os.O_RDONLY) for file in sorted(folder.glob("*.safetensors"))]
    try:
        for descriptor in descriptors:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        with ThreadPoolExecutor(num_threads) as pool:
            for descriptor in descriptors:
                list(pool.map(lambda part, file=descriptor: _read_part(file, part, num_threads), range(num_threads)))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return time.perf_counter() - start


def _read_part(descriptor: int, part: int, num_parts: int) -> None:
    """This one of so many equal parts of a file."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    size = os.fstat(descriptor).st_size
    place, end = size * part // num_parts, size * (part + 1) // num_parts
    while place < end:
        place += os.preadv(descriptor, [buffer[: end - place]], place)


def _load_tensors(folder: Path) -> float:
    config = load_config(folder)
    start = time.perf_counter()
    weights = load_weights(folder, config, dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    del weights
    return seconds


def _load_model(folder: Path) -> float:
    options = RuntimeOptions(device="cpu", dtype="bfloat16")
    start = time.perf_counter()
    model = open_share(folder, options, Share()).load(ALONE)
    seconds = time.perf_counter() - start
    del model
    return seconds


_WAYS = {_load_tensors: "tensors as they are", _load_model: "a model that computes"}


def _drop(files: list[Path]) -> None:
    """The system's cache holds nothing of these files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # Only what is written can be dropped.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
