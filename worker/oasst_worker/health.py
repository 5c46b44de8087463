"""Is the worker alive, is it ready, how is it doing: answered over HTTP from a thread of its own.

/healthz   200 while the engine makes progress or has nothing to do; otherwise a restart helps
/readyz    200 while jobs are claimed
/metrics   for Prometheus
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

__all__ = ["Check", "HealthServer", "WorkerHealth"]


@dataclass(frozen=True, slots=True)
class Check:
    """The answer to a question about the worker."""

    ok: bool
    reason: str


class WorkerHealth:
    """What the worker's parts last told of themselves. Written by the event loop, read by any thread."""

    def __init__(self, *, silence_limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """After `silence_limit_s` without a sign of the event loop the worker does not count as alive any more."""
        self._silence_limit_s = silence_limit_s
        self._clock = clock
        self._seen_s: float | None = None
        self._step_stuck_s = 0.0
        self._step_limit_s = float("inf")
        self._unready: str | None = "starting"

    def record_progress(self, *, step_stuck_s: float, step_limit_s: float) -> None:
        """The event loop runs; the engine's step has been in progress for this long."""
        self._step_stuck_s, self._step_limit_s = step_stuck_s, step_limit_s
        self._seen_s = self._clock()

    def record_readiness(self, unready: str | None) -> None:
        """Jobs are claimed if `unready` is None; otherwise it says why not."""
        self._unready = unready

    def liveness(self) -> Check:
        if self._seen_s is None:
            return Check(True, "starting")
        silent_s = self._clock() - self._seen_s
        if silent_s > self._silence_limit_s:
            return Check(False, f"the event loop has been silent for {silent_s:.1f} s")
        if self._step_stuck_s > self._step_limit_s:
            return Check(False, f"a step has been in progress for {self._step_stuck_s:.1f} s")
        return Check(True, "in progress")

    def readiness(self) -> Check:
        alive = self.liveness()
        if not alive.ok:
            return alive
        return Check(True, "serving") if self._unready is None else Check(False, self._unready)


class HealthServer:
    """Serves from the moment it is made until it is closed. Port 0 takes a free one; `address` tells which."""

    def __init__(self, address: str, health: WorkerHealth, registry: CollectorRegistry) -> None:
        """
        Raises:
            OSError: if the address cannot be listened on.
        """
        host, _, port = address.rpartition(":")
        self._server = ThreadingHTTPServer((host, int(port)), _make_handler(health, registry))
        self._server.daemon_threads = True
        self.address = f"{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _make_handler(health: WorkerHealth, registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # Seconds a silent client may hold a thread.

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(HTTPStatus.OK, generate_latest(registry), CONTENT_TYPE_LATEST)
            elif self.path == "/healthz":
                self._answer_check(health.liveness())
            elif self.path == "/readyz":
                self._answer_check(health.readiness())
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"try /metrics, /healthz or /readyz\n", "text/plain")

        def log_message(self, format: str, *args: object) -> None:
            """Probes and scrapes are not logged."""

        def _answer_check(self, check: Check) -> None:
            status = HTTPStatus.OK if check.ok else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, json.dumps(asdict(check)).encode(), "application/json")

        def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
