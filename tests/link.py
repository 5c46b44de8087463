"""A way between two processes that can be cut, slowed, silenced, reset and closed on one side."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["Link", "linked"]

_CHUNK_BYTES = 64 * 1024
# An `SO_LINGER` of zero seconds: closing sends RST instead of FIN.
_ABORT = struct.pack("ii", 1, 0)


class Link:
    """Forwards TCP connections to a target, `HOST:PORT` or the path of a unix socket."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.port = 0
        # Added to every byte's way, in each direction.
        self.delay_s = 0.0
        # Connections taken so far.
        self.num_connections = 0
        self._passable = asyncio.Event()
        self._passable.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._silenced: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Nothing passes any more, and neither side is told. What is sent meanwhile arrives after `heal`."""
        self._passable.clear()

    def heal(self) -> None:
        self._passable.set()

    def silence(self) -> None:
        """Nothing passes the connections there are now any more, though they stay open. New ones are as ever."""
        self._silenced |= self._writers

    def reset(self) -> None:
        """Every connection has broken, for both sides."""
        for writer in list(self._writers):
            if writer.transport.is_closing():
                continue  # It has broken by itself; its socket may be closed already.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            writer.transport.abort()

    def half_close(self) -> None:
        """Each side is told that the other will send no more, and may go on sending."""
        for writer in list(self._writers):
            if writer.can_write_eof():
                writer.write_eof()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Takes a new connection."""
        self.num_connections += 1
        connection = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def close(self) -> None:
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = {writer}
        try:
            await self._passable.wait()
            far_reader, far_writer = await self._connect()
            writers.add(far_writer)
            self._writers |= writers
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, far_writer))
                pumps.create_task(self._pump(far_reader, writer))
        except* OSError:
            pass  # One side has gone; so does the other.
        finally:
            self._writers -= writers
            for each in writers:
                each.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.target.startswith("/"):
            return await asyncio.open_unix_connection(self.target)
        host, _, port = self.target.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bytes pass in order, each after the delay, up to the end of one direction."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        clock = asyncio.get_running_loop().time

        async def read() -> None:
            while data := await reader.read(_CHUNK_BYTES):
                under_way.put_nowait((clock() + self.delay_s, data))
            under_way.put_nowait((clock() + self.delay_s, b""))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            while True:
                due_s, data = await under_way.get()
                if (wait_s := due_s - clock()) > 0:
                    await asyncio.sleep(wait_s)
                await self._passable.wait()
                if writer in self._silenced:
                    continue
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def linked(target: str) -> AsyncIterator[Link]:
    """A link to the target that works until the context is left."""
    link = Link(target)
    server = await asyncio.start_server(link.accept, "127.0.0.1", 0)
    link.port = server.sockets[0].getsockname()[1]
    try:
        yield link
    finally:
        server.close()
        await link.close()
