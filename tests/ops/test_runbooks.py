"""What a runbook tells somebody to look at or to type is there."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from oasst_cli.__main__ import app
from oasst_gateway.settings import GatewaySettings
from oasst_jobs.__main__ import main as oasst_jobs
from oasst_worker.settings import WorkerSettings
from typer.main import get_command

from observe.dashboards import DASHBOARDS
from observe.queries import read_rules

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "operations" / "runbooks.md").read_text()
SOURCE = "".join(path.read_text() for part in ("jobs", "gateway", "worker") for path in (ROOT / part).rglob("*.py"))


def quoted(pattern: str) -> list[str]:
    """What stands in backquotes and is of this form; there is some."""
    found = re.findall(rf"`({pattern})`", TEXT)
    assert found
    return found


def test_panels_that_are_named_are_on_their_dashboard() -> None:
    named = re.findall(r"(Service|Queue|Workers), \"([^\"]+)\"", TEXT)
    assert len(named) >= 5
    panels = {dashboard.name.title(): {panel.title for panel in dashboard.panels} for dashboard in DASHBOARDS}
    for dashboard, panel in named:
        assert panel in panels[dashboard], f"{dashboard}, {panel}"


def test_runbooks_lead_to_runbooks_that_exist() -> None:
    assert set(re.findall(r"\bOasst\w+", TEXT)) == {rule.name for rule in read_rules() if rule.is_alert}


def test_reasons_and_log_lines_are_those_that_are_told() -> None:
    for reason in quoted(r"(?:QUEUE_|NO_W|TOO_|DEAD)[A-Z_]+"):
        assert f'"{reason}"' in SOURCE, reason
    for line in quoted(r"failed rpc=|job failed|a step has been in progress|the queue is away"):
        assert line in SOURCE, line


def test_options_are_those_that_gateways_and_workers_have() -> None:
    options = {name.replace("_", "-") for name in {**GatewaySettings.model_fields, **WorkerSettings.model_fields}}
    # Redis's own settings, among others, have such names too.
    for option in quoted(r"(?:max|lease|kv|retention|drain)-[a-z-]+"):
        assert option in options | {"maxmemory-policy"}, option


def test_commands_are_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]  # a group has them
    named = re.findall(r"(?<![\w/-])oasst ([a-z]+)(?: (--[a-z]+))?", TEXT)
    assert len(named) >= 3
    for command, option in named:
        assert command in commands, command
        assert not option or option in {each for parameter in commands[command].params for each in parameter.opts}
    for command in set(re.findall(r"python -m oasst_jobs ([a-z]+)", TEXT)):
        with pytest.raises(SystemExit) as ended:
            oasst_jobs([command, "--help"])
        assert ended.value.code == 0
        assert "--redis-url" in capsys.readouterr().out


def test_dead_letters_are_looked_for_in_all_shards() -> None:
    [command] = re.findall(r"on gateway '(python -m oasst_jobs dead .*?)'", TEXT, re.DOTALL)
    for environment, shards in (({}, "1"), ({"OASST_GATEWAY_QUEUE_SHARDS": "8"}, "8")):
        url = {"OASST_GATEWAY_REDIS_URL": "redis://queue:6379/0", "PATH": os.environ["PATH"]}
        shown = subprocess.run(["sh", "-c", f"echo {command}"], env=url | environment, capture_output=True, text=True)
        assert shown.stdout.split()[-4:] == ["--redis-url", "redis://queue:6379/0", "--queue-shards", shards]


def test_what_can_be_pasted_is_shell() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
        checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
