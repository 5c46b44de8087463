"""How a connection is made: the target and the options both shells open their channel with."""

import json
from collections.abc import Sequence

__all__ = ["channel_options", "target_of"]

# Larger than any answer: 8 choices of 2,048 tokens with 20 alternatives each.
_MAX_RECEIVE_BYTES = 16 * 1024 * 1024

# Every call may be tried again: a request keeps its id over retries, and the gateway attaches a repeated id to what
# already runs. RESOURCE_EXHAUSTED is not in the list: gRPC's own size limit has that code, and it never goes away.
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}

_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
    # Notices a dead peer while a stream waits. The gateway allows a ping each 10 s, and none are sent between calls.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
    # A service of one's own is not behind the web proxy, not even where `http_proxy` is set.
    ("grpc.enable_http_proxy", 0),
)


def target_of(address: str) -> str:
    """The gRPC target of an address.

    One `host:port` is resolved by DNS, all of its addresses are used in turn. Several, parted by commas, are the IP
    addresses of gateways beside each other. A target with a scheme is left as it is.

    >>> target_of("chat.example:50051")
    'dns:///chat.example:50051'
    >>> target_of("127.0.0.1:50051,127.0.0.1:50052")
    'ipv4:127.0.0.1:50051,127.0.0.1:50052'
    >>> target_of("unix:/run/oasst.sock")
    'unix:/run/oasst.sock'
    """
    if not address:
        raise ValueError("the address is empty; give HOST:PORT")
    if address.startswith(("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "xds:")):
        return address
    if "," in address:
        return ("ipv6:" if address.startswith("[") else "ipv4:") + address
    return f"dns:///{address}"


def channel_options(extra: Sequence[tuple[str, str | int]] = ()) -> list[tuple[str, str | int]]:
    """The channel options of this package, those of the caller last so that they win."""
    return [*_OPTIONS, *extra]
