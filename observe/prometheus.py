"""A real Prometheus for the length of a context, and its answers."""

import json
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Prometheus", "Series", "Target", "free_port", "running", "running_prometheus"]

_START_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Target:
    """Where something is scraped, and what it is."""

    address: str
    component: str


@dataclass(frozen=True)
class Series:
    """One line of an answer."""

    labels: Mapping[str, str]
    times_s: Sequence[float]
    values: Sequence[float]


class Prometheus:
    """Asks a running server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query_range(self, expr: str, *, start_s: float, end_s: float, step_s: float) -> list[Series]:
        answer = self._get("query_range", query=expr, start=start_s, end=end_s, step=step_s)
        return [
            Series(
                labels=result["metric"],
                times_s=[time_s for time_s, _ in result["values"]],
                values=[float(value) for _, value in result["values"]],
            )
            for result in answer["result"]
        ]

    def query(self, expr: str) -> list[tuple[Mapping[str, str], float]]:
        """The value of each series now."""
        answer = self._get("query", query=expr)
        return [(result["metric"], float(result["value"][1])) for result in answer["result"]]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=1) as response:  # noqa: S310 - our own server
                return bool(response.status == 200)
        except OSError:
            return False

    def _get(self, what: str, **parameters: object) -> Any:
        # Any: JSON.
        url = f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310 - our own server
            return json.load(response)["data"]


@contextmanager
def running_prometheus(
    targets: Sequence[Target], *, rules: Path, release: str, interval_s: int = 1
) -> Iterator[Prometheus]:
    """The server scrapes the targets and evaluates the rules as long as the context is open.

    Raises:
        RuntimeError: if it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="prometheus-") as name:
        folder = Path(name)
        configuration = folder / "prometheus.yml"
        configuration.write_text(yaml.safe_dump(_configuration(targets, rules, release, interval_s)))
        address = f"127.0.0.1:{free_port()}"
        command = [
            "prometheus",
            f"--config.file={configuration}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
            "--log.level=error",
        ]
        prometheus = Prometheus(f"http://{address}")
        with running(command) as process:
            give_up_s = time.monotonic() + _START_TIMEOUT_S
            while not prometheus.is_ready():
                if process.poll() is not None or time.monotonic() > give_up_s:
                    raise RuntimeError("Prometheus did not start")
                time.sleep(0.1)
            yield prometheus


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The process runs as long as the context is open."""
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.terminate()


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _configuration(targets: Sequence[Target], rules: Path, release: str, interval_s: int) -> dict[str, Any]:
    return {
        "global": {"scrape_interval": f"{interval_s}s", "evaluation_interval": f"{2 * interval_s}s"},
        "rule_files": [str(rules)],
        "scrape_configs": [
            {
                "job_name": component,
                "static_configs": [
                    {
                        "targets": [target.address for target in targets if target.component == component],
                        "labels": {"release": release, "component": component},
                    }
                ],
            }
            for component in sorted({target.component for target in targets})
        ],
    }
