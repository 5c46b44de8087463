"""A TCP proxy whose connections a test cuts, or leaves open and silent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

__all__ = ["CuttableProxy"]

_CHUNK_BYTES = 64 * 1024


class CuttableProxy:
    """Stands between callers and a server."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._silenced: set[asyncio.StreamWriter] = set()
        self.address = ""
        self.num_connections = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["CuttableProxy"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = "{}:{}".format(*server.sockets[0].getsockname())
        try:
            yield self
        finally:
            server.close()
            self.cut()

    def cut(self) -> None:
        """Every connection there is now is reset."""
        for writer in self._writers:
            writer.transport.abort()

    def silence(self) -> None:
        """Every connection there is now stays open, and nothing goes through it any more."""
        self._silenced |= self._writers

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, there_writer}
        with suppress(OSError):
            await asyncio.gather(self._pass_on(reader, there_writer), self._pass_on(there_reader, writer))
        self._writers -= {writer, there_writer}

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            if writer not in self._silenced:
                writer.write(data)
                await writer.drain()
        if writer not in self._silenced:
            writer.close()
