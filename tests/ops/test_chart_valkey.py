"""The built-in queue: a real Valkey with the configuration and the users that the chart makes."""

import asyncio
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from helm_release import Release
from oasst_jobs import QueueClient, QueueUnavailableError, connect
from oasst_jobs.__main__ import main as oasst_jobs
from valkey_server import ValkeyServer

from observe.queue_users import FILE, render_users


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


@pytest.fixture
def url_of(configured: ValkeyServer, release: Release) -> Callable[[str], str]:
    """The URL of one of the chart's users."""
    secrets = release.one("Secret", "valkey")["stringData"]

    def url(user: str) -> str:
        return configured.url.replace("unix://", f"unix://oasst-{user}:{secrets[f'{user}-password']}@")

    return url


@pytest.mark.parametrize("user", ["gateway", "worker"])
async def test_the_queue_works_for_gateways_and_workers_once_the_job_has_loaded_its_functions(
    url_of: Callable[[str], str], user: str
) -> None:
    await _load_as_the_job_does(url_of("admin"))
    client = connect(url_of(user))
    await QueueClient(client).check_server()
    with pytest.raises(redis.ResponseError, match="no permissions"):
        await client.flushall()
    await client.aclose()


async def test_the_built_in_queue_forgets_nothing(url_of: Callable[[str], str]) -> None:
    client = connect(url_of("exporter"))
    settings = await client.config_get("maxmemory-policy", "appendonly", "maxmemory")
    await client.aclose()
    assert settings == {"maxmemory-policy": "noeviction", "appendonly": "yes", "maxmemory": str(768 * 2**20)}


async def test_the_user_that_may_look_may_ask_what_the_runbooks_ask(url_of: Callable[[str], str]) -> None:
    runbooks = (Path(__file__).parents[2] / "docs" / "operations" / "runbooks.md").read_text()
    asked = re.findall(r"\bvalkey ([A-Z][^;\n]*)", runbooks)
    assert len(asked) >= 3
    client = connect(url_of("exporter"))
    for question in asked:
        await client.execute_command(*question.split())
    with pytest.raises(redis.ResponseError, match="no permissions"):
        await client.config_set("maxmemory", "1gb")
    await client.aclose()


async def test_without_its_functions_the_queue_says_what_to_do(url_of: Callable[[str], str]) -> None:
    client = connect(url_of("gateway"))
    with pytest.raises(QueueUnavailableError, match="python -m oasst_jobs load"):
        await QueueClient(client).check_server()
    await client.aclose()


async def test_nobody_gets_in_without_a_password(configured: ValkeyServer) -> None:
    stranger = connect(configured.url)
    with pytest.raises(redis.ConnectionError, match="Authentication required"):
        await stranger.ping()
    await stranger.aclose()


def test_the_charts_users_are_those_that_the_code_needs() -> None:
    assert FILE.read_text() == render_users(), "run `make generated`"


async def _load_as_the_job_does(url: str) -> None:
    assert await asyncio.to_thread(oasst_jobs, ["load", "--redis-url", url]) == 0
