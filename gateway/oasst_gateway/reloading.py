"""Reads tenants, the key of tokens and TLS files anew: when asked, and when somebody has changed them who cannot ask.

A cluster that mounts a Secret replaces its files and sends no signal.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from oasst_gateway.errors import StartError
from oasst_gateway.settings import GatewaySettings

__all__ = ["WatchedFiles", "reload_when_asked_or_changed"]

logger = logging.getLogger(__name__)

_LOOK_INTERVAL_S = 30.0

# A file at one moment: its inode and the time of its last change; None if it is not there.
_Stamp = tuple[int, int] | None


class WatchedFiles:
    """Files, and what they were at the last look."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = tuple(paths)
        self._stamps = self._look()

    @classmethod
    def of(cls, settings: GatewaySettings) -> "WatchedFiles":
        """Those that a gateway with these settings reads anew."""
        paths = (settings.tenants, settings.jwt_key, settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        return cls(path for path in paths if path is not None)

    def have_changed(self) -> bool:
        """Whether one of them was replaced, written, made or removed since the last look; this is the next."""
        before, self._stamps = self._stamps, self._look()
        return self._stamps != before

    def _look(self) -> list[_Stamp]:
        return [_stamp(path) for path in self._paths]


async def reload_when_asked_or_changed(
    reload: Callable[[], None],
    asked: asyncio.Event,
    files: WatchedFiles,
    *,
    interval_s: float = _LOOK_INTERVAL_S,
) -> None:
    """Reloads until cancelled: at once when `asked`, within the interval when the files have changed.

    What was read before still counts where `reload` raises anything.
    """
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await asked.wait()
        # A look before they are read: what changes meanwhile is found by the next one.
        have_changed = await asyncio.to_thread(files.have_changed)
        if not (asked.is_set() or have_changed):
            continue
        asked.clear()
        try:
            await asyncio.to_thread(reload)
        except StartError as error:
            logger.error("reload failed, what was read before still counts error=%s", error)
        except Exception:
            logger.exception("reload failed, what was read before still counts")
        else:
            logger.info("reloaded tenants and certificate")


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
