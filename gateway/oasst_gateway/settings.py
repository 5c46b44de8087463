"""The gateway's options: flags, or environment variables named OASST_GATEWAY_ and the flag. Read once, at the start."""

import os
import re
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from oasst_jobs import ServerAddress
from oasst_jobs.failpoints import parse_failpoints
from oasst_telemetry import (
    LogFormat,
    MistypedVariableError,
    parse_address,
    refuse_mistyped_variables,
    unknown_variables,
)
from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from oasst_gateway.errors import StartError

__all__ = ["FAILPOINTS", "GatewaySettings", "read_settings", "unread_variables"]

_PREFIX = "OASST_GATEWAY_"

# Places in the gateway where a test can break it: before a request is queued, after that and before its caller hears of
# it, and before each event that a caller is sent.
FAILPOINTS = ("gateway.submitting", "gateway.submitted", "gateway.sending")


def _draw_gateway_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def _check_address(address: str) -> str:
    parse_address(address)
    return address


def _check_metrics_address(address: str) -> str:
    return address if address.startswith("unix:/") else _check_address(address)


def _check_redis_url(url: str) -> str:
    ServerAddress.parse(url)
    return url


def _check_failpoints(text: str) -> str:
    parse_failpoints(text, known=FAILPOINTS)
    return text


def _standard_endpoint() -> str | None:
    return os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")


def _check_endpoint(endpoint: str | None) -> str | None:
    if endpoint is not None and not re.fullmatch(r"https?://[^/\s]+/?", endpoint):
        raise ValueError("must be http://HOST:PORT, or https:// for TLS")
    return endpoint


Address = Annotated[str, AfterValidator(_check_address)]
MetricsAddress = Annotated[str, AfterValidator(_check_metrics_address)]


class GatewaySettings(BaseSettings):
    """Serves the chat API over gRPC and puts its requests into Redis."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        cli_prog_name="python -m oasst_gateway",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        frozen=True,
    )

    model: str = Field(description="Checkpoint folder or hub id; only its config and tokenizer are read.")
    model_name: str | None = Field(None, description="Name callers know the model by. Unset: hub id or folder name.")
    redis_url: Annotated[str, AfterValidator(_check_redis_url)] = Field(
        "redis://127.0.0.1:6379/0", description="Where the queue is."
    )
    queue_shards: int = Field(1, ge=1, le=1024, description="Parts of the queue; the same for all its processes.")
    durability: Literal["local", "replicated"] = Field(
        "local", description="Whether a request is accepted once Redis has it, or once a replica has it too."
    )
    listen: Address = Field("127.0.0.1:50051", description="HOST:PORT of the gRPC server; port 0 takes a free one.")
    metrics: bool = Field(True, description="Whether metrics and probes are served.")
    metrics_listen: MetricsAddress = Field(
        "127.0.0.1:9464", description="HOST:PORT, or unix:/PATH, of /metrics, /healthz and /readyz."
    )
    processes: int = Field(
        1,
        ge=1,
        le=256,
        description="Processes behind the port, each with its own limits. SIGHUP renews them; a single one reads its"
        " tenants and TLS files anew, as each does when these files change.",
    )
    tls_cert: Path | None = Field(None, description="PEM file of the server's certificate and its chain; turns TLS on.")
    tls_key: Path | None = Field(None, description="PEM file of the certificate's private key.")
    tls_client_ca: Path | None = Field(None, description="PEM file; callers must show a certificate signed by it.")
    tenants: Path | None = Field(
        None, description="TOML file of tenants and their API keys. Unset: every caller is the one tenant."
    )
    jwt_key: Path | None = Field(None, description="PEM file of the public key that signed tokens are checked with.")
    jwt_algorithm: Literal["RS256", "PS256", "ES256", "EdDSA"] = Field(
        "RS256", description="The one algorithm that tokens may be signed with."
    )
    jwt_issuer: str | None = Field(None, description="Tokens must come from it (iss).")
    jwt_audience: str | None = Field(None, description="Tokens must be meant for it (aud).")
    jwt_tenant_claim: str = Field("tenant", description="The claim that names one of the tenants.")
    gateway_id: str = Field(
        default_factory=_draw_gateway_id,
        pattern=r"^[A-Za-z0-9._-]{1,128}$",
        description="This process among all gateways. Unset: host, process and a random part.",
    )
    max_prompt_tokens: int | None = Field(None, ge=1, description="Unset: what the model's positions allow.")
    max_new_tokens: int | None = Field(None, ge=1, description="Unset: what the model's positions allow.")
    max_choices: int = Field(8, ge=1, le=128, description="Most completions of one request.")
    max_waiting_jobs: int = Field(1024, ge=1, description="Requests that may wait for workers, over all gateways.")
    max_waiting_tokens: int | None = Field(
        None, ge=1, description="Tokens that waiting requests may ask for, prompts included. Unset: any number."
    )
    worker_wait_s: float = Field(
        30.0, ge=0, description="While no worker serves, requests whose deadline is nearer than this are refused."
    )
    detach_grace_s: float = Field(
        10.0, ge=0, le=3600, description="How long a request whose caller is gone runs on, unless it says so itself."
    )
    retention_s: float = Field(300.0, gt=0, description="How long a request and its answer stay after its end.")
    max_open_chats: int = Field(
        1024,
        ge=1,
        description="Chats that may be open on each process; an eighth more of tenants below their share, "
        "a quarter more if accepted before.",
    )
    max_message_bytes: int = Field(4 * 1024 * 1024, ge=1024, description="Largest request.")
    resume_secret: SecretStr | None = Field(
        None, min_length=16, description="Proves resume tokens; the same on all gateways. Unset: random at each start."
    )
    reflection: bool | None = Field(
        None, description="Whether the server describes its API to callers. Unset: while there are no tenants."
    )
    reuse_port: bool = Field(False, description="Lets several gateways of one machine share a port.")
    redis_wait_s: float = Field(60.0, ge=0, description="How long the start waits for Redis before it fails.")
    drain_delay_s: float = Field(
        0.0, ge=0, description="How long new callers are still served once asked to stop, until balancers have noticed."
    )
    drain_grace_s: float = Field(30.0, ge=0, description="How long open chats may go on after that.")
    failpoints: Annotated[str, AfterValidator(_check_failpoints)] = Field(
        "", description="For tests: where this process dies, hangs or fails, as NAME=ACTION[@TIME],..."
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = Field("text", description="How log lines are written.")
    otlp_endpoint: Annotated[str | None, AfterValidator(_check_endpoint)] = Field(
        default_factory=_standard_endpoint,
        description="Traces go to this OTLP receiver by gRPC: http://HOST:PORT, or https://. Unset: what"
        " OTEL_EXPORTER_OTLP_ENDPOINT says, otherwise there are none.",
    )

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        jwt = (self.jwt_key, self.jwt_issuer, self.jwt_audience)
        if any(jwt) and not all(jwt):
            raise ValueError("--jwt-key, --jwt-issuer and --jwt-audience go together")
        if any(jwt) and self.tenants is None:
            raise ValueError("--jwt-key needs --tenants: a token names one of them")
        return self


def read_settings(arguments: Sequence[str]) -> GatewaySettings:
    """The settings of these command line arguments and the environment; arguments win.

    Raises:
        StartError: with one sentence that names the option that is unknown, missing or wrong.
    """
    try:
        settings = GatewaySettings(_cli_parse_args=list(arguments))  # type: ignore[call-arg]  # The rest is in them.
        refuse_mistyped_variables(os.environ, prefix=_PREFIX, options=GatewaySettings.model_fields)
    except SettingsError as error:
        raise StartError(str(error).removeprefix("error parsing CLI: ")) from error
    except MistypedVariableError as error:
        raise StartError(str(error)) from error
    except ValidationError as error:
        raise StartError(
            "; ".join(_explain(*e["loc"], message=e["msg"], kind=e["type"]) for e in error.errors())
        ) from error
    return settings


def unread_variables() -> list[str]:
    """Environment variables named as options are that are none."""
    return list(unknown_variables(os.environ, prefix=_PREFIX, options=GatewaySettings.model_fields))


def _explain(*location: int | str, message: str, kind: str) -> str:
    if not location:
        return message.removeprefix("Value error, ")  # Of several options together; it names them.
    field = str(location[0])
    flag = f"--{field.replace('_', '-')}"
    if kind == "missing":
        return f"{flag} (or {_PREFIX}{field.upper()}) is required"
    return f"{flag}: {message.removeprefix('Value error, ')}"
