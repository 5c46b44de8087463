"""The init container's program, with a hub of the test's own."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helm_release import CHART

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"vocab_size": 7}', "model.safetensors": bytes(range(256)) * 999}

Fetch = Callable[..., subprocess.CompletedProcess[str]]


class Hub(ThreadingHTTPServer):
    """Has the files of one revision, and counts how often each was downloaded."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files = dict(FILES)
        self.downloads: list[str] = []
        self.on_download: Callable[[], None] = lambda: None


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._send(with_body=False)

    def do_GET(self) -> None:
        self._send(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""

    def _send(self, *, with_body: bool) -> None:
        prefix, _, name = self.path.rpartition("/")
        body = self.server.files.get(name)
        if body is None or prefix != f"/some/model/resolve/{COMMIT}":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.server.downloads.append(name)
            self.server.on_download()
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Fetch:
    """Runs the program as the chart's init container does."""

    def run(wanted: dict[str, bytes] = FILES) -> subprocess.CompletedProcess[str]:
        files = [f"--file={name}={hashlib.sha256(content).hexdigest()}" for name, content in wanted.items()]
        options = ["--repository=some/model", f"--revision={COMMIT}", f"--folder={tmp_path / 'current'}"]
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        return subprocess.run(
            [sys.executable, str(CHART / "files" / "fetch_model.py"), *options, *files],
            capture_output=True,
            text=True,
            env=os.environ | environment,
        )

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def test_the_named_files_are_there_and_are_not_fetched_twice(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    first = fetch()
    assert first.returncode == 0, first.stderr
    assert contents(tmp_path / "current") == FILES
    again = fetch()
    assert (again.returncode, again.stdout) == (0, "")
    assert sorted(hub.downloads) == sorted(FILES)


def test_a_file_that_is_not_what_was_named_is_removed_and_stops_the_start(
    fetch: Fetch, hub: Hub, tmp_path: Path
) -> None:
    hub.files["model.safetensors"] = b"something else"
    refused = fetch()
    assert refused.returncode == 1
    assert "model.safetensors: its SHA-256 is" in refused.stderr
    assert not (tmp_path / "current" / "model.safetensors").exists()


def test_a_file_that_was_damaged_since_is_fetched_again(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    fetch()
    (tmp_path / "current" / "model.safetensors").write_bytes(b"damaged")
    assert fetch().returncode == 0
    assert contents(tmp_path / "current") == FILES
    assert hub.downloads.count("model.safetensors") == 2
    assert hub.downloads.count("config.json") == 1


def test_weights_of_an_earlier_revision_are_gone_before_others_are_fetched(
    fetch: Fetch, hub: Hub, tmp_path: Path
) -> None:
    """A volume has room for one revision."""
    folder = tmp_path / "current"
    hub.files |= {"model-2.safetensors": b"second shard"}
    fetch(hub.files)
    (folder / ".cache" / "huggingface" / "download" / "x.incomplete").write_bytes(b"of a fetch that was killed")
    hub.files = {"config.json": FILES["config.json"], "model.safetensors": b"weights of the next revision"}
    beside: list[set[str]] = []
    hub.on_download = lambda: beside.append(
        {path.name for path in folder.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".incomplete")}
    )
    assert fetch(hub.files).returncode == 0
    [weights] = beside
    assert len(weights) <= 1, "no more than the file that is being fetched"
    assert "model.safetensors" not in weights
    assert contents(folder) == hub.files
