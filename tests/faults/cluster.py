"""A cluster of servers, each with one shard of the queue."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path

from oasst_jobs import connect
from oasst_jobs.keys import ShardKeys
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from valkey_server import ValkeyServer, free_port

from faults.load import until

__all__ = ["Cluster", "clustered"]

# The others serve on while one is away.
_OPTIONS = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-require-full-coverage", "no")


class Cluster:
    """One server for each shard, in the order of the shards."""

    def __init__(self, folder: Path, num_shards: int) -> None:
        self._ports = [free_port() for _ in range(num_shards)]
        self.servers = [
            _make_server(folder / f"shard-{number}", port, *_OPTIONS) for number, port in enumerate(self._ports)
        ]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in self._ports)

    async def join(self) -> None:
        """Every server knows all others, and which of them has which slots."""
        nodes = [connect(server.url) for server in self.servers]
        for node, (first, last) in zip(nodes, _slots(len(nodes)), strict=True):
            await node.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for port in self._ports[1:]:
            await nodes[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port)

        async def is_whole() -> bool:
            states = [await node.execute_command("CLUSTER", "INFO") for node in nodes]
            whole = {b"cluster_state:ok", b"cluster_slots_ok:%d" % REDIS_CLUSTER_HASH_SLOTS}
            return all(whole <= set(state.split()) for state in states)

        await until(is_whole, "the servers to be a cluster")
        for node in nodes:
            await node.aclose()


def _make_server(folder: Path, port: int, *options: str) -> ValkeyServer:
    folder.mkdir()
    log = folder.with_suffix(".log")  # Where the others are kept.
    return ValkeyServer(folder, "--bind", "127.0.0.1", "--port", str(port), "--logfile", str(log), *options)


def _slots(num_shards: int) -> list[tuple[int, int]]:
    """First and last slot of each shard's server: they end with its own slot, or with the last of all."""
    own = {key_slot(ShardKeys(number).root.encode()): number for number in range(num_shards)}
    ends = [*sorted(own)[:-1], REDIS_CLUSTER_HASH_SLOTS - 1]
    ranges = [(before + 1, end) for before, end in pairwise([-1, *ends])]
    by_shard = dict(zip([own[slot] for slot in sorted(own)], ranges, strict=True))
    return [by_shard[number] for number in range(num_shards)]


@asynccontextmanager
async def clustered(folder: Path, num_shards: int) -> AsyncIterator[Cluster]:
    """A cluster with an empty queue, until the context is left."""
    cluster = Cluster(folder, num_shards)
    async with AsyncExitStack() as servers:
        for server in cluster.servers:
            server.start()
            servers.callback(server.kill)
        await cluster.join()
        yield cluster
