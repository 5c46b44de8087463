"""The tools people reach for, on a whole service."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from oasst_cli.report.document import Report
from oasst_client import Client, Conversation

TOUR = (Path(__file__).parents[2] / "docs" / "client" / "tour.md").read_text()
BIN = Path(sys.executable).parent
SESSIONS = re.findall(r"```console\n(.*?)```", TOUR, re.DOTALL)
STEPS = [step for session in SESSIONS for step in re.split(r"^\$ ", session, flags=re.MULTILINE) if step]


@pytest.fixture
def environment(up, tmp_path) -> dict[str, str]:
    """That of a person whose service is this one."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    config = str(tmp_path / "none.toml")
    return {**os.environ, "PATH": path, "OASST_ADDRESS": up.address, "OASST_CONFIG": config, "COLUMNS": "100"}


@pytest.mark.parametrize("step", STEPS)
def test_the_tour_is_true(step, environment, tmp_path):
    command, _, expected = step.partition("\n")
    result = subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert expected == "...\n" or result.stdout == expected


def test_the_tour_has_something_to_show():
    assert len(STEPS) >= 6


def test_the_tour_in_python_is_true(environment, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", TOUR, re.DOTALL)
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("Richard Dawkins coined it"), result.stderr
    assert len(json.loads((tmp_path / "memes.json").read_text())["messages"]) == 4


def test_a_conversation_counts_its_tokens_as_the_service_does(up):
    with Client(up.address) as client:
        conversation = Conversation(client, system="Be brief.", temperature=0)
        conversation.ask("What is a meme?")
        (question,) = client.tokenize("And who – é – coined the word?")
        completion = conversation.fork().ask("And who – é – coined the word?")
        # Behind the turns comes one more, between the token that opens it and end-of-text.
        assert completion.usage.prompt_tokens == conversation.num_tokens() + len(question) + 2


def test_a_report_is_made_of_real_answers_and_comes_out_the_same_again(up, environment, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('"What is a meme?"\n"Why do owls hoot?"\n')
    for name in ("a.json", "b.json"):
        command = [BIN / "oasst", "report", "prompts.jsonl", "--out", name, "--json"]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=100)
    made = Report.read(tmp_path / "a.json")
    assert made.prompts == Report.read(tmp_path / "b.json").prompts
    greedy = made.outputs_of("greedy")[0]
    assert greedy.startswith("A meme is an idea")
    assert greedy.endswith("<|endoftext|>")


def test_buf_curl_speaks_to_a_gateway_that_describes_itself(up):
    request = {
        "conversation": {"messages": [{"role": "ROLE_USER", "content": "What is a meme?"}]},
        "sampling": {"temperature": 0},
    }
    command = [BIN / "buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", json.dumps(request)]
    url = f"http://{up.address}/oasst.v1.ChatService/Chat"
    result = subprocess.run([*command, url], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["choices"][0]["text"].startswith("A meme is an idea")
