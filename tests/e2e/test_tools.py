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

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "client"
TOUR = (DOCS / "tour.md").read_text()
BIN = Path(sys.executable).parent
SESSIONS = re.findall(r"```console\n(.*?)```", TOUR, re.DOTALL)
STEPS = [step for session in SESSIONS for step in re.split(r"^\$ ", session, flags=re.MULTILINE) if step]
# Those that talk to a service; the others show how a connection or a test is written.
PROGRAMS = [
    program
    for page in (ROOT / "README.md", DOCS / "python.md")
    for program in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if "\nwith " in program or "asyncio.run(" in program
]


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
    if "..." in expected:
        parts = map(re.escape, re.split(r"\s*\.\.\.\s*", shape_of(expected)))
        assert re.fullmatch(".*".join(parts), shape_of(result.stdout))
    else:
        assert result.stdout == expected


def shape_of(text: str) -> str:
    """The text with every number and every gap the same: both differ from run to run."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.:]*\d|\d", "0", text))


def test_the_tour_has_something_to_show():
    assert len(STEPS) >= 6


def test_the_tour_in_python_is_true(environment, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", TOUR, re.DOTALL)
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("Richard Dawkins coined it"), result.stderr
    assert len(json.loads((tmp_path / "memes.json").read_text())["messages"]) == 4


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_programs_of_the_documentation_run(program, up, environment, tmp_path):
    command = [sys.executable, "-c", program.replace("127.0.0.1:50051", up.address)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_there_are_programs_in_the_documentation():
    assert len(PROGRAMS) >= 7


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


def test_buf_curl_speaks_to_a_gateway_that_describes_itself(up, environment):
    (commands,) = re.findall(r"```sh\n(buf curl.*?)```", (DOCS / "other-languages.md").read_text(), re.DOTALL)
    script = commands.replace("127.0.0.1:50051", up.address)
    result = subprocess.run(
        ["/bin/bash", "-e", "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    answer, end = json.JSONDecoder().raw_decode(result.stdout)
    assert answer["choices"][0]["text"].startswith("A meme is an idea")
    assert "oasst.v1.ChatService/WatchChat" in result.stdout[end:].split()
