"""`python -m oasst_gateway` as whoever starts it sees it: one line when it serves, one sentence when it cannot."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from gateway_harness import ask, read_text, text_of
from oasst.v1 import chat_pb2, chat_pb2_grpc
from oasst_gateway.errors import StartError
from oasst_gateway.settings import read_settings


@contextmanager
def gateway_process(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "oasst_gateway",
            "--listen",
            "127.0.0.1:0",
            "--metrics-listen",
            "127.0.0.1:0",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_a_process_serves_until_it_is_told_to_stop(checkpoint: Path, valkey_url: str, worker: object) -> None:
    with gateway_process(
        "--model", str(checkpoint), "--model-name", "tiny", "--gateway-id", "g-1", "--redis-url", valkey_url
    ) as process:
        serving = json.loads(process.stdout.readline())
        assert list(serving) == ["event", "role", "id", "listen", "metrics"]
        assert (serving["event"], serving["role"], serving["id"]) == ("serving", "gateway", "g-1")
        async with grpc.aio.insecure_channel(serving["listen"]) as channel:
            request = ask("my secret prompt", request_id="r-1")
            assert await read_text(chat_pb2_grpc.ChatServiceStub(channel).ChatStream(request)) == text_of(4)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=20)
        assert process.returncode == 0, stderr
        assert stdout == ""
        assert [word for word in ("accepted", "finished") if f"{word} job_id=" in stderr] == ["accepted", "finished"]
        assert "secret" not in stderr


async def test_a_second_signal_ends_it_at_once(checkpoint: Path, valkey_url: str) -> None:
    with gateway_process("--model", str(checkpoint), "--redis-url", valkey_url) as process:
        serving = json.loads(process.stdout.readline())
        async with grpc.aio.insecure_channel(serving["listen"]) as channel:
            call = chat_pb2_grpc.ChatServiceStub(channel).ChatStream(ask("Hello!"))
            assert isinstance(await call.read(), chat_pb2.ChatEvent)
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.3)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=20)
        assert process.returncode == 1
        assert stderr.splitlines()[-1] == "oasst_gateway: asked to stop twice, open chats were cut off"


def test_a_hangup_reads_its_files_anew_and_ends_nothing(checkpoint: Path, valkey_url: str, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text('[[tenants]]\nname = "one"\n')
    with gateway_process("--model", str(checkpoint), "--redis-url", valkey_url, "--tenants", str(tenants)) as process:
        process.stdout.readline()
        told = []
        for text in ("[[tenants]", '[[tenants]]\nname = "two"\n'):
            tenants.write_text(text)
            process.send_signal(signal.SIGHUP)
            told.append(next(line for line in process.stderr if "reload" in line))
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, stderr
    assert "reload failed" in told[0]
    assert "reloaded tenants and certificate" in told[1]


def test_a_model_that_is_not_there_stops_the_start_with_one_sentence(tmp_path: Path) -> None:
    with gateway_process("--model", str(tmp_path)) as process:
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2
    assert stderr.count("\n") == 1
    assert f"cannot read {tmp_path}/tokenizer.json" in stderr


def test_redis_that_is_not_there_stops_the_start_with_one_sentence(checkpoint: Path) -> None:
    with gateway_process(
        "--model", str(checkpoint), "--redis-url", "unix:///nowhere.sock", "--redis-wait-s", "0.1"
    ) as process:
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert stderr.splitlines()[-1] == "oasst_gateway: Redis did not answer within 0.1 s"
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "m", "--modle-name", "x"], "unrecognized arguments: --modle-name x"),
        ([], "--model (or OASST_GATEWAY_MODEL) is required"),
        (["--model", "m", "--listen", "here"], "--listen: must be HOST:PORT with a port from 0 to 65535"),
        (["--model", "m", "--listen", "host:70000"], "--listen: must be HOST:PORT with a port from 0 to 65535"),
        (
            ["--model", "m", "--redis-url", "http://x"],
            "--redis-url: must begin with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
            " (rediss+... for TLS)",
        ),
        (["--model", "m", "--max-choices", "0"], "--max-choices: Input should be greater than or equal to 1"),
        (["--model", "m", "--log-level", "loud"], "--log-level: Input should be 'debug', 'info', 'warning' or 'error'"),
    ],
)
def test_a_bad_option_is_named(arguments: list[str], sentence: str) -> None:
    with pytest.raises(StartError) as refused:
        read_settings(arguments)
    assert str(refused.value) == sentence


def test_options_come_from_the_environment_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OASST_GATEWAY_MODEL", "from-environment")
    monkeypatch.setenv("OASST_GATEWAY_MAX_CHOICES", "3")
    settings = read_settings(["--max-choices", "2", "--no-reflection"])
    assert (settings.model, settings.max_choices, settings.reflection) == ("from-environment", 2, False)
