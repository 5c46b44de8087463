"""A replica of the queue's server that can take its place, by hand or by a sentinel."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from oasst_jobs import connect
from valkey_server import ValkeyServer, free_port, start_sentinel

from faults.load import until

__all__ = ["Standby", "replicating", "watched_by_sentinel"]

_DOWN_AFTER_MS = 1000


class Standby:
    """Has whatever the primary has written, a moment later."""

    def __init__(self, folder: Path, primary_address: str) -> None:
        folder.mkdir()
        self.socket = str(folder / "valkey.sock")
        self.port = free_port()
        self.server = ValkeyServer(
            folder,
            *("--bind", "127.0.0.1", "--port", str(self.port)),
            *("--replicaof", primary_address.replace(":", " ")),
        )

    async def promote(self) -> None:
        """It is a primary from now on, with what it has."""
        redis = connect(self.server.url)
        await redis.execute_command("REPLICAOF", "NO", "ONE")
        await redis.aclose()


@asynccontextmanager
async def replicating(folder: Path, primary_address: str) -> AsyncIterator[Standby]:
    """A standby that has all the primary has, and follows it until the context is left."""
    standby = Standby(folder, primary_address)
    standby.server.start()
    try:
        await _follows(standby.server)
        yield standby
    finally:
        standby.server.kill()


async def _follows(server: ValkeyServer) -> None:
    redis = connect(server.url)

    async def is_up() -> bool:
        return (await redis.info("replication"))["master_link_status"] == "up"

    await until(is_up, "the replica to have all of its primary")
    await redis.aclose()


@asynccontextmanager
async def watched_by_sentinel(folder: Path, primary_port: int) -> AsyncIterator[str]:
    """The URL by which a sentinel leads to whichever of the two is the primary."""
    port = free_port()
    sentinel = start_sentinel(folder, port, primary_port, down_after_ms=_DOWN_AFTER_MS)
    try:
        yield f"redis+sentinel://127.0.0.1:{port}/main"
    finally:
        sentinel.kill()
        sentinel.wait()
