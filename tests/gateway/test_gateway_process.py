"""`python -m oasst_gateway` as whoever starts it sees it: one line when it serves, one sentence when it cannot."""

import asyncio
import functools
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from gateway_harness import ask, read_text, rule_text
from oasst.v1 import chat_pb2, chat_pb2_grpc
from oasst_gateway.errors import StartError
from oasst_gateway.settings import read_settings, unread_variables
from serving_line import read_serving_line
from waiting import until, wait_until


class GatewayProcess:
    """A gateway that someone has started, and what it says."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log

    def serving(self) -> dict[str, str]:
        """What it told once it served."""
        return read_serving_line(self.process, self._log)

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Its exit code, and what it had still to say on stdout and all it said on stderr, once it has ended."""
        stdout, _ = self.process.communicate(timeout=20)
        return self.process.returncode, stdout, self.stderr()

    def stderr(self) -> str:
        return self._log.read_text()


@pytest.fixture
def start_gateway_process(tmp_path: Path) -> Iterator[Callable[..., GatewayProcess]]:
    """Starts a gateway with further options; gone at the end of the test."""
    with ExitStack() as exits:

        def start(*arguments: str) -> GatewayProcess:
            log = tmp_path / "gateway.log"
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "oasst_gateway", "--listen", "127.0.0.1:0"),
                    *("--metrics-listen", "127.0.0.1:0", *arguments),
                ],
                stdout=subprocess.PIPE,
                stderr=exits.enter_context(log.open("w")),
                text=True,
            )
            exits.callback(process.communicate)
            exits.callback(process.kill)
            return GatewayProcess(process, log)

        yield start


async def test_a_process_serves_until_it_is_told_to_stop(
    start_gateway_process: Callable[..., GatewayProcess], checkpoint: Path, valkey_url: str, worker: object
) -> None:
    gateway = start_gateway_process(
        *("--model", str(checkpoint), "--model-name", "tiny", "--gateway-id", "g-1", "--redis-url", valkey_url)
    )
    serving = await asyncio.to_thread(gateway.serving)
    assert list(serving) == ["event", "role", "id", "listen", "metrics"]
    assert (serving["event"], serving["role"], serving["id"]) == ("serving", "gateway", "g-1")
    async with grpc.aio.insecure_channel(serving["listen"]) as channel:
        request = ask("my secret prompt", request_id="r-1")
        assert await read_text(chat_pb2_grpc.ChatServiceStub(channel).ChatStream(request)) == rule_text(4)
    gateway.send_signal(signal.SIGTERM)
    exit_code, stdout, stderr = gateway.end()
    assert exit_code == 0, stderr
    assert stdout == ""
    assert [word for word in ("accepted", "finished") if f"{word} job_id=" in stderr] == ["accepted", "finished"]
    assert "secret prompt" not in stderr


async def test_a_second_signal_ends_it_at_once(
    start_gateway_process: Callable[..., GatewayProcess], checkpoint: Path, valkey_url: str
) -> None:
    gateway = start_gateway_process("--model", str(checkpoint), "--redis-url", valkey_url)
    serving = await asyncio.to_thread(gateway.serving)
    async with grpc.aio.insecure_channel(serving["listen"]) as channel:
        call = chat_pb2_grpc.ChatServiceStub(channel).ChatStream(ask("Hello!"))
        assert isinstance(await call.read(), chat_pb2.ChatEvent)
        gateway.send_signal(signal.SIGINT)
        await until(lambda: asyncio.to_thread(_is_leaving, serving["metrics"]))
        assert gateway.process.poll() is None
        gateway.send_signal(signal.SIGINT)
        exit_code, _, stderr = gateway.end()
    assert exit_code == 1
    assert stderr.splitlines()[-1] == "oasst_gateway: asked to stop twice, open chats were cut off"


def _is_leaving(metrics: str) -> bool:
    """The gateway answers, and says that it will soon be gone."""
    try:
        with urllib.request.urlopen(f"http://{metrics}/readyz", timeout=10):
            return False
    except urllib.error.HTTPError:
        return True


def test_a_hangup_reads_its_files_anew_and_ends_nothing(
    start_gateway_process: Callable[..., GatewayProcess], checkpoint: Path, valkey_url: str, tmp_path: Path
) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text('[[tenants]]\nname = "one"\n')
    gateway = start_gateway_process("--model", str(checkpoint), "--redis-url", valkey_url, "--tenants", str(tenants))
    gateway.serving()
    for text, told in (
        ("[[tenants]", "reload failed"),
        ('[[tenants]]\nname = "two"\n', "reloaded tenants and certificate"),
    ):
        tenants.write_text(text)
        gateway.send_signal(signal.SIGHUP)
        wait_until(functools.partial(_has_said, gateway, told), told)
    gateway.send_signal(signal.SIGTERM)
    exit_code, _, stderr = gateway.end()
    assert exit_code == 0, stderr


def _has_said(gateway: GatewayProcess, words: str) -> bool:
    return words in gateway.stderr()


def test_a_model_that_is_not_there_stops_the_start_with_one_sentence(
    start_gateway_process: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    exit_code, _, stderr = start_gateway_process("--model", str(tmp_path)).end()
    assert exit_code == 2
    assert stderr.count("\n") == 1
    assert f"cannot read {tmp_path}/tokenizer.json" in stderr


def test_redis_that_is_not_there_stops_the_start_with_one_sentence(
    start_gateway_process: Callable[..., GatewayProcess], checkpoint: Path
) -> None:
    gateway = start_gateway_process(
        *("--model", str(checkpoint), "--redis-url", "unix:///nowhere.sock", "--redis-wait-s", "0.1")
    )
    exit_code, _, stderr = gateway.end()
    assert exit_code == 1
    assert stderr.splitlines()[-1] == "oasst_gateway: Redis did not answer within 0.1 s, which is --redis-wait-s"
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
        (["--model", "m", "--durability", "LOCAL"], "--durability: Input should be 'local' or 'replicated'"),
    ],
)
def test_a_bad_option_is_named(arguments: list[str], sentence: str) -> None:
    with pytest.raises(StartError) as refused:
        read_settings(arguments)
    assert str(refused.value) == sentence


def test_a_mistyped_variable_is_named_with_the_one_that_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OASST_GATEWAY_MAX_CHOICE", "3")
    monkeypatch.setenv("OASST_GATEWAY_PORT_50051_TCP", "tcp://10.0.0.1:50051")
    with pytest.raises(StartError, match="MAX_CHOICE is no option; did you mean OASST_GATEWAY_MAX_CHOICES"):
        read_settings(["--model", "m"])
    monkeypatch.delenv("OASST_GATEWAY_MAX_CHOICE")
    read_settings(["--model", "m"])
    assert unread_variables() == ["OASST_GATEWAY_PORT_50051_TCP"]


def test_options_come_from_the_environment_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OASST_GATEWAY_MODEL", "from-environment")
    monkeypatch.setenv("OASST_GATEWAY_MAX_CHOICES", "3")
    settings = read_settings(["--max-choices", "2", "--no-reflection"])
    assert (settings.model, settings.max_choices, settings.reflection) == ("from-environment", 2, False)
