"""The structure of the house: who imports whom, what the client costs, that generated code is fresh."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOMES = {
    "oasst": ROOT / "protos",
    "oasst_telemetry": ROOT / "telemetry",
    "oasst_jobs": ROOT / "jobs",
    "oasst_gateway": ROOT / "gateway",
    "oasst_worker": ROOT / "worker",
    "oasst_client": ROOT / "client",
    "oasst_cli": ROOT / "client",
    "oasst_training": ROOT / "training",
}
# Package -> the packages of ours it may import beside itself.
ARROWS = {
    "oasst": set(),
    "oasst_telemetry": set(),
    "oasst_jobs": {"oasst"},
    "oasst_gateway": {"oasst", "oasst_jobs", "oasst_telemetry"},
    "oasst_worker": {"oasst", "oasst_jobs", "oasst_telemetry"},
    "oasst_client": {"oasst"},
    "oasst_cli": {"oasst", "oasst_client"},
    "oasst_training": {"oasst"},
}
# Part of the worker -> the parts of the worker it may import.
WORKER_ARROWS = {
    "engine": {"engine"},
    "runtime": {"engine", "model", "runtime"},
    "model": {"model"},
}
# Package -> what it must not know.
FORBIDDEN = {
    "oasst_telemetry": {"torch", "redis", "os"},
    "oasst_jobs": {"grpc", "torch", "os", "prometheus_client"},
    "oasst_client": {"torch", "redis", "transformers", "rich", "typer"},
    "oasst_gateway": {"torch", "transformers"},
}
# Package -> files beside its settings that read the environment, or hand it on to processes or libraries.
ENVIRONMENT_READERS = {
    "oasst_gateway": {"fleet.py", "tokenizer.py"},
    "oasst_client": {"_profile.py"},
    "oasst_cli": {
        "__main__.py",
        "options.py",
        "doctor.py",
        "chat/line_editing.py",
        "up/child.py",
        "up/command.py",
        "up/stack.py",
    },
    "oasst_training": {"zero.py"},
}
# What programs that use the client need not have, or would wait for.
HEAVY = {
    *("numpy", "opentelemetry", "prometheus_client", "pydantic", "redis", "rich", "tokenizers", "torch"),
    *("transformers", "typer"),
}
# What a module may need that not every machine has.
OPTIONAL = {"triton"}


def imports_of(file: Path) -> set[str]:
    """Modules a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def sources(package: str, part: str = "") -> list[Path]:
    files = sorted((HOMES[package] / package / part).rglob("*.py"))
    assert files, f"{package}/{part} has no files"
    return files


@pytest.mark.parametrize("package", ARROWS)
def test_imports_run_one_way(package):
    allowed = ARROWS[package] | {package}
    for file in sources(package):
        ours = {name.split(".")[0] for name in imports_of(file)} & set(HOMES)
        assert ours <= allowed, f"{file} imports {ours - allowed}"


@pytest.mark.parametrize("part", WORKER_ARROWS)
def test_imports_inside_the_worker_run_one_way(part):
    allowed = {f"oasst_worker.{name}" for name in WORKER_ARROWS[part]}
    for file in sources("oasst_worker", part):
        ours = {".".join(name.split(".")[:2]) for name in imports_of(file) if name.startswith("oasst_worker")}
        assert ours <= allowed, f"{file} imports {ours - allowed}"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_do_not_know_what_is_not_their_business(package):
    for file in sources(package):
        known = {name.split(".")[0] for name in imports_of(file)} & FORBIDDEN[package]
        assert not known, f"{file} imports {known}"


def test_the_engine_needs_nothing_but_the_standard_library():
    for file in sources("oasst_worker", "engine"):
        foreign = {name.split(".")[0] for name in imports_of(file)} - sys.stdlib_module_names - {"oasst_worker"}
        assert not foreign, f"{file} imports {foreign}"


def test_the_environment_is_read_by_settings_alone():
    for package, home in HOMES.items():
        readers = {file for file in sources(package) if re.search(r"\b(environb?|getenv)\b", file.read_text())}
        allowed = {home / package / name for name in ("settings.py", *ENVIRONMENT_READERS.get(package, ()))}
        assert readers <= allowed, f"{readers - allowed} read the environment"


def test_importing_the_client_loads_nothing_heavy():
    loaded = subprocess.run(
        [sys.executable, "-c", "import oasst_client, sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize("package", HOMES)
def test_what_a_package_exports_exists(package):
    for info in pkgutil.walk_packages([str(HOMES[package] / package)], prefix=f"{package}."):
        if info.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as missing:
            if missing.name in OPTIONAL:
                continue
            raise
        for name in getattr(module, "__all__", []):
            assert hasattr(module, name), f"{info.name}.__all__ names {name}"


def test_generated_code_is_fresh(tmp_path):
    subprocess.run([sys.executable, ROOT / "protos" / "generate.py", tmp_path], check=True)
    fresh = {file.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("*_pb2*.py*")}
    kept = {
        file.relative_to(ROOT / "protos"): file.read_text()
        for file in (ROOT / "protos").rglob("*_pb2*.py*")
        if "__pycache__" not in file.parts
    }
    assert fresh == kept, "run `make proto`"


def test_the_protobuf_files_are_lint_clean():
    buf = Path(sys.executable).parent / "buf"
    lint = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout
