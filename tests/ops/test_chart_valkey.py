"""The built-in queue: a real Valkey with the configuration and the users that the chart makes."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from helm_release import Release
from oasst_jobs import QueueClient, connect
from valkey_server import ValkeyServer


@pytest.fixture
def release(render: Callable[..., Release]) -> Release:
    return render()


@pytest.fixture
def configured(release: Release) -> Iterator[ValkeyServer]:
    """A Valkey as the chart configures it, but on a unix socket."""
    configuration = release.one("ConfigMap", "valkey")["data"]["valkey.conf"]
    with tempfile.TemporaryDirectory(prefix="valkey-") as name:
        folder = Path(name)
        (folder / "users.acl").write_text(release.one("Secret", "valkey")["stringData"]["users.acl"])
        file = folder / "chart.conf"
        file.write_text(
            configuration.replace("/etc/valkey-users", name).replace("dir /data", f"dir {name}").replace("6379", "0")
        )
        server = ValkeyServer(folder, "--include", str(file))
        try:
            server.start()
            yield server
        finally:
            server.kill()


async def test_the_queue_works_with_the_charts_password_and_not_without(
    configured: ValkeyServer, release: Release
) -> None:
    password = release.one("Secret", "valkey")["stringData"]["password"]
    client = connect(configured.url.replace("unix://", f"unix://default:{password}@"))
    await QueueClient(client).check_server()
    policy = await client.config_get("maxmemory-policy", "appendonly", "maxmemory")
    assert {str(name): str(value) for name, value in _decoded(policy).items()} == {
        "maxmemory-policy": "noeviction",
        "appendonly": "yes",
        "maxmemory": str(768 * 2**20),
    }
    await client.aclose()
    stranger = connect(configured.url)
    with pytest.raises(redis.ConnectionError, match="Authentication required"):
        await stranger.ping()
    await stranger.aclose()


def _decoded(pairs: dict[bytes | str, bytes | str]) -> dict[str, str]:
    def text(value: bytes | str) -> str:
        return value.decode() if isinstance(value, bytes) else value

    return {text(name): text(value) for name, value in pairs.items()}
