"""The `oasst` command as people and scripts use it: real processes, a real terminal where it matters."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from oasst_cli.__main__ import app
from oasst_cli.exits import exit_of
from oasst_client import InternalError, InvalidArgumentError, OverloadedError, ProfileError, UnauthenticatedError
from oasst_client.testing import FakeServer
from terminal import Terminal
from typer.testing import CliRunner
from waiting import wait_until

TEXT = "An idea that spreads."


def oasst(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "oasst_cli", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60)


def run(*arguments: str, stdin: str = ""):
    """The command in this process, where what it does outside of it does not matter."""
    return CliRunner().invoke(app, arguments, input=stdin, env={"COLUMNS": "200"})


def test_each_piped_line_is_answered_and_only_the_answers_are_printed(server):
    result = oasst("chat", "--address", server.address, stdin="What is a meme?\n\n  And who coined it?")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{TEXT}\n{TEXT}\n", "")
    asked = [message.content for message in server.requests[1].conversation.messages]
    assert asked == ["What is a meme?", TEXT, "And who coined it?"]


def test_a_question_that_fails_is_told_on_stderr_and_in_the_exit_code_and_the_next_is_answered(server):
    def script(request, context):
        if len(server.requests) == 1:
            server.refuse(context, 8, "the queue is full", server.error_info("QUEUE_FULL"))
        yield from server.answer(request, context)

    server.script = script
    result = oasst("chat", "--address", server.address, stdin="What is a meme?\nWhat is a meme?\n")
    assert (result.returncode, result.stdout) == (1, f"{TEXT}\n")
    assert result.stderr == "error: the queue is full (QUEUE_FULL)\n"


def test_options_of_the_command_line_reach_the_request(server):
    options = ["--preset", "k50", "--temperature", "0", "--max-new-tokens", "7", "--seed", "3", "--system", "Be brief."]
    assert run("chat", "--address", server.address, *options, stdin="Hi\n").exit_code == 0
    request = server.requests[0]
    assert (request.sampling.preset, request.sampling.temperature, request.sampling.seed) == ("k50", 0, 3)
    assert request.limits.max_new_tokens == 7
    assert not request.sampling.HasField("top_p")
    assert request.conversation.messages[0].content == "Be brief."


def test_bytes_that_are_no_text_are_a_question_like_any_other(server):
    command = [sys.executable, "-m", "oasst_cli", "chat", "--address", server.address]
    result = subprocess.run(command, input=b"\xff\xfe?\n", capture_output=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, TEXT.encode() + b"\n")


def test_complete_answers_one_question(server):
    assert run("complete", "What is a meme?", "--address", server.address).stdout == f"{TEXT}\n"
    result = run("complete", "--raw", "--json", "--address", server.address, stdin="<|prompter|>Hi")
    assert json.loads(result.stdout)["choices"][0]["text"] == TEXT
    assert server.requests[1].prompt == "<|prompter|>Hi"


@pytest.mark.parametrize("command", ["complete", "tokenize"])
def test_what_is_no_utf_8_is_unusable_and_told_in_a_line(command):
    """There is no service: nothing is asked before the text is read."""
    start = [sys.executable, "-m", "oasst_cli", command, "--address", "127.0.0.1:1"]
    environment = {**os.environ, "COLUMNS": "200"}
    piped = subprocess.run(start, input=b"\xff\xfe", capture_output=True, timeout=60, env=environment)
    given = subprocess.run([*start, b"\xff\xfe"], capture_output=True, timeout=60, env=environment)
    assert (piped.returncode, given.returncode) == (2, 2)
    assert b"standard input is not UTF-8" in piped.stderr
    assert b"the text is not UTF-8" in given.stderr


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_ctrl_c_ends_an_answer_without_an_exception_inside_grpc(server, flags):
    def endless(request, context):
        yield server.accepted(request)
        yield server.delta(0, "Well, ")
        wait_until(lambda: signal.getsignal(signal.SIGINT) is not signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
        server.ended.wait(timeout=30)

    server.script = endless
    result = run("complete", "Tell me everything.", *flags, "--address", server.address)
    assert (result.exit_code, result.stderr) == (130, "")
    assert server.cancelled == [server.requests[0].request_id]


@pytest.mark.parametrize(
    "arguments",
    [
        ["complete", "Hi", "--model"],
        ["complete", "Hi", "--preset"],
        ["tokenize", "Hi", "--model"],
        ["chat", "--system"],
        ["cancel"],
        ["cancel", "some-id", "--resume-token"],
    ],
)
def test_an_option_that_is_no_utf_8_is_unusable_and_told_in_a_line(arguments):
    result = run(*arguments, "\udcff", "--address", "127.0.0.1:1")
    assert result.exit_code == 2
    assert "is not UTF-8" in result.stderr.splitlines()[-1]


def test_complete_tells_the_kind_of_failure_by_its_exit_code():
    kinds = {
        2: InvalidArgumentError("no", code="INVALID_ARGUMENT", reason="INVALID_FIELD"),
        4: OverloadedError("full", code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL"),
        5: UnauthenticatedError("who?", code="UNAUTHENTICATED", reason="NO_KEY"),
        1: InternalError("broken", code="INTERNAL", reason="NUMERIC"),
    }
    with FakeServer(*kinds.values()) as server:
        asked = [run("complete", "Hi", "--address", server.address) for _ in kinds]
    assert [exit_of(each.exception) for each in asked] == list(kinds)


def test_cancel_ends_a_request_and_tells_its_state(server):
    assert run("cancel", "some-id", "--address", server.address).stdout == "cancelled\n"
    told = json.loads(run("cancel", "some-id", "--json", "--address", server.address).stdout)
    assert told == {"request_id": "some-id", "state": "cancelled"}


def test_tokenize_shows_pieces_ids_and_their_number():
    with FakeServer() as server:
        shown = run("tokenize", "What is\na meme?", "--address", server.address).stdout
        assert shown.startswith("What is↵\na meme?\n")
        assert shown.endswith("4 tokens\n")
        told = json.loads(run("tokenize", "a b", "--json", "--address", server.address).stdout)
        assert (told["num_tokens"], told["pieces"]) == (2, ["a", " b"])
        text = "<|prompter|>Hi<|endoftext|>"
        assert run("tokenize", text, "--count", "--control-tokens", "--address", server.address).stdout == "3\n"


def test_a_profile_tells_address_and_key_and_its_key_does_not_go_elsewhere(server, tmp_path, monkeypatch):
    path = tmp_path / "profiles.toml"
    path.write_text(f"[default]\naddress = '{server.address}'\napi_key = 'secret'\n")
    monkeypatch.setenv("OASST_CONFIG", str(path))
    assert run("complete", "Hi").exit_code == 0
    assert run("complete", "Hi", "--address", server.address).exit_code == 0
    monkeypatch.setenv("OASST_PROFILE", "")  # As good as not set.
    assert run("complete", "Hi", "--address", server.address).exit_code == 0
    assert [each.get("authorization") for each in server.metadata] == ["Bearer secret", None, None]
    assert run("complete", "Hi", "--profile", "work").exception.__class__ is ProfileError


def test_the_shell_can_complete_the_commands():
    environment = {**os.environ, "_OASST_COMPLETE": "complete_bash", "COMP_WORDS": "oasst to", "COMP_CWORD": "1"}
    command = [str(Path(sys.executable).parent / "oasst")]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout
    assert set(told.split()) == {"top", "tokenize"}


def test_models_lists_what_is_served(server):
    assert "tiny" in run("models", "--address", server.address).stdout
    assert json.loads(run("models", "--json", "--address", server.address).stdout)["name"] == "tiny"


def test_a_service_that_is_not_there_is_one_line_on_stderr():
    result = oasst("models", "--address", "127.0.0.1:1")
    assert result.returncode == 3
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["up", "--sped"], "--sped"),
        (["up", "--workers", "0"], "--workers"),
        (["up", "--listen", "nowhere"], "--listen"),
        (["up", "--listen", "127.0.0.1:65535", "--gateways", "2"], "--listen"),
        (["up", "--json", "--chat"], "--chat"),
        (["chat", "--temperature", "warm"], "--temperature"),
        (["chat", "--seed", "-1"], "--seed"),
        (["top", "--interval", "inf"], "--interval"),
        (["bench", "--rate", "inf"], "--rate"),
        (["bench", "--rate", "nan"], "--rate"),
        (["bench", "--burstiness", "inf"], "--burstiness"),
    ],
)
def test_a_bad_option_is_exit_code_2_and_named(arguments, option):
    result = run(*arguments)
    assert result.exit_code == 2
    assert option in result.stderr.splitlines()[-1]


def test_one_address_for_the_metrics_of_several_gateways_is_exit_code_2(monkeypatch):
    monkeypatch.setenv("OASST_GATEWAY_METRICS_LISTEN", "127.0.0.1:9464")
    result = run("up", "--gateways", "2")
    assert result.exit_code == 2
    assert "OASST_GATEWAY_METRICS_LISTEN is one address, not 2" in result.stderr


@pytest.mark.parametrize("kind", ["dumb", "xterm-256color"])
def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(server, kind):
    def endless(request, context):
        yield server.accepted(request)
        yield server.delta(0, "Well, ")
        server.ended.wait(timeout=30)

    server.script = endless
    with contextlib.closing(Terminal("chat", "--address", server.address, kind=kind)) as terminal:
        terminal.read_until("> ")
        terminal.type("Tell me everything.\n")
        terminal.read_until("Well,")
        terminal.type("\x03")
        terminal.read_until("[stopped]")
        assert server.ended.wait(timeout=5)

        server.script = None
        terminal.read_until("> ")
        terminal.type("What is a meme?\n")
        terminal.read_until(TEXT)
        # The answer that was stopped is no part of the conversation.
        assert len(server.requests[1].conversation.messages) == 1

        terminal.read_until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=10) == 0


def test_on_a_terminal_ctrl_c_stops_a_command_and_the_conversation_goes_on(server):
    is_asked = threading.Event()

    def hold(context):
        is_left = threading.Event()
        context.add_callback(is_left.set)
        is_asked.set()
        is_left.wait(timeout=30)

    server.on_tokenize = hold
    with contextlib.closing(Terminal("chat", "--address", server.address)) as terminal:
        terminal.read_until("> ")
        terminal.type("What is a meme?\n")
        terminal.read_until("> ")
        terminal.type("/tokens\n")
        assert is_asked.wait(timeout=30)
        terminal.type("\x03")
        terminal.read_until("> ")
        terminal.type("And who coined the word?\n")
        terminal.read_until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=10) == 0
    assert len(server.requests[1].conversation.messages) == 3
