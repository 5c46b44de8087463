"""The command's documentation names everything there is."""

from pathlib import Path

import pytest
import typer.main
from oasst_cli.__main__ import app
from oasst_cli.exits import Exit

DOCS = Path(__file__).parents[2] / "docs" / "client"
COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_in_the_reference(name):
    section = (DOCS / "command-reference.md").read_text().partition(f"## `oasst {name}`")[2].partition("\n## ")[0]
    options = {option for each in COMMANDS[name].params for option in each.opts if option.startswith("--")}
    missing = {option for option in options if f"`{option}" not in section}
    assert not missing, "run `make docs`"
    assert all(each.help for each in COMMANDS[name].params)


def test_no_summary_is_cut_in_the_list_of_commands():
    assert [name for name, command in COMMANDS.items() if command.get_short_help_str().endswith("...")] == []


def test_every_command_and_exit_code_is_explained():
    text = (DOCS / "command.md").read_text()
    assert all(f"| `{name}` |" in text for name in COMMANDS)
    assert all(f"| {code.value} |" in text for code in Exit)
