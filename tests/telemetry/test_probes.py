"""Probes and metrics over HTTP, on whatever address is asked for."""

import errno
import http.client
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from oasst_telemetry import Check, ProbeServer, parse_address
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.openmetrics.parser import text_string_to_metric_families


class Condition:
    def __init__(self) -> None:
        self.alive = Check(True, "in progress")
        self.ready = Check(False, "starting")

    def liveness(self) -> Check:
        return self.alive

    def readiness(self) -> Check:
        return self.ready


@pytest.fixture
def condition() -> Condition:
    return Condition()


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("owls_total", "Owls seen.", registry=registry).inc(3)
    return registry


@pytest.fixture
def serve(condition: Condition, registry: CollectorRegistry) -> Iterator[Callable[[str], ProbeServer]]:
    servers: list[ProbeServer] = []

    def serve_at(listen: str) -> ProbeServer:
        servers.append(ProbeServer(listen, condition, registry))
        return servers[-1]

    yield serve_at
    for server in servers:
        server.close()


def get(connection: http.client.HTTPConnection, path: str, **headers: str) -> tuple[int, str]:
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def connect(server: ProbeServer) -> closing[http.client.HTTPConnection]:
    return closing(http.client.HTTPConnection(*parse_address(server.address), timeout=10))


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        return probe.connect_ex(("::1", 9)) == errno.ECONNREFUSED


NEEDS_IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    "listen",
    ["127.0.0.1:0", "localhost:0", pytest.param("[::1]:0", marks=NEEDS_IPV6), pytest.param("[::]:0", marks=NEEDS_IPV6)],
)
def test_a_server_tells_the_address_it_took_and_answers_there(serve: Callable[[str], ProbeServer], listen: str) -> None:
    server = serve(listen)
    host, port = parse_address(server.address)
    assert (host, port > 0) == (parse_address(listen)[0], True)
    with connect(server) as connection:
        assert get(connection, "/metrics")[0] == 200


def test_a_socket_file_is_an_address_too(serve: Callable[[str], ProbeServer], tmp_path: Path) -> None:
    server = serve(f"unix:{tmp_path}/probes.sock")
    assert server.address == f"unix:{tmp_path}/probes.sock"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/probes.sock")
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert client.makefile().readline().split()[1] == "200"


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        return client.makefile().readline().split()[1] == "200"


def test_a_unix_socket_goes_with_its_server(condition: Condition, registry: CollectorRegistry, tmp_path: Path) -> None:
    path = tmp_path / "probes.sock"
    for _ in range(2):
        with closing(ProbeServer(f"unix:{path}", condition, registry)):
            assert answers(path)
        assert not path.exists()


def test_a_unix_socket_that_a_killed_process_left_behind_is_taken(
    serve: Callable[[str], ProbeServer], tmp_path: Path
) -> None:
    path = tmp_path / "probes.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    serve(f"unix:{path}")
    assert answers(path)


def test_a_unix_socket_where_somebody_answers_is_left_alone(
    serve: Callable[[str], ProbeServer], condition: Condition, registry: CollectorRegistry, tmp_path: Path
) -> None:
    path = tmp_path / "probes.sock"
    serve(f"unix:{path}")
    with pytest.raises(OSError, match="in use"):
        ProbeServer(f"unix:{path}", condition, registry)
    assert answers(path)


def test_a_file_that_is_no_socket_is_left_alone(
    condition: Condition, registry: CollectorRegistry, tmp_path: Path
) -> None:
    path = tmp_path / "probes.sock"
    path.write_text("mine")
    with pytest.raises(OSError, match="in use"):
        ProbeServer(f"unix:{path}", condition, registry)
    assert path.read_text() == "mine"


def test_probes_say_why(serve: Callable[[str], ProbeServer], condition: Condition) -> None:
    with connect(serve("127.0.0.1:0")) as connection:
        status, body = get(connection, "/readyz")
        assert (status, json.loads(body)) == (503, {"ok": False, "reason": "starting"})
        condition.ready = Check(True, "serving")
        assert get(connection, "/readyz")[0] == 200
        assert get(connection, "/healthz") == (200, '{"ok": true, "reason": "in progress"}')
        condition.alive = Check(False, "a step has been in progress for 21.0 s")
        assert get(connection, "/healthz")[0] == 503
        assert get(connection, "/nothing") == (404, "try /metrics, /healthz or /readyz\n")


def test_scrapes_share_a_connection_and_choose_their_format(serve: Callable[[str], ProbeServer]) -> None:
    with connect(serve("127.0.0.1:0")) as connection:
        status, page = get(connection, "/metrics")
        kept = connection.sock
        assert (status, "owls_total 3.0" in page, "# EOF" in page) == (200, True, False)
        _, page = get(connection, "/metrics?debug=1", Accept="application/openmetrics-text; version=1.0.0")
        assert [family.name for family in text_string_to_metric_families(page)] == ["owls"]
        assert connection.sock is kept is not None


def test_an_answer_is_one_write(serve: Callable[[str], ProbeServer], registry: CollectorRegistry) -> None:
    """Each write is a wait for the interpreter's lock."""
    for number in range(300):
        Counter(f"owls_{number}_total", "Owls seen in that tree, by day and by night.", registry=registry)
    writes: list[bytes] = []

    class Watched(socket.socket):
        def send(self, data: bytes, flags: int = 0) -> int:
            writes.append(bytes(data))
            return super().send(data, flags)

        sendall = send  # type: ignore[assignment]

    server = serve("127.0.0.1:0")
    accept = server._server.get_request

    def accept_watched() -> tuple[socket.socket, object]:
        connection, address = accept()
        return Watched(fileno=connection.detach()), address

    server._server.get_request = accept_watched  # type: ignore[method-assign,assignment]
    with connect(server) as connection:
        _, page = get(connection, "/metrics")
    assert len(page) > 30_000
    assert len(writes) == 1


@pytest.mark.parametrize("address", ["9465", ":9465", "localhost", "localhost:", "localhost:99999", "localhost:http"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="must be HOST:PORT with a port from 0 to 65535"):
        parse_address(address)


@pytest.mark.parametrize("address", ["::1:9465", ":::9465", "[::1:9465", "[localhost:x]:9465"])
def test_an_ipv6_host_without_its_brackets_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"stands in brackets, as in \[::1\]:9465"):
        parse_address(address)


def test_an_address_that_is_taken_is_an_error_and_a_closed_server_frees_it(
    serve: Callable[[str], ProbeServer], condition: Condition, registry: CollectorRegistry
) -> None:
    first = ProbeServer("127.0.0.1:0", condition, registry)
    with pytest.raises(OSError, match="in use"):
        ProbeServer(first.address, condition, registry)
    first.close()
    with connect(first) as connection, pytest.raises(ConnectionRefusedError):
        get(connection, "/healthz")
    serve(first.address)
