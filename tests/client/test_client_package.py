"""The package as a whole: what it exports, and that its examples are true."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import oasst_cli
import oasst_client
import pytest

MODULES = [
    module.name
    for package in (oasst_client, oasst_cli)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
] + ["oasst_client"]
FINDER = doctest.DocTestFinder(exclude_empty=True)


def examples_in(module_name: str) -> list[doctest.DocTest]:
    return [test for test in FINDER.find(importlib.import_module(module_name)) if test.examples]


WITH_EXAMPLES = [name for name in MODULES if examples_in(name)]


def test_the_command_without_its_packages_tells_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from oasst_cli.entry import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: oasst needs typer: pip install '.[cli]' in a clone of oasst-serve\n"


def test_all_names_exactly_what_is_imported_from_the_modules_beside():
    modules = {name.removeprefix("oasst_client.") for name in sys.modules}
    public = {name for name in vars(oasst_client) if not name.startswith("_") and name not in modules}
    assert sorted(oasst_client.__all__) == sorted(public)


@pytest.mark.parametrize("module_name", WITH_EXAMPLES)
def test_examples_in_docstrings_are_true(module_name, server, client):
    module = importlib.import_module(module_name)
    names = {"client": client, "address": server.address}
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0


def test_there_are_examples_to_check():
    assert sum(len(examples_in(name)) for name in WITH_EXAMPLES) >= 8
