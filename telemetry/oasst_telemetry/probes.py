"""Is the process alive, is it ready, how is it doing: answered over HTTP from threads of its own.

/healthz   200 while a restart would not help
/readyz    200 while work is taken
/metrics   for Prometheus
"""

import ipaddress
import json
import socket
import socketserver
import threading
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

__all__ = ["Check", "Condition", "ProbeServer", "parse_address"]

_UNIX = "unix:"
# How soon the server notices that it shall stop.
_POLL_S = 0.05
# How long a socket that may be another's is given to answer.
_ANSWER_S = 1.0
# More than any page: an answer is one write.
_WRITE_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Check:
    """The answer to a question about the process."""

    ok: bool
    reason: str


class Condition(Protocol):
    """How the process is. Asked from other threads."""

    def liveness(self) -> Check: ...

    def readiness(self) -> Check: ...


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 host stands in brackets, as in [::1]:9465.

    Raises:
        ValueError: it is not written like that.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("must be HOST:PORT with a port from 0 to 65535")
    bare = host.removeprefix("[").removesuffix("]")
    if ":" in host and (host != f"[{bare}]" or not _is_ipv6(bare)):
        raise ValueError("must be HOST:PORT; an IPv6 host stands in brackets, as in [::1]:9465")
    return bare, int(port)


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


class ProbeServer:
    """Serves from the moment it is made until it is closed.

    `address` is where: what was asked for, with the port that port 0 took.
    """

    def __init__(self, listen: str, condition: Condition, registry: CollectorRegistry) -> None:
        """`listen` is HOST:PORT or unix:/PATH.

        Raises:
            OSError: if the address cannot be listened on.
        """
        self._server = _Server(listen, _make_handler(condition, registry))
        self.address = listen
        if not listen.startswith(_UNIX):
            self.address = f"{listen.rpartition(':')[0]}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="probes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nobody is answered any more; the file of a Unix socket is gone."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, listen: str, handler: type[BaseHTTPRequestHandler]) -> None:
        self._socket_file: Path | None = None
        if listen.startswith(_UNIX):
            path = Path(listen.removeprefix(_UNIX))
            _remove_if_dead(path)
            self.address_family = socket.AF_UNIX
            super().__init__(str(path), handler)  # type: ignore[arg-type]  # its family's address
            self._socket_file = path
            return
        host, port = parse_address(listen)
        [(self.address_family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        super().__init__(address, handler)  # type: ignore[arg-type]  # its family's address

    def server_close(self) -> None:
        super().server_close()
        if self._socket_file is not None:
            self._socket_file.unlink(missing_ok=True)


def _remove_if_dead(path: Path) -> None:
    """Removes a socket that a process left behind that did not come to close it. What answers is left alone."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(_ANSWER_S)
        try:
            caller.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            pass  # Somebody is there who is slow, or it is not ours: listening will tell.


def _make_handler(condition: Condition, registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        # Prometheus keeps its connection. Each accept, thread and write is a wait for the interpreter's lock, which
        # those who compute hold.
        protocol_version = "HTTP/1.1"
        wbufsize = _WRITE_BYTES
        timeout = 75  # Seconds a silent client may hold a thread: longer than between two scrapes.

        def do_GET(self) -> None:
            match self.path.partition("?")[0]:
                case "/metrics":
                    encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                    self._answer(HTTPStatus.OK, encode(registry), content_type)
                case "/healthz":
                    self._answer_check(condition.liveness())
                case "/readyz":
                    self._answer_check(condition.readiness())
                case _:
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
