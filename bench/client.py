"""What the client and its load generator cost: the import, the room of the base install, a token that is measured."""

import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import oasst
import oasst_client
from packaging.requirements import Requirement
from rich.table import Table

from bench.options import Measured, Options

__all__ = ["ClientRow", "client_table", "measure"]

_OURS = "oasst-serve"


@dataclass(frozen=True)
class ClientRow:
    import_s: float  # Processor time of `import oasst_client` in a fresh interpreter, which itself is taken off.
    own_bytes: int
    dependency_bytes: dict[str, int]
    # Processor time of `oasst bench` for each token that came by itself, and how late 99 of 100 were read.
    measured_token_s: float
    read_delay_s: float


def measure(options: Options) -> Measured:
    row = _measure(options.rounds)
    return [row], [client_table(row)]


def _measure(rounds: int) -> ClientRow:
    """Medians over the rounds; compiled modules are in place, as they are after a first run."""
    _cpu_s("import oasst_client")
    times = [_cpu_s("import oasst_client") - _cpu_s("pass") for _ in range(rounds)]
    own_bytes = sum(_size_of(Path(package.__path__[0])) for package in (oasst, oasst_client))
    sizes = {name: _installed_size(name) for name in sorted(_requirements(_OURS))}
    overheads = [_load_generator_overhead() for _ in range(rounds)]
    return ClientRow(
        statistics.median(times),
        own_bytes,
        sizes,
        measured_token_s=statistics.median(each["cpu_s_per_token"] for each in overheads),
        read_delay_s=statistics.median(each["loop_delay_p99_s"] for each in overheads),
    )


def client_table(row: ClientRow) -> Table:
    table = Table(title="The client")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("import oasst_client, processor time", f"{row.import_s:.2f} s")
    table.add_row("oasst and oasst_client", f"{row.own_bytes / 2**20:.1f} MiB")
    for name, size in row.dependency_bytes.items():
        table.add_row(name, f"{size / 2**20:.1f} MiB")
    table.add_row("oasst bench, processor time of a token", f"{row.measured_token_s * 1e6:.0f} us")
    table.add_row("oasst bench, 99 of 100 read within", f"{row.read_delay_s * 1e3:.1f} ms")
    return table


def _load_generator_overhead() -> dict[str, float]:
    """What `oasst bench` tells of itself under 8 streams of a service that answers at once."""
    command = [sys.executable, "-m", "oasst_cli", "bench", "--overhead", "--concurrency", "8", "--json"]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    (summary,) = json.loads(told)
    overhead: dict[str, float] = summary["overhead"]
    return overhead


def _cpu_s(code: str) -> float:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _requirements(name: str) -> set[str]:
    """What a distribution needs without any extra, and what that needs."""
    found: set[str] = set()
    for text in importlib.metadata.requires(name) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found |= {requirement.name} | _requirements(requirement.name)
    return found


def _installed_size(name: str) -> int:
    files = importlib.metadata.files(name) or ()
    return sum(Path(file.locate()).stat().st_size for file in files if Path(file.locate()).is_file())
