"""What an orchestrator sees of a gateway: over HTTP, and by a chat of its own."""

import asyncio
import os
import sys
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path

import pytest
from certificates import Authority
from gateway_harness import Gateway, start_gateway
from oasst_gateway.errors import StartError
from oasst_gateway.health import Health
from oasst_gateway.model import ServedModel
from oasst_gateway.probes import serving_probes
from oasst_telemetry import Check
from prometheus_client import CollectorRegistry
from valkey_server import ValkeyServer
from waiting import until


def ask(gateway: Gateway, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{gateway.metrics_listen}{path}", timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


async def wait_until(gateway: Gateway, path: str, status: HTTPStatus) -> None:
    async def is_answered() -> bool:
        return await asyncio.to_thread(ask, gateway, path) == status

    await until(is_answered, f"{path} to answer {status}")


def test_a_socket_path_that_is_too_long_is_told_as_such() -> None:
    with (
        pytest.raises(StartError, match=r"cannot listen on unix:/tmp/x+ for metrics: .*too long"),
        serving_probes(f"unix:/tmp/{'x' * 120}", Health(), CollectorRegistry()),
    ):
        pass


async def test_without_its_queue_a_gateway_is_alive_but_not_ready(gateway: Gateway, valkey: ValkeyServer) -> None:
    await wait_until(gateway, "/readyz", HTTPStatus.OK)
    valkey.kill()
    await wait_until(gateway, "/readyz", HTTPStatus.SERVICE_UNAVAILABLE)
    assert await asyncio.to_thread(ask, gateway, "/healthz") == HTTPStatus.OK
    valkey.start()
    await wait_until(gateway, "/readyz", HTTPStatus.OK)


async def test_a_gateway_whose_event_loop_stands_still_is_not_alive() -> None:
    now_s = 0.0
    health = Health(clock=lambda: now_s)
    now_s = 19.0
    assert health.liveness().ok
    now_s = 21.0
    assert health.liveness() == Check(False, "the event loop has been silent for 21.0 s")
    health.record_turn()
    assert health.liveness().ok


async def test_a_leaving_gateway_does_not_become_ready_again() -> None:
    health = Health()
    await health.start()
    await health.set_queue_available(True)
    assert health.readiness().ok
    await health.leave()
    await health.set_queue_available(True)
    assert health.readiness() == Check(False, "leaving")


async def run_helm_test(address: str, **environment: str) -> tuple[int | None, bytes]:
    """The exit code of what `helm test` runs, and the text that came."""
    program = Path(__file__).parents[2] / "helm" / "oasst-serve" / "files" / "stream_chat.py"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(program),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=os.environ | {"OASST_ADDRESS": address, "OASST_QUESTION": "Hello!"} | environment,
    )
    stdout, _ = await process.communicate()
    return process.returncode, stdout


async def test_helm_test_streams_a_chat_and_fails_where_none_comes(gateway: Gateway, worker: object) -> None:
    exit_code, text = await run_helm_test(gateway.listen)
    assert exit_code == 0
    assert text.strip()
    exit_code, text = await run_helm_test(gateway.listen, OASST_QUESTION="")
    assert exit_code == 1
    assert not text


async def test_helm_test_shows_its_certificate_and_knows_the_gateways(
    model: ServedModel, valkey_url: str, worker: object, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    server, caller = authority.issue("server"), authority.issue("caller")
    async with start_gateway(
        model, valkey_url, tls_cert=server.cert, tls_key=server.key, tls_client_ca=authority.ca
    ) as gateway:
        environment = {"OASST_TLS": "true", "OASST_TLS_CA_FILE": str(authority.ca)}
        assert (await run_helm_test(gateway.listen, **environment))[0] == 1  # It shows none yet.
        environment |= {"OASST_TLS_CERT_FILE": str(caller.cert), "OASST_TLS_KEY_FILE": str(caller.key)}
        exit_code, text = await run_helm_test(gateway.listen, **environment)
    assert exit_code == 0
    assert text.strip()
