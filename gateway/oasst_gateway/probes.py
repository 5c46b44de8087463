"""Is the gateway alive, is it ready, how is it doing: answered over HTTP from a thread of its own.

/healthz   200 while the event loop turns; otherwise a restart helps
/readyz    200 while chats are accepted
/metrics   for Prometheus

Orchestrators that cannot speak gRPC with TLS ask here; the same readiness is told by `grpc.health.v1`.
"""

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Protocol

from prometheus_client import CollectorRegistry, MetricsHandler

from oasst_gateway.errors import StartError

__all__ = ["Condition", "serving_probes"]

# How soon the server notices that it shall stop.
_POLL_S = 0.05


class Condition(Protocol):
    """How whoever is asked about is. Asked from other threads."""

    @property
    def is_ready(self) -> bool: ...

    def is_alive(self) -> bool: ...


@contextmanager
def serving_probes(listen: str, registry: CollectorRegistry, condition: Condition) -> Iterator[int | None]:
    """Prometheus and the orchestrator can ask at the port that is returned; none for a `listen` of unix:/PATH.

    Raises:
        StartError: if the address cannot be listened on.
    """
    try:
        server = _listen(listen, _make_handler(registry, condition))
    except OSError as error:
        raise StartError(f"cannot listen on {listen} for metrics: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": _POLL_S}, daemon=True)
    thread.start()
    try:
        yield None if server.address_family == socket.AF_UNIX else server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _ProbeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


class _UnixProbeServer(_ProbeServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks for a host name, which there is none of.

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        connection, _ = super().get_request()
        return connection, ("unix", 0)


class _Ipv6ProbeServer(_ProbeServer):
    address_family = socket.AF_INET6


def _listen(listen: str, handler: type[MetricsHandler]) -> _ProbeServer:
    if listen.startswith("unix:"):
        return _UnixProbeServer(listen.removeprefix("unix:"), handler)  # type: ignore[arg-type]  # its family's address
    host, _, port = listen.rpartition(":")
    server = _Ipv6ProbeServer if ":" in host else _ProbeServer
    return server((host.strip("[]"), int(port)), handler)


def _make_handler(registry: CollectorRegistry, condition: Condition) -> type[MetricsHandler]:
    class Handler(MetricsHandler):
        timeout = 10  # Seconds a silent client may hold a thread.

        def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
            if self.path == "/healthz":
                self._answer(is_ok=condition.is_alive())
            elif self.path == "/readyz":
                self._answer(is_ok=condition.is_ready)
            else:
                super().do_GET()

        def _answer(self, *, is_ok: bool) -> None:
            self.send_response(HTTPStatus.OK if is_ok else HTTPStatus.SERVICE_UNAVAILABLE)
            self.send_header("Content-Length", "0")
            self.end_headers()

    Handler.registry = registry
    return Handler
