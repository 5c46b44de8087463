"""Parts of the machine that only some machines can break: clocks that jump, disks that are full."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Clock", "SmallDisk"]

_LIBFAKETIME = "/usr/lib/*/faketime/libfaketime.so.1"


class Clock:
    """A wall clock that jumps for whoever was started with it; monotonic clocks go on, as on a real machine."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(0)

    @staticmethod
    def is_possible() -> bool:
        return bool(_find_libfaketime())

    def set(self, offset_s: int) -> None:
        """It is so many seconds later than it is."""
        # In one step, so that nobody reads half of it.
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{offset_s:+d}s\n")
        fresh.replace(self._file)

    @property
    def environment(self) -> Mapping[str, str]:
        """With this a process has the clock."""
        return {
            "LD_PRELOAD": _find_libfaketime(),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    @property
    def prefix(self) -> Sequence[str]:
        """Before a command, for the same."""
        return ("env", *(f"{name}={value}" for name, value in self.environment.items()))


def _find_libfaketime() -> str:
    return next((str(path) for path in sorted(Path("/").glob(_LIBFAKETIME.lstrip("/")))), "")


class SmallDisk:
    """A disk of memory that one process and its children see, in a folder that is empty for everyone else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def is_possible() -> bool:
        """Whether this user may mount something for himself."""
        if not shutil.which("unshare") or not shutil.which("nsenter") or os.geteuid() != 0:
            return False
        return subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], check=False).returncode == 0

    def prefix(self, size_mib: int) -> Sequence[str]:
        """Before a command: it runs with the disk mounted."""
        self.folder.mkdir()
        mount = f'mount -t tmpfs -o size={size_mib}m none {self.folder} && exec "$@"'
        return ("unshare", "-m", "sh", "-c", mount, "sh")

    def grow(self, pid: int, size_mib: int) -> None:
        """The disk of the process has this size from now on."""
        remount = ["mount", "-o", f"remount,size={size_mib}m", str(self.folder)]
        subprocess.run(["nsenter", "-t", str(pid), "-m", *remount], check=True)
