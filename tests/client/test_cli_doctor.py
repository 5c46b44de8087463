"""The doctor finds what is wrong with the way to a service, and says what to do."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import grpc
import pytest
from certificates import Authority
from google.protobuf import timestamp_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from oasst.v1 import model_pb2, model_pb2_grpc
from oasst_cli.__main__ import app
from oasst_cli.doctor import Verdict, examine
from typer.testing import CliRunner


class Gateway(model_pb2_grpc.ModelServiceServicer, health_pb2_grpc.HealthServicer):
    """As much of a gateway as the doctor looks at."""

    def __init__(self) -> None:
        self.load = model_pb2.GetLoadResponse(workers=[model_pb2.WorkerLoad(worker_id="w")], server_version="9.9")
        self.load.server_time.GetCurrentTime()
        self.status = health_pb2.HealthCheckResponse.SERVING
        self.wants_key = False

    def ListModels(self, request, context):  # noqa: N802
        if self.wants_key:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name="tiny")])

    def GetLoad(self, request, context):  # noqa: N802
        return self.load

    def Check(self, request, context):  # noqa: N802
        return health_pb2.HealthCheckResponse(status=self.status)


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def serve(gateway) -> Iterator:
    """Starts the gateway, with TLS if it gets a certificate; its address."""
    server = grpc.server(ThreadPoolExecutor(max_workers=4))

    def start(files=None, client_ca=None) -> str:
        model_pb2_grpc.add_ModelServiceServicer_to_server(gateway, server)
        health_pb2_grpc.add_HealthServicer_to_server(gateway, server)
        if files:
            pair = (files.key.read_bytes(), files.cert.read_bytes())
            asked = client_ca and client_ca.read_bytes()
            credentials = grpc.ssl_server_credentials([pair], asked, require_client_auth=bool(asked))
            port = server.add_secure_port("127.0.0.1:0", credentials)
        else:
            port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        return f"127.0.0.1:{port}"

    yield start
    server.stop(grace=None).wait()


def found(address, profile=None) -> dict[str, tuple[Verdict, str]]:
    return {each.check: (each.verdict, f"{each.message} -> {each.advice}") for each in examine(address, profile)}


def test_a_service_that_is_well_gets_a_word_on_everything(serve):
    findings = found(serve())
    assert list(findings) == ["profile", "network", "access", "health", "workers", "version", "clock", "round trip"]
    assert {verdict for name, (verdict, _) in findings.items() if name != "version"} == {Verdict.OK}
    assert findings["version"][0] is Verdict.WARNING
    assert "there 9.9" in findings["version"][1]


def test_a_clock_that_differs_is_told(serve, gateway):
    gateway.load.server_time.CopyFrom(timestamp_pb2.Timestamp(seconds=gateway.load.server_time.seconds + 100))
    verdict, message = found(serve())["clock"]
    assert verdict is Verdict.WARNING
    assert "differs by +100 s" in message or "differs by +99 s" in message


def test_a_gateway_that_leaves_and_one_without_workers_are_broken(serve, gateway):
    del gateway.load.workers[:]
    address = serve()
    assert found(address)["workers"][0] is Verdict.BROKEN
    gateway.status = health_pb2.HealthCheckResponse.NOT_SERVING
    findings = found(address)
    assert findings["health"][0] is Verdict.BROKEN
    assert "the gateway is NOT_SERVING" in findings["health"][1]
    assert "workers" not in findings


def test_an_address_where_nobody_listens_is_broken():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        verdict, message = found(f"127.0.0.1:{unused.getsockname()[1]}")["network"]
    assert verdict is Verdict.BROKEN
    assert "is the service running" in message


def test_a_plain_connection_to_a_server_with_tls_is_found_out(serve, authority):
    verdict, message = found(serve(authority.issue("server")))["access"]
    assert verdict is Verdict.BROKEN
    assert "set tls = true" in message


def test_a_certificate_is_checked_against_the_profile(serve, authority, tmp_path, monkeypatch):
    address = serve(authority.issue("server"))
    monkeypatch.setenv("OASST_CONFIG", str(tmp_path / "profiles.toml"))
    (tmp_path / "profiles.toml").write_text(f"[trusting]\ntls_ca_file = '{authority.ca}'\n[doubting]\ntls = true\n")
    (tmp_path / "profiles.toml").chmod(0o600)
    trusted = found(address, "trusting")
    # Issued for an hour.
    assert trusted["tls"][0] is Verdict.WARNING
    assert "renew it" in trusted["tls"][1]
    assert trusted["access"][0] is Verdict.OK
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))  # Whom the system trusts, gRPC need not.
    verdict, message = found(address, "doubting")["tls"]
    assert verdict is Verdict.BROKEN
    assert "tls_ca_file" in message


def test_a_server_that_asks_for_a_certificate_gets_one_or_is_found_out(serve, authority, tmp_path, monkeypatch):
    address, mine = serve(authority.issue("server"), authority.ca), authority.issue("me")
    monkeypatch.setenv("OASST_CONFIG", str(tmp_path / "profiles.toml"))
    without = f"tls_ca_file = '{authority.ca}'"
    (tmp_path / "profiles.toml").write_text(
        f"[without]\n{without}\n[with]\n{without}\ntls_cert_file = '{mine.cert}'\ntls_key_file = '{mine.key}'\n"
    )
    (tmp_path / "profiles.toml").chmod(0o600)
    verdict, message = found(address, "without")["tls"]
    assert verdict is Verdict.BROKEN
    assert "name yours in tls_cert_file" in message
    assert found(address, "with")["access"][0] is Verdict.OK


def test_tls_files_that_cannot_be_used_are_named(serve, authority, tmp_path, monkeypatch):
    address, mine, other = serve(authority.issue("server")), authority.issue("me"), authority.issue("other")
    monkeypatch.setenv("OASST_CONFIG", str(tmp_path / "profiles.toml"))
    (tmp_path / "empty.pem").touch()
    (tmp_path / "profiles.toml").write_text(
        "[empty]\ntls_ca_file = 'empty.pem'\n"
        f"[mixed]\ntls_ca_file = '{authority.ca}'\ntls_cert_file = '{mine.cert}'\ntls_key_file = '{other.key}'\n"
    )
    (tmp_path / "profiles.toml").chmod(0o600)
    verdict, message = found(address, "empty")["tls"]
    assert verdict is Verdict.BROKEN
    assert "empty.pem is no certificate" in message
    verdict, message = found(address, "mixed")["tls"]
    assert verdict is Verdict.BROKEN
    assert "other.key do not belong together" in message


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("http://127.0.0.1:50051", "is a URL; give HOST:PORT"),
        ("127.0.0.1:grpc", "write HOST:PORT"),
        ("chat..example:50051", "write HOST:PORT"),
    ],
)
def test_an_address_that_is_none_is_told_at_once(address, complaint):
    *_, (verdict, message) = found(address).values()
    assert verdict is Verdict.BROKEN
    assert complaint in message


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (socket.gaierror(socket.EAI_NONAME, "unknown"), "there is no host chat.example"),
        (socket.gaierror(socket.EAI_AGAIN, "no answer"), "the name chat.example cannot be looked up now: no answer"),
    ],
)
def test_a_name_that_is_none_differs_from_one_that_cannot_be_looked_up(monkeypatch, error, complaint):
    def look_up(*_: object) -> None:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    verdict, message = found("chat.example:50051")["network"]
    assert verdict is Verdict.BROKEN
    assert complaint in message


def test_what_listens_there_and_is_no_gateway_is_found_out():
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        Thread(target=other.serve_forever, daemon=True).start()
        *_, (verdict, message) = found(f"127.0.0.1:{other.server_port}").values()
        other.shutdown()
    assert verdict is Verdict.BROKEN
    assert "does a gateway listen there?" in message


def test_a_key_that_is_missing_and_a_file_that_others_can_read_are_told(serve, gateway, tmp_path, monkeypatch):
    gateway.wants_key = True
    monkeypatch.setenv("OASST_CONFIG", str(tmp_path / "profiles.toml"))
    (tmp_path / "profiles.toml").write_text(f"[default]\naddress = '{serve()}'\n")
    (tmp_path / "profiles.toml").chmod(0o644)
    findings = found(None)
    assert "chmod 600" in findings["profile"][1]
    message = "who are you? (UNAUTHENTICATED) -> give the key in api_key or OASST_API_KEY"
    assert findings["access"] == (Verdict.BROKEN, message)


def test_a_profile_that_cannot_be_used_is_the_first_thing_told(tmp_path, monkeypatch):
    monkeypatch.setenv("OASST_CONFIG", str(tmp_path / "none.toml"))
    assert found(None, "work")["profile"][0] is Verdict.BROKEN


def test_the_command_ends_with_1_when_something_is_broken_and_tells_json(serve, gateway):
    address = serve()
    runner = CliRunner()
    assert runner.invoke(app, ["doctor", "--address", address]).exit_code == 0
    del gateway.load.workers[:]
    result = runner.invoke(app, ["doctor", "--json", "--address", address])
    assert result.exit_code == 1
    findings = {each["check"]: each for each in map(json.loads, result.stdout.splitlines())}
    assert (findings["workers"]["verdict"], findings["network"]["verdict"]) == ("broken", "ok")
