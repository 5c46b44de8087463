"""The pages a person reads lead to what is there, and say what is so."""

import re
import runpy
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from oasst_gateway.tenants import Tenant, Tenants
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DECISIONS = ROOT / "docs" / "decisions"
PAGES = sorted(
    page for pattern in ("*.md", "docs/**/*.md", "helm/**/*.md", "bench/**/*.md") for page in ROOT.glob(pattern)
)


def test_links_lead_to_files_that_exist() -> None:
    linked = [(page, target) for page in PAGES for target in re.findall(r"\]\(([^)#:\s]+)[)#]", page.read_text())]
    assert linked
    assert [f"{page.name}: {target}" for page, target in linked if not (page.parent / target).exists()] == []


def test_pages_end_with_a_newline() -> None:
    assert [page.name for page in PAGES if not page.read_text().endswith("\n")] == []


def test_every_decision_is_in_their_index_once() -> None:
    listed = re.findall(r"^- \[(\d{4})\]\((\1-[\w-]+\.md)\)", (DECISIONS / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for _, name in listed) == sorted(path.name for path in DECISIONS.glob("[0-9]*.md"))


def test_the_page_about_tenants_shows_a_file_that_gateways_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "operations" / "tenants.md").read_text()
    [example] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "tenants.toml").write_text(example)
    assert list(Tenants.from_file(tmp_path / "tenants.toml").by_name) == ["search", "intranet"]
    explained = re.findall(r"^\| `(\w+)` \| .* \| .* \|$", page, re.MULTILINE)
    assert set(explained) == {"keys"} | {field.name for field in fields(Tenant)}


def test_the_page_about_tenants_tells_how_a_key_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "operations" / "tenants.md").read_text()
    [module] = re.findall(r"```sh\npython -m (\S+)\n```", page)
    runpy.run_module(module, run_name="__main__")
    [key, entry] = re.findall(r"^    (.*)$", capsys.readouterr().out, re.MULTILINE)
    (tmp_path / "tenants.toml").write_text(f'[[tenants]]\nname = "search"\nkeys = [\n    {entry},\n]\n')
    assert Tenants.from_file(tmp_path / "tenants.toml").tenant_of(f"Bearer {key}").name == "search"


def test_the_readme_names_what_the_client_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [sentence] = re.findall(r"^The client needs ([^:]+):", (ROOT / "README.md").read_text(), re.MULTILINE)
    needed, _, _ = sentence.partition(", neither")
    assert set(re.split(r", | and ", needed)) == {Requirement(line).name for line in project["dependencies"]}
