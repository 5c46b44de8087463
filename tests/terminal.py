"""The `oasst` command as a person at a terminal uses it."""

import os
import pty
import select
import subprocess
import sys
from collections.abc import Mapping

__all__ = ["Terminal"]


class Terminal:
    """The `oasst` command in a terminal of its own, seen from that terminal's other end."""

    # Takes the terminal as its controlling one, so that Ctrl-C becomes a signal, and then becomes the command.
    _PROGRAM = """
import fcntl, termios
from oasst_cli.__main__ import main
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
main()
"""

    def __init__(self, *arguments: str, kind: str = "dumb", environment: Mapping[str, str] | None = None) -> None:
        self._end, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM, *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={**os.environ, "TERM": kind, "XDG_STATE_HOME": os.devnull, **(environment or {})},
        )
        os.close(inner)
        self._unread = ""

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def read_until(self, text: str) -> None:
        """What is shown up to this text has been read."""
        while text not in self._unread:
            readable, _, _ = select.select([self._end], [], [], 30)
            assert readable, f"{text!r} does not come after {self._unread!r}"
            self._unread += os.read(self._end, 4096).decode()
        self._unread = self._unread.partition(text)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)
