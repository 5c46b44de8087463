"""The images: linted, pinned, and with everything that gateway and worker ask for."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from oasst_gateway.settings import GatewaySettings
from oasst_worker.settings import WorkerSettings
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PINNED = re.compile(r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)


def installed(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a tool of this environment."""
    tool = Path(sys.executable).parent / command[0]
    return subprocess.run([str(tool), *command[1:]], capture_output=True, text=True)


def pins(image: str) -> dict[str, str]:
    return {name.lower(): version for name, version, _ in PINNED.findall((DOCKER / f"{image}.txt").read_text())}


def requirements(extra: str) -> list[Requirement]:
    """What the distribution asks for with this extra, the extras inside it followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(line) for line in project["dependencies"]]
    extras = [extra]
    while extras:
        for requirement in map(Requirement, project["optional-dependencies"][extras.pop()]):
            if requirement.name == project["name"]:
                extras += requirement.extras
            else:
                found.append(requirement)
    return found


def is_left_out(path: str) -> bool:
    """Whether .dockerignore keeps this path from the builder. The last line that names it or a folder above it wins."""
    left_out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        parts = [re.escape(part).replace(r"\*", "[^/]*") for part in pattern.split("**/")]
        if re.fullmatch("(?:.*/)?".join(parts) + "(?:/.*)?", path):
            left_out = not line.startswith("!")
    return left_out


def test_the_dockerfile_is_clean() -> None:
    linted = installed("hadolint", str(DOCKER / "Dockerfile"))
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize("image", ["gateway", "worker"])
def test_an_image_installs_what_the_project_asks_for(image: str) -> None:
    pinned = pins(image)
    for requirement in requirements(image):
        version = pinned.get(requirement.name.lower())
        assert version is not None, f"{requirement} is not in docker/{image}.txt: run `make lock`"
        assert requirement.specifier.contains(version), f"docker/{image}.txt has {version} of {requirement}"


@pytest.mark.parametrize("image", ["build", "gateway", "worker"])
def test_everything_an_image_installs_is_pinned_by_hash(image: str) -> None:
    text = (DOCKER / f"{image}.txt").read_text()
    assert "".join(match[0] for match in PINNED.finditer(text)) == text
    assert "://" not in text


def test_the_builder_is_given_everything_that_the_dockerfile_copies() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for sources in copied for source in sources.split()}
    assert {"pyproject.toml", "docker/install.sh", "protos"} <= sources
    assert {source for source in sources if not (ROOT / source).exists()} == set()
    assert {source for source in sources if is_left_out(source)} == set()
    assert is_left_out("tests/conftest.py")
    assert is_left_out("protos/oasst/__pycache__/prompt.cpython-312.pyc")


def test_the_image_is_built_from_every_package() -> None:
    copied = (DOCKER / "Dockerfile").read_text()
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    folders = {package.split("/")[0] for package in wheel["packages"]}
    assert {folder for folder in folders if f"COPY {folder} {folder}\n" not in copied} == set()


def test_the_gateways_image_has_no_pytorch() -> None:
    assert "torch" not in pins("gateway")


def test_images_run_as_a_user_without_rights_and_say_how_they_are() -> None:
    stages = (DOCKER / "Dockerfile").read_text().split("\nFROM ")
    runtime = next(stage for stage in stages if " AS runtime" in stage)
    assert "USER 10001:10001" in runtime
    for image in ("gateway", "worker"):
        stage = next(stage for stage in stages if stage.startswith(f"runtime AS {image}"))
        assert re.findall(r"^USER (.*)", stage, re.MULTILINE)[-1:] in ([], ["10001:10001"])
        assert "HEALTHCHECK" in stage


def test_the_workers_image_can_compile_its_kernels() -> None:
    worker = (DOCKER / "Dockerfile").read_text().partition("\nFROM runtime AS worker")[2]
    assert re.search(r"apt-get install .* gcc libc6-dev", worker)


def test_compose_lets_the_worker_load_what_it_compiles() -> None:
    worker = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["worker"]
    assert worker["tmpfs"] == ["/tmp:exec"]  # noqa: S108 - the container's


@pytest.mark.parametrize("file", ["compose.yaml", "compose.gpu.yaml"])
def test_a_compose_file_is_one(file: str) -> None:
    checked = installed("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(DOCKER / file))
    assert checked.returncode == 0, checked.stdout


def test_the_options_in_the_compose_file_exist() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    for name, settings in (("gateway", GatewaySettings), ("worker", WorkerSettings)):
        prefix = f"OASST_{name.upper()}_"
        options = {key.removeprefix(prefix).lower() for key in services[name]["environment"] if key.startswith(prefix)}
        assert options <= set(settings.model_fields)


@pytest.mark.parametrize(
    ("told", "model", "name"),
    [
        ({}, "/opt/oasst/demo", ""),  # Without a name, a model has its folder's.
        ({"OASST_MODEL": "/models/pythia-12b"}, "/models/pythia-12b", ""),
        ({"OASST_MODEL": "/models/pythia-12b", "OASST_MODEL_NAME": "pythia"}, "/models/pythia-12b", "pythia"),
    ],
    ids=["demo", "folder", "folder and name"],
)
def test_compose_serves_a_model_by_its_folders_name(told: dict[str, str], model: str, name: str) -> None:
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda v: told.get(v[1], v[2]), (DOCKER / "compose.yaml").read_text())
    services = yaml.safe_load(text)["services"]
    for component in ("gateway", "worker"):
        environment = services[component]["environment"]
        assert environment[f"OASST_{component.upper()}_MODEL"] == model
        assert (environment[f"OASST_{component.upper()}_MODEL_NAME"] or "") == name


def test_compose_needs_a_gpu_only_where_it_is_told_of_one() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert {name for name, service in services.items() if "deploy" in service} == set()
    [(name, added)] = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())["services"].items()
    [device] = added["deploy"]["resources"]["reservations"]["devices"]
    assert (name, device["driver"], device["capabilities"]) == ("worker", "nvidia", ["gpu"])


def test_the_folder_of_models_is_in_the_checkout() -> None:
    """Docker makes a missing one, for root: nobody else could put a model there."""
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    for name in ("gateway", "worker"):
        assert services[name]["volumes"] == ["./models:/models:ro"]
    assert (ROOT / "docker" / "models" / ".gitignore").exists()


def test_compose_names_exact_images_the_charts_own_among_them_and_takes_digests_instead() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    values = yaml.safe_load((ROOT / "helm" / "oasst-serve" / "values.yaml").read_text())["redis"]["builtIn"]
    foreign = {name: service["image"] for name, service in compose["services"].items() if "build" not in service}
    named = {name: re.fullmatch(r"\$\{[A-Z]+_IMAGE:-([\w./-]+:v?\d+(?:\.\d+)+)\}", foreign[name]) for name in foreign}
    assert all(named.values()), named
    assert named["valkey"][1] == values["image"]
    assert named["exporter"][1] == values["exporterImage"]
    [base] = re.findall(r"^ARG PYTHON=(.*)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    for name in ("gateway", "worker"):
        assert compose["services"][name]["build"]["args"] == {"PYTHON": f"${{PYTHON_IMAGE:-{base}}}"}


def test_compose_shows_the_charts_rules_and_dashboards() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    for name in ("prometheus", "grafana"):
        for volume in services[name]["volumes"]:
            source = volume.split(":")[0]
            assert "/" not in source or (DOCKER / source).exists(), source
