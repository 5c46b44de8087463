"""The whole service as people start it: `oasst up`, with real processes and the demo checkpoint."""

import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from metric_page import total_of
from oasst_client import Client
from serving_line import read_serving_line

STOP_S = 60


class UpProcess:
    """A running `oasst up --json` that serves, and what it told."""

    def __init__(self, arguments: list[str], folder: Path, temporary: Path) -> None:
        self._log = folder / "stderr"
        # Its folder for temporary files.
        self.temporary = temporary
        self._errors = self._log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "oasst_cli", "up", "--json", "--listen", "127.0.0.1:0", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(self.temporary)},
        )
        self.summary: dict[str, Any] = {}

    def wait_until_serving(self) -> None:
        self.summary = read_serving_line(self.process, self._log)

    @property
    def address(self) -> str:
        return self.summary["addresses"][0]

    def stderr(self) -> str:
        return self._log.read_text()

    def processes(self) -> list[psutil.Process]:
        """Every process there is because of it, itself first."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def process_of(self, role: str) -> psutil.Process:
        """The process of this role that runs now."""
        module = {"worker": "oasst_worker", "gateway": "oasst_gateway", "valkey": "valkey-server"}[role]
        return next(each for each in self.processes() if module in _command_of(each))

    def metric(self, role: str, name: str, **labels: str) -> float:
        """The metric's value, summed over the processes of this role; their addresses outlive them."""
        addresses = [each["metrics"] for each in self.summary["processes"] if each["role"] == role]
        return sum(total_of(_page_at(address), name, **labels) for address in addresses)

    def stop(self, number: signal.Signals) -> int:
        """Its exit code after this signal."""
        self.process.send_signal(number)
        return self.process.wait(timeout=STOP_S)

    def end(self) -> None:
        """Nothing of it is left, however it went."""
        with ExitStack() as exits:
            exits.callback(self._errors.close)
            exits.callback(self.process.stdout.close)
            if self.process.poll() is None:
                family = self.processes()
                for each in family:
                    exits.callback(_kill, each)
                self.process.terminate()
                self.process.wait(timeout=STOP_S)


def _command_of(process: psutil.Process) -> str:
    """Empty once it is gone."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def _page_at(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
        return page.read().decode()


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def make_short_folder() -> Iterator[Callable[[], Path]]:
    """Makes folders whose paths leave room for a socket's name, which pytest's own do not."""
    with ExitStack() as exits:
        yield lambda: Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="e2e-")))


@pytest.fixture
def short_folder(make_short_folder: Callable[[], Path]) -> Path:
    return make_short_folder()


@pytest.fixture
def start_up(tmp_path: Path, make_short_folder: Callable[[], Path]) -> Iterator[Callable[..., UpProcess]]:
    """Starts `oasst up` with these arguments; stopped at the end of the test."""
    with ExitStack() as exits:

        def start(*arguments: str) -> UpProcess:
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            up = UpProcess(list(arguments), folder, make_short_folder())
            exits.callback(up.end)
            return up

        yield start


@contextmanager
def _serving(folder: Path, temporary: Path) -> Iterator[UpProcess]:
    """A whole service for many tests. Whatever a test breaks in it must come back by itself."""
    up = UpProcess([], folder, temporary)
    try:
        up.wait_until_serving()
        yield up
    finally:
        up.end()


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory, make_short_folder: Callable[[], Path]) -> Iterator[UpProcess]:
    """One that all modules share, but those that have their own."""
    with _serving(tmp_path_factory.mktemp("up"), make_short_folder()) as up:
        yield up


@pytest.fixture(scope="module")
def own_up(tmp_path_factory: pytest.TempPathFactory, make_short_folder: Callable[[], Path]) -> Iterator[UpProcess]:
    """One of a module whose tests ask what has happened to it."""
    with _serving(tmp_path_factory.mktemp("up"), make_short_folder()) as up:
        yield up


@pytest.fixture
def client(up: UpProcess) -> Iterator[Client]:
    with Client(up.address) as client:
        yield client
