"""Is the gateway alive, is it ready, how is it doing: answered over HTTP from a thread of its own.

/healthz   200 while the event loop turns; otherwise a restart helps
/readyz    200 while chats are accepted
/metrics   for Prometheus

Orchestrators that cannot speak gRPC with TLS ask here; the same readiness is told by `grpc.health.v1`.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import ThreadingHTTPServer

from prometheus_client import CollectorRegistry, MetricsHandler

from oasst_gateway.errors import StartError
from oasst_gateway.health import Health

__all__ = ["serving_probes"]

# How soon the server notices that it shall stop.
_POLL_S = 0.05


@contextmanager
def serving_probes(listen: str, registry: CollectorRegistry, health: Health) -> Iterator[int]:
    """Prometheus and the orchestrator can ask at the port that is returned.

    Raises:
        StartError: if the address cannot be listened on.
    """
    host, _, port = listen.rpartition(":")
    try:
        server = _ProbeServer(host.strip("[]"), int(port), registry, health)
    except OSError as error:
        raise StartError(f"cannot listen on {listen} for metrics: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": _POLL_S}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _ProbeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, registry: CollectorRegistry, health: Health) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _make_handler(registry, health))


def _make_handler(registry: CollectorRegistry, health: Health) -> type[MetricsHandler]:
    class Handler(MetricsHandler):
        timeout = 10  # Seconds a silent client may hold a thread.

        def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
            if self.path == "/healthz":
                self._answer(is_ok=health.is_alive())
            elif self.path == "/readyz":
                self._answer(is_ok=health.is_ready)
            else:
                super().do_GET()

        def _answer(self, *, is_ok: bool) -> None:
            self.send_response(HTTPStatus.OK if is_ok else HTTPStatus.SERVICE_UNAVAILABLE)
            self.send_header("Content-Length", "0")
            self.end_headers()

    Handler.registry = registry
    return Handler
