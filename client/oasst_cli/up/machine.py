"""What this machine has for workers to share."""

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["num_cores", "share_of", "visible_gpus"]

# The driver keeps a folder for each card that this system, or this container, may use.
_DRIVERS_GPUS = Path("/proc/driver/nvidia/gpus")


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(named: str | None, folder: Path = _DRIVERS_GPUS) -> list[str]:
    """NVIDIA's GPUs, `named` as `CUDA_VISIBLE_DEVICES` names those that may be used; None for all of the driver's."""
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(index) for index, _ in enumerate(folder.glob("*"))]


def share_of(gpus: Sequence[str], worker: int, num_workers: int) -> Sequence[str]:
    """The GPUs of one of so many workers: neighbours, and nobody else's unless there are more workers than GPUs."""
    if 0 < len(gpus) < num_workers:
        return [gpus[worker % len(gpus)]]
    return gpus[len(gpus) * worker // num_workers : len(gpus) * (worker + 1) // num_workers]
