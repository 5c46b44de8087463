"""The state directory of `oasst up`: the queue's data and the processes' logs."""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["StateDirectory", "StateInUseError", "state_directory"]


class StateInUseError(Exception):
    """Another `oasst up` uses the state directory."""


class StateDirectory:
    """What stands where. It holds prompts, so that only its owner may look inside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "valkey"
        self.logs = path / "logs"
        for folder in (self.data, self.logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def state_directory(path: Path | None) -> Iterator[StateDirectory]:
    """The directory at `path`, ours alone while the context lasts; without a path one that is removed afterwards.

    Raises:
        StateInUseError: another `oasst up` uses it: two queue servers would spoil each other's file.
        OSError: it cannot be made or written.
    """
    if path is None:
        with tempfile.TemporaryDirectory(prefix="oasst-", ignore_cleanup_errors=True) as temporary:
            yield StateDirectory(Path(temporary))
        return
    path = path.absolute()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateInUseError(f"{path} is in use by another `oasst up`") from None
        yield StateDirectory(path)
