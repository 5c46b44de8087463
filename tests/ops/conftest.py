"""Real Helm, against a stand-in for the cluster; and the table that `make chart` prints."""

import importlib.util
import platform
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from api_server import running_api_server
from helm_release import PROFILES, Release, Renderer, read_profile

# What no profile shows, checked as they are.
VARIANTS: dict[str, dict[str, Any]] = {
    "ingress": {
        "gateway": {
            "ingress": {"enabled": True, "className": "nginx", "host": "chat.example.com", "tlsSecret": "chat"}
        },
        "networkPolicy": {
            "clients": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "nginx"}}}]
        },
    },
    "sentinel": {
        "redis": {
            "builtIn": {"enabled": False},
            "external": {"url": "rediss+sentinel://one:26379,two:26379/main", "ports": [6379, 26379]},
        }
    },
    "cluster": {
        "redis": {
            "builtIn": {"enabled": False},
            "external": {"url": "redis+cluster://one:7000", "ports": [7000]},
        }
    },
    "own-users": {"redis": {"builtIn": {"existingSecret": "oasst-users"}}},
}


@pytest.fixture(scope="session")
def renderer() -> Iterator[Renderer]:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("helm-sdkpy carries Helm for Linux on x86-64 only")
    if importlib.util.find_spec("helm_sdkpy") is None:
        pytest.fail("Helm is not in this environment: run `make test` or `make chart`")
    with running_api_server() as url:
        yield Renderer(url)


@pytest.fixture(scope="session")
def render(renderer: Renderer) -> Callable[..., Release]:
    """Renders the chart with these values."""

    def render_with(**values: Any) -> Release:
        return renderer.render(values)

    return render_with


@pytest.fixture(scope="session", params=[*PROFILES, *VARIANTS])
def release(request: pytest.FixtureRequest, renderer: Renderer) -> Release:
    """Each profile that comes with the chart, and each variant, rendered."""
    return renderer.render(VARIANTS.get(request.param) or read_profile(request.param))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="prints a table of the chart's profiles and checks")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    # Any: pytest's class of it is not public.
    if not config.getoption("--matrix", default=False):
        return
    columns = [*PROFILES, *VARIANTS, "all"]
    results: dict[str, dict[str, set[str]]] = {}  # Check -> profile -> outcomes; several where a check has versions.
    names = columns[:-1]
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            check, parameters = re.match(r".*::(\w+)(?:\[(.*)\])?$", report.nodeid).groups()
            for profile in [name for name in names if re.search(rf"(^|-){name}($|-)", parameters or "")] or ["all"]:
                results.setdefault(check, {}).setdefault(profile, set()).add(outcome)
    terminalreporter.section("profiles x checks")
    terminalreporter.write_line(f"{'':90}{' '.join(columns)}")
    for check, by_profile in results.items():
        cells = [_cell(by_profile.get(column, set())).center(len(column)) for column in columns]
        terminalreporter.write_line(f"{check.removeprefix('test_').replace('_', ' '):90}{' '.join(cells)}")


def _cell(outcomes: set[str]) -> str:
    if outcomes & {"failed", "error"}:
        return "FAIL"
    return "skip" if "skipped" in outcomes else "ok" if outcomes else ""
