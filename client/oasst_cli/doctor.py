"""`oasst doctor`: why the service cannot be reached, or that all is well."""

import importlib.metadata
import os
import pkgutil
import socket
import ssl
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # without stubs
from oasst_client import (
    Client,
    Load,
    OasstError,
    PermissionDeniedError,
    Profile,
    RetryPolicy,
    UnauthenticatedError,
    UnimplementedError,
    connect,
    open_channel,
    profile_path,
)
from rich.console import Console
from rich.text import Text

from oasst_cli.exits import Exit
from oasst_cli.options import Address, AsJson, ProfileName, chosen_profile, json_line

__all__ = ["Finding", "Verdict", "doctor", "examine"]

_TIMEOUT_S = 5.0
_NUM_ROUND_TRIPS = 10
_SLOW_ROUND_TRIP_S = 0.2
# Tokens with times in them are refused when the clocks differ by about so much.
_MAX_CLOCK_DIFFERENCE_S = 30.0
_STALE_WORKER_S = 10.0
_MIN_DAYS_OF_CERTIFICATE = 14
# What gRPC takes for an address without one.
_DEFAULT_PORT = 443


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    verdict: Verdict
    message: str
    # What to do, unless all is well.
    advice: str = ""


_STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.BROKEN: "bold red"}


def doctor(address: Address = None, profile: ProfileName = None, as_json: AsJson = False) -> None:
    """Find out why the service cannot be used.

    Checks profile, network, TLS, access, health, workers, versions, clocks and round trip, and says what to do. --json
    prints one line for each finding.
    """
    console = Console(highlight=False)
    is_broken = False
    for finding in examine(address, profile):
        is_broken |= finding.verdict is Verdict.BROKEN
        if as_json:
            print(json_line(finding), flush=True)
        else:
            _show(console, finding)
    if is_broken:
        raise typer.Exit(Exit.FAILED)


def examine(address: str | None, profile_name: str | None) -> Iterator[Finding]:
    """Every finding, in the order of a request's way. What lies behind something broken is not looked at."""
    try:
        profile = chosen_profile(address, profile_name)
        client = connect(profile, retry=RetryPolicy(max_attempts=1), query_timeout_s=_TIMEOUT_S)
    except OasstError as error:
        yield Finding("profile", Verdict.BROKEN, str(error), "correct the profile file, the environment or the options")
        return
    with client:
        for finding in _way(profile, client):
            yield finding
            if finding.verdict is Verdict.BROKEN:
                return
        load = client.load()
        yield _workers(load)
        yield _version(load)
        yield _clock(client)
        yield _round_trip(client)


def _way(profile: Profile, client: Client) -> Iterator[Finding]:
    """From here to a service that lets us in."""
    yield _profile(profile)
    try:
        endpoints = _endpoints(profile.address)
    except ValueError as error:
        yield Finding("network", Verdict.BROKEN, f"{profile.address}: {error}", "write HOST:PORT")
        return
    for host, port in endpoints:
        yield _network(host, port)
    if profile.tls:
        for host, port in endpoints:
            yield _certificate(profile, host, port)
    yield _access(profile, client, endpoints)
    yield _health(profile)


def _profile(profile: Profile) -> Finding:
    how = ", ".join((profile.address, "TLS" if profile.tls else "plain", "with a key" if profile.api_key else "no key"))
    path = profile_path(os.environ)
    if path.exists() and path.stat().st_mode & 0o077:
        return Finding("profile", Verdict.WARNING, f"{path} is open to others", f"chmod 600 {path}")
    return Finding("profile", Verdict.OK, how)


def _endpoints(address: str) -> list[tuple[str, int]]:
    """Hosts and ports of an address; empty for what has none, such as a socket's path.

    >>> _endpoints("127.0.0.1:50051,[::1]:50052")
    [('127.0.0.1', 50051), ('::1', 50052)]
    >>> _endpoints("chat.example")
    [('chat.example', 443)]

    Raises:
        ValueError: a port is no number, or a name is none that can be looked up.
    """
    if address.startswith(("unix:", "unix-abstract:", "xds:")):
        return []
    parts = address.removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:").lstrip("/").split(",")
    split = [urlsplit(f"//{part}") for part in parts]
    for each in split:
        (each.hostname or "").encode("idna")  # As looking it up does.
    return [(each.hostname or "", each.port or _DEFAULT_PORT) for each in split]


def _network(host: str, port: int) -> Finding:
    try:
        start_s = time.perf_counter()
        with socket.create_connection((host, port), _TIMEOUT_S):
            took_ms = (time.perf_counter() - start_s) * 1000
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            message = f"the name {host} cannot be looked up now: {error.strerror}"
            return Finding("network", Verdict.BROKEN, message, "is this machine connected, does its DNS server answer?")
        return Finding("network", Verdict.BROKEN, f"there is no host {host}", "check the address for a typo")
    except OSError as error:
        advice = "is the service running (oasst up), is the port right, does a firewall let you through?"
        return Finding("network", Verdict.BROKEN, f"{host}:{port} takes no connection: {error}", advice)
    return Finding("network", Verdict.OK, f"{host}:{port} takes connections, in {took_ms:.1f} ms")


def _certificate(profile: Profile, host: str, port: int) -> Finding:
    """Whether the server proves who it is, and for how long it still can."""
    try:
        context = _trusting(profile.tls_ca_file)
    except OSError as error:
        advice = "give the PEM file of whoever signed the server's certificate"
        return Finding("tls", Verdict.BROKEN, f"tls_ca_file {profile.tls_ca_file} is no certificate: {error}", advice)
    try:
        if profile.tls_cert_file:
            context.load_cert_chain(profile.tls_cert_file, profile.tls_key_file)
    except OSError as error:
        pair = f"tls_cert_file {profile.tls_cert_file} and tls_key_file {profile.tls_key_file}"
        return Finding("tls", Verdict.BROKEN, f"{pair} do not belong together: {error}", "give both as PEM files")
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), _TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=profile.tls_server_name or host) as encrypted,
        ):
            certificate = encrypted.getpeercert() or {}
            if refusal := _refusal(encrypted):
                advice = "does it ask for a certificate that it trusts? name yours in tls_cert_file and tls_key_file"
                return Finding("tls", Verdict.BROKEN, f"{host}:{port} ends the connection: {refusal}", advice)
    except ssl.SSLCertVerificationError as error:
        advice = "name its authority in tls_ca_file, or the name in its certificate in tls_server_name"
        return Finding("tls", Verdict.BROKEN, f"{host}: {error.verify_message}", advice)
    except OSError as error:
        return Finding("tls", Verdict.BROKEN, f"{host}:{port}: {error}", "does the server speak TLS? else tls = false")
    days = (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) / 86_400
    if days < _MIN_DAYS_OF_CERTIFICATE:
        return Finding("tls", Verdict.WARNING, f"{host}'s certificate ends in {days:.1f} days", "renew it")
    return Finding("tls", Verdict.OK, f"{host}'s certificate is good for {days:.0f} days")


def _trusting(ca_file: Path | None) -> ssl.SSLContext:
    """A context that trusts whom the client trusts: without a file gRPC's own authorities, not the system's."""
    if ca_file:
        return ssl.create_default_context(cafile=ca_file)
    roots = pkgutil.get_data("grpc._cython", "_credentials/roots.pem") or b""
    return ssl.create_default_context(cadata=roots.decode())


def _refusal(encrypted: ssl.SSLSocket) -> str:
    """Why a server hangs up that did not like the client's certificate; empty if it does not.

    In TLS 1.3 it says so behind the handshake, where a gateway that is content speaks first.
    """
    try:
        return "" if encrypted.recv(1) else "it says nothing"
    except TimeoutError:
        return ""
    except OSError as error:
        return str(error)


def _access(profile: Profile, client: Client, endpoints: list[tuple[str, int]]) -> Finding:
    try:
        models = client.models()
    except (UnauthenticatedError, PermissionDeniedError) as error:
        return Finding("access", Verdict.BROKEN, str(error), "give the key in api_key or OASST_API_KEY")
    except UnimplementedError as error:
        return Finding("access", Verdict.BROKEN, str(error), "something else than oasst-serve listens there")
    except OasstError as error:
        is_encrypted = not profile.tls and any(_speaks_tls(host, port) for host, port in endpoints)
        otherwise = "does a gateway listen there? then look into its log"
        advice = "the server speaks TLS: set tls = true" if is_encrypted else otherwise
        return Finding("access", Verdict.BROKEN, str(error), advice)
    return Finding("access", Verdict.OK, f"serves {', '.join(model.name for model in models)}")


def _speaks_tls(host: str, port: int) -> bool:
    """Whether a handshake succeeds; nothing is trusted, and nothing sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), _TIMEOUT_S) as plain, context.wrap_socket(plain):
            return True
    except OSError:
        return False


def _health(profile: Profile) -> Finding:
    with open_channel(profile) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return Finding("health", Verdict.WARNING, f"the gateway tells no health: {error.code().name}", "update it")
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return Finding("health", Verdict.OK, "the gateway serves")
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return Finding(
        "health", Verdict.BROKEN, f"the gateway is {name}", "it is leaving, or its queue is away: see its log"
    )


def _workers(load: Load) -> Finding:
    alive = [worker for worker in load.workers if worker.age_s < _STALE_WORKER_S]
    waiting = f"{load.waiting_requests} requests wait, {load.running_requests} run"
    if not alive:
        return Finding("workers", Verdict.BROKEN, f"no worker is alive; {waiting}", "start one, or look into its log")
    return Finding("workers", Verdict.OK, f"{len(alive)} alive; {waiting}")


def _version(load: Load) -> Finding:
    ours = importlib.metadata.version("oasst-serve")
    if load.server_version != ours:
        theirs = load.server_version or "an older one, which does not tell"
        return Finding("version", Verdict.WARNING, f"here {ours}, there {theirs}", "use the same version on both sides")
    return Finding("version", Verdict.OK, f"{ours} on both sides")


def _clock(client: Client) -> Finding:
    before_s = time.time()
    server_s = client.load().server_time_s
    after_s = time.time()
    if server_s is None:
        return Finding("clock", Verdict.WARNING, "the gateway does not tell its clock", "update it")
    difference_s = server_s - (before_s + after_s) / 2
    if abs(difference_s) > _MAX_CLOCK_DIFFERENCE_S:
        message = f"the gateway's clock differs by {difference_s:+.0f} s"
        return Finding("clock", Verdict.WARNING, message, "synchronize both: tokens with times in them may be refused")
    return Finding("clock", Verdict.OK, f"differs by {difference_s:+.3f} s")


def _round_trip(client: Client) -> Finding:
    took_s = []
    for _ in range(_NUM_ROUND_TRIPS):
        start_s = time.perf_counter()
        client.load()
        took_s.append(time.perf_counter() - start_s)
    message = f"{statistics.median(took_s) * 1000:.1f} ms (median of {_NUM_ROUND_TRIPS}, most {max(took_s) * 1000:.1f})"
    if statistics.median(took_s) > _SLOW_ROUND_TRIP_S:
        return Finding("round trip", Verdict.WARNING, message, "far away, or busy: compare with a client beside it")
    return Finding("round trip", Verdict.OK, message)


def _show(console: Console, finding: Finding) -> None:
    style = _STYLES[finding.verdict]
    console.print(Text.assemble((f"{finding.verdict:<8}", style), (f"{finding.check:<11}", "bold"), finding.message))
    if finding.advice:
        console.print(Text(f"{'':19}-> {finding.advice}", style))
