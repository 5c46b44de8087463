"""What `helm test` runs, with the environment that the chart gives it."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from helm_release import CHART, Release, read_profile
from oasst_client import InvalidArgumentError, Tls, load_profile
from oasst_client.testing import FakeServer

Render = Callable[..., Release]

TLS = Path("/etc/oasst/tls")


def environment_of_the_test(release: Release) -> dict[str, str]:
    """What the pod's variables are in the cluster; whatever comes from a Secret is `from-a-secret`."""
    [pod] = [each for each in release.tests if each["kind"] == "Pod"]
    [chat] = pod["spec"]["containers"]
    return {each["name"]: each.get("value", "from-a-secret") for each in chat["env"]}


def stream_chat(server: FakeServer, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs the program as the pod does, but asks `server`."""
    # By an address that the SDK does not take for this machine's own, as the Service's is not.
    address = server.address.replace("127.0.0.1", "0.0.0.0")  # noqa: S104 - called, not listened at
    return subprocess.run(
        [sys.executable, str(CHART / "files" / "stream_chat.py")],
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "OASST_ADDRESS": address, "OASST_CONFIG": "none.toml"},
        timeout=60,
    )


@pytest.mark.parametrize("values", [{}, {"test": {"apiKeySecret": "oasst-test"}}], ids=["without a key", "with a key"])
def test_the_question_is_asked_and_the_answer_printed(render: Render, values: dict[str, Any]) -> None:
    environment = environment_of_the_test(render(**values))
    with FakeServer("An idea that spreads.") as server:
        ran = stream_chat(server, environment)
        assert (ran.returncode, ran.stdout) == (0, "An idea that spreads.\n"), ran.stderr
        assert server.questions == ["What is a meme?"]
        [metadata] = server.metadata
        key = metadata.get("authorization")
    assert key == ("Bearer from-a-secret" if values else None)


def test_an_answer_without_text_fails(render: Render) -> None:
    with FakeServer("") as server:
        assert stream_chat(server, environment_of_the_test(render())).returncode == 1


def test_a_request_that_is_refused_fails_and_says_why(render: Render) -> None:
    refused = InvalidArgumentError("no such model", code="INVALID_ARGUMENT", reason="BAD_REQUEST")
    with FakeServer(refused) as server:
        ran = stream_chat(server, environment_of_the_test(render()))
    assert ran.returncode == 1
    assert "no such model" in ran.stderr


@pytest.mark.parametrize(
    ("values", "tls"),
    [
        ({}, False),
        # Something in front of the gateways takes the encryption away.
        ({"gateway": {"tenantsSecret": "tenants"}, "test": {"apiKeySecret": "key"}}, False),
        # Its certificate is of an authority that everybody knows.
        (
            {"gateway": {"tls": {"secret": "tls"}}, "test": {"serverName": "chat.example.com"}},
            Tls(server_name="chat.example.com"),
        ),
        ({"gateway": {"tls": {"secret": "tls"}}, "test": {"tlsSecret": "ca"}}, Tls(ca=TLS / "ca.crt")),
        (
            read_profile("tls"),
            Tls(ca=TLS / "ca.crt", cert=TLS / "tls.crt", key=TLS / "tls.key", server_name="chat.example.com"),
        ),
    ],
    ids=["plain", "plain, with a key", "a public certificate", "a private one", "callers show one too"],
)
def test_the_gateway_is_called_as_it_listens(render: Render, values: dict[str, Any], tls: Tls | bool) -> None:
    environment = environment_of_the_test(render(**values)) | {"OASST_CONFIG": "none.toml"}
    assert load_profile(environment=environment).tls_options == tls
