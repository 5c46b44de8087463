"""The environments of the systems: made once by pip from pinned requirements, made anew when those change."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from bench.peers.asking import PeerError, last_line

__all__ = ["CTRANSLATE2", "LLAMA_CPP", "OPENVINO", "OURS_ENVIRONMENT", "TRANSFORMERS", "VLLM", "Environment", "prepare"]

REQUIREMENTS = Path(__file__).parent / "requirements"
_INSTALLED = "installed"  # A file in the environment: the hash of what was installed.


@dataclass(frozen=True)
class Environment:
    """Installs `requirements/NAME.txt`, then what `source` and `uninstall` say."""

    name: str
    source: str = ""  # A source distribution whose files are kept in `source/` and built for this processor.
    build_variables: dict[str, str] = field(default_factory=dict)
    uninstall: tuple[str, ...] = ()  # Packages that come along and do not work.

    def requirements(self) -> Path:
        return REQUIREMENTS / f"{self.name}.txt"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.requirements().read_bytes() + repr(self).encode()).hexdigest()


OURS_ENVIRONMENT = Environment("ours")
TRANSFORMERS = Environment("transformers")
CTRANSLATE2 = Environment("ctranslate2")
# Their builds of these find no library of PyTorch's builds for CPUs, and stop transformers when it looks for them.
OPENVINO = Environment("openvino", uninstall=("torchvision",))
VLLM = Environment("vllm", uninstall=("torchvision", "torchaudio", "torchcodec"))
LLAMA_CPP = Environment(
    "llama_cpp",
    source="llama-cpp-python==0.3.36",
    build_variables={
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",
        "CMAKE_BUILD_PARALLEL_LEVEL": "1",
        # GCC 12 takes `_tile_loadconfig` to read 8 of its 64 bytes and drops the stores to the others, on which a
        # processor with AMX faults at the first int8 product.
        "CXXFLAGS": "-fno-tree-dse -fno-dse",
    },
)


def prepare(environment: Environment, home: Path) -> Path:
    """The interpreter of this environment, made under `home` if it is not there; its output is in `home/log`.

    Raises:
        PeerError: something could not be installed.
    """
    if environment is OURS_ENVIRONMENT:
        return Path(sys.executable)
    folder = home / "environments" / environment.name
    python = folder / "bin" / "python"
    installed = folder / _INSTALLED
    if installed.exists() and installed.read_text() == environment.fingerprint():
        return python
    print(f"Installing {environment.name}; its output is in {home / 'log'}.", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    log = home / "log" / f"install-{environment.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)], log)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", "-r", str(environment.requirements())], log)
    if environment.source:
        source = _unpacked_source(pip, environment.source, folder, log)
        _run([*pip, "install", "--no-deps", str(source)], log, environment.build_variables)
    if environment.uninstall:
        _run([*pip, "uninstall", "--yes", *environment.uninstall], log)
    installed.write_text(environment.fingerprint())
    return python


def _unpacked_source(pip: list[str], requirement: str, folder: Path, log: Path) -> Path:
    """The source distribution's files in `folder/source`."""
    downloaded = folder / "downloaded"
    _run([*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", str(downloaded), requirement], log)
    (archive,) = downloaded.iterdir()
    with tarfile.open(archive) as files:
        files.extractall(downloaded, filter="data")
    archive.unlink()
    (unpacked,) = downloaded.iterdir()
    return unpacked.rename(folder / "source")


def _run(command: list[str], log: Path, variables: dict[str, str] | None = None) -> None:
    with log.open("ab") as output:
        done = subprocess.run(command, stdout=output, stderr=output, env={**os.environ, **(variables or {})})
    if done.returncode:
        raise PeerError(f"not installed: {last_line(log.read_text(errors='replace'))}")
