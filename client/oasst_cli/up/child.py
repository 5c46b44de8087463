"""One child process: it never outlives us, and it never dies without a word."""

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Announcement", "Child", "die_with_parent"]

_PR_SET_PDEATHSIG = 1
_LAST_WORDS_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a process says of itself when it serves."""

    id: str
    # host:port of its API, if it has one.
    listen: str | None = None
    # host:port of its metrics, if it has them.
    metrics: str | None = None

    @classmethod
    def from_line(cls, line: bytes) -> "Announcement | None":
        """The announcement in a line of standard output; None for any other line."""
        try:
            message = json.loads(line)
        except ValueError:
            return None
        if not isinstance(message, dict) or message.get("event") != "serving":
            return None
        return cls(id=str(message.get("id", "")), listen=message.get("listen"), metrics=message.get("metrics"))


class Child:
    """A running process in a session of its own, so that a terminal's Ctrl-C reaches it only through us.

    What it writes to standard error, and all else it has to say, is in its log. Made by `start`, ended by `stop`.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, output: asyncio.StreamReader, *, log: Path, log_start: int
    ) -> None:
        self._process = process
        self._output = output
        self._log = log
        self._log_start = log_start
        self._announced: asyncio.Future[Announcement | None] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read_output())

    @classmethod
    async def start(cls, command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> "Child":
        """The process runs; `environment` comes on top of ours.

        Raises:
            OSError: the program cannot be started.
        """
        # A pipe of our own: asyncio's would keep `wait` from returning until the last grandchild has closed it too.
        read_end, write_end = os.pipe()
        output = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(read_end, "rb", buffering=0)
        )
        try:
            with log.open("ab") as log_file:
                log_start = log_file.tell()  # Before: what the process writes moves the place that it shares with us.
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=write_end,
                    stderr=log_file,
                    env={**os.environ, **environment},
                    start_new_session=True,
                    preexec_fn=die_with_parent(),
                )
                return cls(process, output, log=log, log_start=log_start)
        finally:
            os.close(write_end)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    async def announcement(self) -> Announcement | None:
        """What the process says when it serves; None if it ends before."""
        return await asyncio.shield(self._announced)

    async def wait(self) -> int:
        """The exit code, negative for a signal, once the process and all of its session have ended."""
        code = await self._process.wait()
        self.kill()
        await asyncio.wait([self._reader])
        return code

    async def stop(self, grace_s: float) -> None:
        """The process and all of its session have ended, after `grace_s` seconds, or if cancelled, by force."""
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.wait(), grace_s)
        except (TimeoutError, asyncio.CancelledError) as interruption:
            self.kill()
            await self.wait()
            if isinstance(interruption, asyncio.CancelledError):
                raise

    def kill(self) -> None:
        """Ends the process and what is left of its session, at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def last_words(self) -> str:
        """The last line it wrote to its log; empty if it wrote nothing."""
        with self._log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - _LAST_WORDS_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _signal(self, number: signal.Signals) -> None:
        if self.is_running:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _read_output(self) -> None:
        """Standard output up to its end: the announcement to whoever waits for it, the rest into the log."""
        with self._log.open("ab") as log:
            while line := await self._read_line():
                announcement = Announcement.from_line(line)
                if announcement and not self._announced.done():
                    self._announced.set_result(announcement)
                else:
                    log.write(line)
                    log.flush()
        if not self._announced.done():
            self._announced.set_result(None)

    async def _read_line(self) -> bytes:
        """The next line, empty at the end; of a line longer than the reader's buffer, nothing is kept but its end."""
        try:
            return await self._output.readline()
        except ValueError:
            return b"\n"


def die_with_parent() -> Callable[[], None] | None:
    """What a child runs between fork and exec so that the kernel kills it when we die, however we die.

    Linux only; elsewhere a supervisor that is killed leaves its children to be stopped by hand.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # Loaded here: after fork, in the child, loading could meet a held lock.
    parent = os.getpid()

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # The parent died before the kernel was told.

    return arrange
