"""The port of probes and metrics, for as long as the gateway runs.

Orchestrators that cannot speak gRPC with TLS ask here; the same readiness is told by `grpc.health.v1`.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager

from oasst_telemetry import Condition, ProbeServer
from prometheus_client import CollectorRegistry

from oasst_gateway.errors import StartError

__all__ = ["serving_probes"]


@contextmanager
def serving_probes(listen: str, condition: Condition, registry: CollectorRegistry) -> Iterator[str]:
    """Prometheus and the orchestrator can ask at the address that is returned.

    Raises:
        StartError: if `listen` cannot be listened on.
    """
    try:
        server = ProbeServer(listen, condition, registry)
    except OSError as error:
        raise StartError(f"cannot listen on {listen} for metrics: {error.strerror or error}") from error
    with closing(server):
        yield server.address
