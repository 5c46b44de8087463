"""How much memory a device has to give."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["machine_bytes", "usable_bytes"]


def usable_bytes(device: torch.device) -> int:
    """A GPU's free memory; on a CPU, all the memory that this process may have."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine_bytes()


def machine_bytes(root: Path = Path("/")) -> int:
    """The memory that this process may have: the machine's, or less in a container that is given less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """The limits of this process's cgroup and of those around it, by either version of Linux's cgroups.

    In a container the path that the kernel tells may begin outside of what is mounted there: what is not is left out.
    """
    lines: list[str] = []
    with suppress(OSError):  # No Linux.
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounted = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        group = mounted / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mounted):
                break
            with suppress(OSError, ValueError):  # Not there, or "max".
                yield int((folder / ("memory.limit_in_bytes" if controllers else "memory.max")).read_text())
