"""How a connection is made: the target and the options both shells open their channel with."""

import ipaddress
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

__all__ = ["Metadata", "Tls", "call_metadata", "channel_credentials", "channel_options", "target_of", "traced"]

Metadata = tuple[tuple[str, str], ...]

# Larger than any answer: 8 choices of 2,048 tokens with 20 alternatives each.
_MAX_RECEIVE_BYTES = 16 * 1024 * 1024

# All addresses are used in turn. Trying again is not gRPC's business but ours: see `_retry`.
_SERVICE_CONFIG: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}

_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
    # Notices a dead peer while a stream waits. The gateway allows a ping each 10 s, and none are sent between calls.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A keepalive ping waits behind any other: one that gRPC sent to measure bandwidth would otherwise hold it for 60 s.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    # Shorter than the attempts of a call: a gateway that is back is found before the call is given up.
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
    # A service of one's own is not behind the web proxy, not even where `http_proxy` is set.
    ("grpc.enable_http_proxy", 0),
)


def target_of(address: str) -> str:
    """The gRPC target of an address.

    One `host:port` is resolved by DNS, all of its addresses are used in turn. Several, separated by commas, are the IP
    addresses of gateways beside each other; gRPC looks up no list of names. A target with a scheme is left as it is.

    >>> target_of("chat.example:50051")
    'dns:///chat.example:50051'
    >>> target_of("127.0.0.1:50051,127.0.0.1:50052")
    'ipv4:127.0.0.1:50051,127.0.0.1:50052'
    >>> target_of("unix:/run/oasst.sock")
    'unix:/run/oasst.sock'

    Raises:
        ValueError: the address is empty, a URL, or one of several that is no IP address with a port.
    """
    if not address:
        raise ValueError("the address is empty; give HOST:PORT")
    if address.startswith(("http://", "https://")):
        raise ValueError(f"{address} is a URL; give HOST:PORT, and tls=True where it would be https")
    if address.startswith(("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "xds:")):
        return address
    if "," not in address:
        return f"dns:///{address}"
    parts = address.split(",")
    version = 6 if address.startswith("[") else 4
    if strange := next((part for part in parts if _ip_version(part) != version), None):
        raise ValueError(
            f"{strange!r} is not IP:PORT: several addresses must be IP addresses, all IPv4 or all [IPv6];"
            " by name give one, which DNS may resolve to several"
        )
    return f"ipv{version}:{address}"


def _ip_version(address: str) -> int | None:
    """4 or 6; None for what is no IP address with a port.

    >>> [_ip_version(address) for address in ("127.0.0.1:50051", "[::1]:50051", "::1", "localhost:50051")]
    [4, 6, None, None]
    """
    host, _, port = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    try:
        version = ipaddress.ip_address(host[1:-1] if is_bracketed else host).version
    except ValueError:
        return None
    return version if port.isdecimal() and is_bracketed == (version == 6) else None


@dataclass(frozen=True, slots=True)
class Tls:
    """How the server proves who it is, and how the client does.

    >>> Tls(ca="ca.pem", cert="me.pem", key="me.key").server_name is None
    True
    """

    # PEM file of whoever signs the server's certificate. None: those that gRPC comes with.
    ca: str | os.PathLike[str] | None = None
    # PEM files of the client's own certificate and key, for servers that ask for one.
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    # The name in the server's certificate, where it is not that of the address.
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client certificate needs cert and key")


def channel_credentials(tls: Tls | bool | None) -> grpc.ChannelCredentials | None:
    """The credentials of a connection; None for a plain one."""
    if not tls:
        return None
    files = Tls() if tls is True else tls
    return grpc.ssl_channel_credentials(_read(files.ca), _read(files.key), _read(files.cert))


def call_metadata(
    address: str, tls: Tls | bool | None, api_key: str | None, metadata: Sequence[tuple[str, str]]
) -> Metadata:
    """What is sent with every call.

    Raises:
        ValueError: the key would go to another machine in plain text, and nobody said that it may; or it holds a
            character that no header can carry, such as the line break at the end of a file.
    """
    if api_key is None:
        return tuple(metadata)
    if strange := next((each for each in api_key if not " " <= each <= "~"), None):
        raise ValueError(f"the API key holds {strange!r}, which no header can carry")
    if tls is None and not _stays_here(address):
        raise ValueError("the API key would travel unencrypted: give tls=True, or tls=False if something else encrypts")
    return (*metadata, ("authorization", f"Bearer {api_key}"))


def traced(metadata: Metadata) -> Metadata:
    """The metadata of a call that is made now: it names the span that OpenTelemetry says is the current one.

    A program that traces has loaded OpenTelemetry; in any other this looks once whether it is there, and loads nothing.
    """
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return metadata
    place = api.get_current_span().get_span_context()
    if not place.is_valid:
        return metadata
    traceparent = f"00-{place.trace_id:032x}-{place.span_id:016x}-{place.trace_flags:02x}"
    tracestate = place.trace_state.to_header()
    state = (("tracestate", tracestate),) if tracestate else ()
    return (*metadata, ("traceparent", traceparent), *state)


def channel_options(
    tls: Tls | bool | None = None, extra: Sequence[tuple[str, str | int]] = ()
) -> list[tuple[str, str | int]]:
    """The channel options of this package; the caller's own stand in place of those of the same name."""
    merged = dict(_OPTIONS)
    if isinstance(tls, Tls) and tls.server_name:
        merged["grpc.ssl_target_name_override"] = tls.server_name
    merged.update(extra)  # gRPC itself would take the first of two.
    return list(merged.items())


def _stays_here(address: str) -> bool:
    """Whether all addresses are this machine's own."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    hosts = address.removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:").lstrip("/")
    return all(_is_loopback(host) for host in hosts.split(","))


def _is_loopback(host_and_port: str) -> bool:
    host = host_and_port.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
