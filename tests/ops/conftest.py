"""Real Helm, against a stand-in for the cluster."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from api_server import running_api_server
from helm_release import PROFILES, Release, Renderer, read_profile


@pytest.fixture(scope="session")
def renderer() -> Iterator[Renderer]:
    try:
        import helm_sdkpy  # noqa: F401 - says whether Helm is there
    except ImportError as error:
        pytest.fail(f"Helm is not in this environment ({error}): run `make chart`")
    except Exception as error:
        pytest.skip(f"helm-sdkpy carries Helm for Linux on x86-64 only: {error}")
    with running_api_server() as url:
        yield Renderer(url)


@pytest.fixture(scope="session")
def render(renderer: Renderer) -> Callable[..., Release]:
    """Renders the chart with these values."""

    def render_with(**values: Any) -> Release:
        return renderer.render(values)

    return render_with


@pytest.fixture(scope="session", params=PROFILES)
def release(request: pytest.FixtureRequest, renderer: Renderer) -> Release:
    """Each profile that comes with the chart, rendered."""
    return renderer.render(read_profile(request.param))
