"""How `oasst up` starts, refuses to start, and stops without leaving anything."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from demo_answers import COINED, MEME
from oasst_cli.up.checkpoint import demo_checkpoint
from oasst_client import Client
from terminal import Terminal
from waiting import wait_until


def oasst_up(*arguments: str, stdin: str = "", folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "oasst_cli", "up", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "TMPDIR": str(folder)},
    )


def test_ctrl_c_stops_everything_and_leaves_nothing(start_up):
    up = start_up("--gateways", "2")
    up.wait_until_serving()
    assert len(up.summary["addresses"]) == 2
    for address in up.summary["addresses"]:
        with Client(address) as client:
            assert client.chat("What is a meme?", temperature=0).text == MEME
    family = up.processes()
    assert len(family) == 5

    assert up.stop(signal.SIGINT) == 0
    assert not any(process.is_running() for process in family)
    assert list(up.temporary.iterdir()) == []


def test_a_split_worker_answers_and_leaves_no_rank_behind(start_up):
    up = start_up("--split", "tensor", "--num-ranks", "2")
    up.wait_until_serving()
    with Client(up.address) as client:
        assert client.chat("What is a meme?", temperature=0).text == MEME
    family = up.processes()
    assert any("oasst_worker.runtime.follow" in process.cmdline() for process in family)
    assert up.stop(signal.SIGINT) == 0
    assert not any(process.is_running() for process in family)


def test_a_gateway_of_several_processes_has_one_address_and_one_page_and_leaves_nothing(start_up):
    up = start_up("--gateway-processes", "2")
    up.wait_until_serving()
    [gateway] = [each for each in up.summary["processes"] if each["role"] == "gateway"]
    assert len(psutil.Process(gateway["pid"]).children()) == 2
    with Client(up.address) as client:
        assert client.chat("What is a meme?", temperature=0).text == MEME
    with urllib.request.urlopen(f"http://{gateway['metrics']}/metrics", timeout=10) as page:
        assert b"oasst_gateway_processes " in page.read()
    family = up.processes()
    assert up.stop(signal.SIGINT) == 0
    assert not any(process.is_running() for process in family)
    assert list(up.temporary.iterdir()) == []


def test_what_has_no_flag_is_set_by_its_variable(start_up, short_folder, monkeypatch):
    monkeypatch.setenv("OASST_GATEWAY_METRICS_LISTEN", f"unix:{short_folder}/metrics")
    monkeypatch.setenv("OASST_WORKER_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3")  # There are none such here.
    up = start_up("--workers", "2")
    up.wait_until_serving()
    assert f"unix:{short_folder}/metrics" in up.summary["metrics"]
    workers = [psutil.Process(each["pid"]) for each in up.summary["processes"] if each["role"] == "worker"]
    assert not any("--threads" in worker.cmdline() for worker in workers)
    assert [worker.environ()["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["7", "3"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_starts_leaves_nothing_either(start_up, number):
    up = start_up()
    # Itself, the queue, and at least one that waits for it.
    wait_until(lambda: up.process.poll() is not None or len(up.processes()) >= 3)
    assert up.process.poll() is None, up.stderr()
    family = up.processes()
    assert up.stop(number) == 0
    assert not any(process.is_running() for process in family)
    assert list(up.temporary.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process die with its parent")
def test_children_die_even_with_a_supervisor_that_is_killed(start_up):
    up = start_up()
    up.wait_until_serving()
    children = up.processes()[1:]
    up.process.kill()
    up.process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_a_kept_state_directory_keeps_logs_and_queue_and_serves_one_stack_at_a_time(start_up, tmp_path):
    state = tmp_path / "state"
    up = start_up("--state-dir", str(state))
    up.wait_until_serving()
    refused = oasst_up("--listen", "127.0.0.1:0", "--state-dir", str(state), folder=up.temporary)
    assert refused.returncode == 1
    assert "in use by another" in refused.stderr
    assert up.stop(signal.SIGTERM) == 0
    assert {path.name for path in (state / "logs").iterdir()} == {"valkey.log", "worker-0.log", "gateway-0.log"}
    assert list((state / "valkey").rglob("*.aof"))
    assert not (state / "valkey.sock").exists()


def test_piped_questions_are_answered_on_stdout_and_then_everything_stops(short_folder):
    result = oasst_up("--chat", stdin="What is a meme?\nAnd who coined the word?\n", folder=short_folder)
    assert result.stdout == f"{MEME}\n{COINED}\n"
    assert result.returncode == 0
    assert list(short_folder.iterdir()) == []


def test_ctrl_c_in_the_chat_is_for_the_chat_alone(short_folder):
    with contextlib.closing(Terminal("up", "--chat", environment={"TMPDIR": str(short_folder)})) as terminal:
        terminal.read_until("\n> ")
        terminal.type("\x03\n")  # The line break wakes `input` if the signal came just before it slept.
        terminal.read_until("\n> ")
        terminal.type("What is a meme?\n")
        terminal.read_until(MEME)
        terminal.read_until("\n> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    assert list(short_folder.iterdir()) == []


def test_a_bad_option_ends_the_run_with_one_sentence(short_folder):
    result = oasst_up("--dtype", "float99", "--listen", "127.0.0.1:0", folder=short_folder)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "dtype" in result.stderr.splitlines()[-1]


def test_a_corrupt_shard_ends_the_run_and_is_named(tmp_path, short_folder):
    model = tmp_path / "model"
    shutil.copytree(demo_checkpoint(), model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    result = oasst_up("--model", str(model), "--listen", "127.0.0.1:0", folder=short_folder)
    assert result.returncode == 2
    assert "model.safetensors" in result.stderr.splitlines()[-1]
    assert list(short_folder.iterdir()) == []
