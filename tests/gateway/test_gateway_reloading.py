"""Files that change are read anew, without anybody who asks for it."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from oasst_gateway.errors import StartError
from oasst_gateway.reloading import WatchedFiles, reload_when_asked_or_changed
from oasst_gateway.settings import GatewaySettings
from waiting import until


@asynccontextmanager
async def reloading(
    reload: Callable[[], None], path: Path, *, asked: asyncio.Event | None = None, interval_s: float = 0.001
) -> AsyncIterator[None]:
    """Watches the file as long as the context is open."""
    task = asyncio.create_task(
        reload_when_asked_or_changed(reload, asked or asyncio.Event(), WatchedFiles([path]), interval_s=interval_s)
    )
    yield
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_file_that_changes_is_read_anew_though_nobody_asks(tmp_path: Path) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text("one")
    read: list[str] = []
    async with reloading(lambda: read.append(path.read_text()), path):
        replace(path, "two")
        await until(lambda: read == ["two"])
        replace(path, "three")
        await until(lambda: read == ["two", "three"])


@pytest.mark.parametrize("failure", [StartError("broken"), LookupError("unforeseen")])
async def test_what_cannot_be_read_is_read_again_once_it_has_changed_again(tmp_path: Path, failure: Exception) -> None:
    path = tmp_path / "tenants.toml"
    path.write_text("one")
    tried: list[str] = []

    def reload() -> None:
        tried.append(path.read_text())
        if tried[-1] == "broken":
            raise failure

    async with reloading(reload, path):
        replace(path, "broken")
        await until(lambda: tried == ["broken"])
        replace(path, "two")
        await until(lambda: tried == ["broken", "two"])


async def test_whoever_asks_does_not_wait_for_the_next_look(tmp_path: Path) -> None:
    asked, read = asyncio.Event(), asyncio.Event()
    async with reloading(read.set, tmp_path / "none", asked=asked, interval_s=3600):
        asked.set()
        await asyncio.wait_for(read.wait(), 20)


async def test_whoever_asks_does_not_keep_it_from_being_cancelled_in_the_same_turn(tmp_path: Path) -> None:
    asked = asyncio.Event()
    files = WatchedFiles([tmp_path / "none"])
    task = asyncio.create_task(reload_when_asked_or_changed(list, asked, files, interval_s=3600))
    await asyncio.sleep(0)  # It waits.
    asked.set()
    task.cancel()
    _, pending = await asyncio.wait([task], timeout=20)
    task.cancel()
    assert not pending


def test_files_change_when_they_are_written_replaced_removed_or_linked_anew(tmp_path: Path) -> None:
    """The last as a kubelet does: the mounted files are links through one that it puts in place at once."""
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    for folder in ("old", "new"):
        (tmp_path / folder / "tls.crt").write_text("certificate")
        os.utime(tmp_path / folder / "tls.crt", ns=(0, 0))
    (tmp_path / "data").symlink_to("old")
    path = tmp_path / "data" / "tls.crt"
    files = WatchedFiles([path])
    assert not files.have_changed()
    (tmp_path / "data.new").symlink_to("new")
    (tmp_path / "data.new").replace(tmp_path / "data")
    assert (files.have_changed(), files.have_changed()) == (True, False)
    os.utime(path, ns=(0, 1))
    assert (files.have_changed(), files.have_changed()) == (True, False)
    replace(path, "another")
    assert (files.have_changed(), files.have_changed()) == (True, False)
    path.unlink()
    assert (files.have_changed(), files.have_changed()) == (True, False)


def test_every_file_that_a_gateway_reads_anew_is_watched(tmp_path: Path) -> None:
    names = ("tenants", "jwt_key", "tls_cert", "tls_key", "tls_client_ca")
    paths = {name: tmp_path / name for name in names}
    settings = GatewaySettings.model_validate(
        {"model": "m", "redis_url": "redis://r", "jwt_issuer": "i", "jwt_audience": "a", **paths}
    )
    files = WatchedFiles.of(settings)
    for path in paths.values():
        path.write_text("new")
        assert files.have_changed(), path.name


def replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)
