"""The built-in queue: a real Valkey with the configuration and the users that the chart makes."""

import asyncio
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from helm_release import CHART, Release
from oasst_jobs import QueueClient, QueueUnavailableError, connect
from oasst_jobs.__main__ import main as oasst_jobs
from oasst_jobs.acl import acl_file
from valkey_server import ValkeyServer

from observe.queue_users import FILE


@pytest.fixture
def release(render: Callable[..., Release]) -> Release:
    return render()


@contextmanager
def configured(release: Release, users: str) -> Iterator[ValkeyServer]:
    """A Valkey as the chart configures it, with these users, but on a unix socket."""
    configuration = release.one("ConfigMap", "valkey")["data"]["valkey.conf"]
    with tempfile.TemporaryDirectory(prefix="valkey-") as name:
        folder = Path(name)
        (folder / "users.acl").write_text(users)
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


def url_of_user(server: ValkeyServer, secret: Mapping[str, str], user: str) -> str:
    return server.url.replace("unix://", f"unix://oasst-{user}:{secret[f'{user}-password']}@")


@pytest.fixture
def valkey(release: Release) -> Iterator[ValkeyServer]:
    with configured(release, release.one("Secret", "valkey")["stringData"]["users.acl"]) as server:
        yield server


@pytest.fixture
def url_of(valkey: ValkeyServer, release: Release) -> Callable[[str], str]:
    """The URL of one of the chart's users."""
    return lambda user: url_of_user(valkey, release.one("Secret", "valkey")["stringData"], user)


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


async def test_nobody_gets_in_without_a_password(valkey: ValkeyServer) -> None:
    await _check_that_strangers_stay_out(valkey)


async def test_a_secret_of_yours_made_as_the_readme_says_is_as_good_as_the_charts_own(
    release: Release, tmp_path: Path
) -> None:
    secret = _make_secret_as_the_readme_says(tmp_path)
    assert set(secret) == set(release.one("Secret", "valkey")["stringData"])
    with configured(release, secret["users.acl"]) as server:
        await _load_as_the_job_does(url_of_user(server, secret, "admin"))
        for user in ("gateway", "worker"):
            client = connect(url_of_user(server, secret, user))
            await QueueClient(client).check_server()
            await client.aclose()
        exporter = connect(url_of_user(server, secret, "exporter"))
        assert await exporter.ping()
        await exporter.aclose()
        await _check_that_strangers_stay_out(server)


def test_the_charts_users_are_those_that_the_code_needs() -> None:
    assert FILE.read_text() == acl_file(), "run `make generated`"


def _make_secret_as_the_readme_says(folder: Path) -> dict[str, str]:
    [recipe] = re.findall(r"```sh\n([^`]*oasst_jobs acl[^`]*)```", (CHART / "README.md").read_text())
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = f'set -eu\nkubectl() {{ echo "$@"; }}\n{recipe}'
    ran = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    files = re.findall(r"--from-file=(\S+)", ran.stdout)
    return {file: (folder / file).read_text() for file in files}


async def _load_as_the_job_does(url: str) -> None:
    assert await asyncio.to_thread(oasst_jobs, ["load", "--redis-url", url]) == 0


async def _check_that_strangers_stay_out(server: ValkeyServer) -> None:
    stranger = connect(server.url)
    with pytest.raises(redis.ConnectionError, match="Authentication required"):
        await stranger.ping()
    await stranger.aclose()
