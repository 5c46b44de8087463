"""The gRPC server, listening but not started."""

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]  # without stubs
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]  # without stubs
from oasst.v1 import chat_pb2_grpc, model_pb2_grpc, scoring_pb2_grpc

from oasst_gateway.errors import StartError
from oasst_gateway.health import Health
from oasst_gateway.interceptors import RpcInterceptor
from oasst_gateway.service import ChatServicer, ModelServicer, ScoringServicer
from oasst_gateway.services import SERVICES
from oasst_gateway.tls import ServerCertificate

__all__ = ["MAX_STREAMS", "create_server"]

# Of one connection; more of them wait in their client.
MAX_STREAMS = 1024

_DESCRIBED = (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)


def create_server(
    *,
    listen: str,
    certificate: ServerCertificate | None,
    chat_servicer: ChatServicer,
    model_servicer: ModelServicer,
    scoring_servicer: ScoringServicer,
    health: Health,
    interceptor: RpcInterceptor,
    max_message_bytes: int,
    reuse_port: bool,
    with_reflection: bool,
) -> tuple[grpc.aio.Server, int]:
    """A server bound to `listen`, and its port (a free one was taken for port 0). It serves once it is started.

    Raises:
        StartError: if it cannot listen there.
    """
    server = grpc.aio.server(
        interceptors=[interceptor],
        options=_options(max_message_bytes=max_message_bytes, reuse_port=reuse_port),
    )
    chat_pb2_grpc.add_ChatServiceServicer_to_server(chat_servicer, server)  # type: ignore[no-untyped-call]  # generated
    model_pb2_grpc.add_ModelServiceServicer_to_server(model_servicer, server)  # type: ignore[no-untyped-call]  # generated
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(scoring_servicer, server)  # type: ignore[no-untyped-call]  # generated
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    if with_reflection:
        reflection.enable_server_reflection(_DESCRIBED, server)
    try:
        if certificate is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, certificate.credentials())
    except RuntimeError as error:
        raise StartError(f"cannot listen on {listen}: is it in use?") from error
    return server, port


def _options(*, max_message_bytes: int, reuse_port: bool) -> Sequence[tuple[str, int]]:
    return [
        # Off unless asked for: with it, two gateways started by mistake on one port would share its callers unnoticed.
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_metadata_size", 16 * 1024),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        # A caller whose machine vanished is noticed within 40 s, and its work given up.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # A keepalive ping waits behind one that measures bandwidth, which would otherwise be given 60 s.
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        # Connections are renewed now and then, so that callers find new gateways. Open streams may end first.
        ("grpc.max_connection_age_ms", 300_000),
        ("grpc.max_connection_idle_ms", 900_000),
    ]
