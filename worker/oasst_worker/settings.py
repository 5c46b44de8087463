"""The worker's options: flags, or environment variables named OASST_WORKER_ and the flag. Read once, at the start."""

import os
import re
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from oasst_jobs import ServerAddress
from oasst_jobs.failpoints import parse_failpoints
from oasst_telemetry import (
    LogFormat,
    MistypedVariableError,
    parse_address,
    refuse_mistyped_variables,
    unknown_variables,
)
from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

__all__ = ["FAILPOINTS", "StartError", "WorkerSettings", "parse_device_memory", "read_settings", "unread_variables"]

_PREFIX = "OASST_WORKER_"

# Places in the worker where a test can break it: between a claim and the jobs being taken in, before and after the
# call that logs tokens, before what is left goes back at the end, and at the start of each of the engine's steps.
FAILPOINTS = ("worker.claimed", "worker.pushing", "worker.pushed", "worker.releasing", "worker.stepping")


class StartError(Exception):
    """The worker cannot start; the message is one sentence that says why."""


def _draw_worker_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def _check_address(address: str) -> str:
    parse_address(address)
    return address


def _check_redis_url(url: str) -> str:
    ServerAddress.parse(url)
    return url


def _check_failpoints(text: str) -> str:
    parse_failpoints(text, known=FAILPOINTS)
    return text


def parse_device_memory(text: str) -> dict[str, int]:
    """Bytes by device, of `cuda:0=20GB,cpu=1.5GB`.

    Raises:
        ValueError: it is not written like that.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        parsed = re.fullmatch(r"(cpu|cuda:\d+)=(\d+(?:\.\d+)?)([MG])B", part.strip())
        if not parsed:
            raise ValueError(f"{part.strip()!r} is not like cuda:0=20GB or cpu=500MB")
        device, number, unit = parsed.groups()
        sizes[device] = int(float(number) * {"M": 10**6, "G": 10**9}[unit])
    return sizes


def _check_device_memory(text: str) -> str:
    parse_device_memory(text)
    return text


def _standard_endpoint() -> str | None:
    return os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")


def _check_endpoint(endpoint: str | None) -> str | None:
    if endpoint is not None and not re.fullmatch(r"https?://[^/\s]+/?", endpoint):
        raise ValueError("must be http://HOST:PORT, or https:// for TLS")
    return endpoint


class WorkerSettings(BaseSettings):
    """Holds a model and generates what the queue in Redis asks for."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        cli_prog_name="python -m oasst_worker",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        frozen=True,
    )

    model: str = Field(description="Checkpoint folder or hub id.")
    model_name: str | None = Field(None, description="Name jobs call the model by. Unset: hub id or folder name.")
    convert_bin: Path | None = Field(
        None,
        description="Folder in which a checkpoint of .bin files is kept as safetensors, converted once. Unset: .bin"
        " files are read as they are.",
    )
    redis_url: Annotated[str, AfterValidator(_check_redis_url)] = Field(
        "redis://127.0.0.1:6379/0",
        description="Where the queue is: redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://.",
    )
    queue_shards: int = Field(1, ge=1, le=1024, description="Parts of the queue; the same for all its processes.")
    metrics_listen: Annotated[str, AfterValidator(_check_address)] = Field(
        "127.0.0.1:9465", description="HOST:PORT of /metrics, /healthz and /readyz; port 0 takes a free one."
    )
    worker_id: str = Field(
        default_factory=_draw_worker_id,
        pattern=r"^[A-Za-z0-9._-]{1,128}$",
        description="This process among all workers. Unset: host, process and a random part.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of weights and KV cache. auto: float32 on a CPU, the checkpoint's own on a GPU, but with --offload"
        " bfloat16 for float16.",
    )
    kv_dtype: Literal["auto", "fp8", "int8"] = Field(
        "auto",
        description="Of the KV cache. int8: a quarter of float32's memory; on a CPU. fp8: half of float16's, less"
        " exact; on a GPU. auto: as the weights.",
    )
    quantize: Literal["int8"] | None = Field(
        None,
        description="Weights in 8 bits, a quarter of float32's memory and time to read; on a CPU. Unset: as they are.",
    )
    batch_invariant: bool = Field(
        False,
        description="On a GPU: a choice's tokens do not depend on what runs beside it; prompts take longer. On a CPU"
        " they never do.",
    )
    split: Literal["auto", "none", "tensor", "layers"] = Field(
        "auto",
        description="tensor: every matrix over several processes, a GPU each. layers: whole layers over unequal"
        " devices, in one process. auto: one device if that holds the model, else what fits the GPUs.",
    )
    num_ranks: int | None = Field(
        None, ge=1, le=64, description="Processes of a split model. Unset: one for each GPU; needed on a CPU."
    )
    device_memory: Annotated[str, AfterValidator(_check_device_memory)] = Field(
        "",
        description="With --split layers: memory for weights and KV cache, as cuda:0=20GB,cpu=60GB. Unset: most of what"
        " is free.",
    )
    offload: Literal["none", "cpu", "disk"] = Field(
        "none",
        description="With --split layers: where layers go that the GPUs have no room for; disk: and the CPU. Those on"
        " disk are read in every step.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of one step. Unset: PyTorch's choice.")
    max_sequences: int = Field(32, ge=1, le=1024, description="Choices that are generated at once.")
    kv_tokens: int | None = Field(None, ge=1, description="Positions of KV cache. Unset: what memory allows.")
    step_tokens: int = Field(512, ge=1, description="Tokens computed in one step, prompts and decoding together.")
    speculate: int | None = Field(
        None,
        ge=0,
        le=32,
        description="Tokens guessed ahead for a choice in a step, at most. Where rows are exact the answer stays the"
        " same. On a GPU it also turns off launching the next step ahead. 0: none. Unset: 8 on a CPU whose rows are"
        " exact, otherwise 0.",
    )
    max_steps_ahead: int = Field(32, ge=1, description="Steps the engine may be ahead of the queue.")
    lease_s: float = Field(4.0, ge=0.1, le=120, description="How long a silent worker keeps its jobs.")
    step_limit_s: float = Field(20.0, gt=0, description="A step that takes longer, and 10x the usual, ends the worker.")
    redis_wait_s: float = Field(60.0, ge=0, description="How long the start waits for Redis before it fails.")
    drain_s: float = Field(30.0, ge=0, description="How long running jobs may go on once asked to stop.")
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


def read_settings(arguments: Sequence[str]) -> WorkerSettings:
    """The settings of these command line arguments and the environment; arguments win.

    Raises:
        StartError: with one sentence that names the option that is unknown, missing or wrong.
    """
    try:
        settings = WorkerSettings(_cli_parse_args=list(arguments))  # type: ignore[call-arg]  # The rest is in them.
        refuse_mistyped_variables(os.environ, prefix=_PREFIX, options=WorkerSettings.model_fields)
    except SettingsError as error:
        raise StartError(str(error).removeprefix("error parsing CLI: ")) from error
    except MistypedVariableError as error:
        raise StartError(str(error)) from error
    except ValidationError as error:
        explained = [_explain(str(fault["loc"][0]), fault["msg"], fault["type"]) for fault in error.errors()]
        raise StartError("; ".join(explained)) from error
    return settings


def unread_variables() -> list[str]:
    """Environment variables named as options are that are none."""
    return list(unknown_variables(os.environ, prefix=_PREFIX, options=WorkerSettings.model_fields))


def _explain(field: str, message: str, kind: str) -> str:
    flag = f"--{field.replace('_', '-')}"
    if kind == "missing":
        return f"{flag} (or {_PREFIX}{field.upper()}) is required"
    return f"{flag}: {message.removeprefix('Value error, ')}"
