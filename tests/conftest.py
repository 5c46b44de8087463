"""Neighbours that tests of several parts need."""

import os
import shlex
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# One thread for every model in the tests, and in the processes they start: many of them share few cores. PyTorch reads
# it when it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU Triton's kernels run in its interpreter. Triton reads this when it is loaded, with transformers at last.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Of all the processes that tests start, only the first compiles a module of ours.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
from valkey_server import ValkeyServer


@pytest.fixture(scope="session", autouse=True)
def _heard_signals() -> None:
    """What tests start hears the signals it is sent, though whoever runs the tests in the background ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _kernels_compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests start finds a C compiler that remembers the kernels: it compiles each of them once."""
    compiler = shutil.which("cc")
    if compiler is None:
        yield
        return
    folder, made = tmp_path_factory.mktemp("compiler"), _folder_of_the_run(tmp_path_factory) / "kernels"
    made.mkdir(exist_ok=True)
    command = shlex.join([str(Path(__file__).with_name("compile_once.sh")), compiler, str(made)])
    cc = folder / "cc"
    cc.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    cc.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder), prepend=os.pathsep)
        yield


def _folder_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all processes that the tests are run by."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    """A fresh, running Valkey that the test may kill, pause and restart."""
    # Not tmp_path: the path of a unix socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        server = ValkeyServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.kill()


@pytest.fixture
def valkey_url(valkey: ValkeyServer) -> str:
    """The `unix://` address of a fresh Valkey."""
    return valkey.url
