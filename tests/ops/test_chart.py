"""Every profile of the chart, as Helm renders it: valid for the API, hardened, watched, and wired together rightly."""

import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from typing import Any

import kubernetes_validate
import pytest
from api_server import KINDS
from helm_release import CHART, Release
from kubernetes_validate.utils import schema_contents
from oasst_client import Profile
from yamllint import linter
from yamllint.config import YamlLintConfig

KUBERNETES_VERSIONS = ("1.27", "1.32", "1.37")
# Their schemas come with their operators, not with Kubernetes.
CUSTOM_KINDS = {"GRPCRoute", "PodMonitor", "PrometheusRule", "ScaledObject"}
SECRETS_OF_PROFILES = {
    *("oasst-gateway", "oasst-gateway-tls", "oasst-tenants", "oasst-redis", "oasst-redis-ca"),
    *("oasst-test", "oasst-test-tls", "oasst-users"),
}
LINT_RULES = YamlLintConfig(
    "extends: default\n"
    "rules: {line-length: disable, braces: {max-spaces-inside: 1}, quoted-strings: disable, document-start: disable,"
    # Helm puts empty lines between manifests, and `0440` is what Kubernetes calls a mode.
    " empty-lines: {max-end: 2}, comments-indentation: disable, indentation: {indent-sequences: whatever}}"
)

Manifest = dict[str, Any]


def labels_of(pod: Manifest) -> dict[str, str]:
    labels: dict[str, str] = pod["metadata"]["labels"]
    return labels


def containers_of(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def selects(selector: dict[str, str], pod: Manifest) -> bool:
    return selector.items() <= labels_of(pod).items()


def strings_in(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for value in node.values():
            yield from strings_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings_in(value)
    elif isinstance(node, str):
        yield node


@pytest.fixture(scope="module")
def _schemas_read_once() -> Iterator[None]:
    """`kubernetes_validate` otherwise parses a schema of megabytes anew for each manifest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kubernetes_validate.utils.schema_contents", cache(schema_contents))
        yield


@pytest.mark.usefixtures("_schemas_read_once")
@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_knows_every_field(release: Release, version: str) -> None:
    for manifest in (*release.objects, *release.tests):
        if manifest["kind"] not in CUSTOM_KINDS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_custom_resources_are_of_versions_their_operators_serve(release: Release) -> None:
    for manifest in release.of_kind(*CUSTOM_KINDS):
        assert manifest["kind"] in KINDS[manifest["apiVersion"]]


def test_the_rendered_yaml_is_clean(release: Release) -> None:
    problems = list(linter.run(release.text, LINT_RULES))
    assert not problems, "\n".join(f"{problem.line}: {problem}" for problem in problems[:9])


def test_names_are_unique_and_short_enough_for_labels(release: Release) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in (*release.objects, *release.tests)]
    assert len(names) == len(set(names))
    assert max(len(name) for _, name in names) <= 63


def test_a_release_of_the_chart_that_changes_no_pod_starts_none_again(release: Release) -> None:
    """A label with the chart's version would, in the template of any pod."""
    for maker in release.of_kind("Deployment", "StatefulSet", "Job"):
        labels = labels_of(maker["spec"]["template"])
        of_release = {"app.kubernetes.io/version", "app.kubernetes.io/managed-by", "helm.sh/chart"}
        assert set(labels_of(maker)) - set(labels) == of_release, maker["metadata"]["name"]
        assert set(labels) <= set(labels_of(maker))


def test_every_container_is_restricted(release: Release) -> None:
    """What the `restricted` pod security standard asks, and a root file system that cannot be written."""
    for name, pod in release.pods().items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume], name
        for container in containers_of(pod):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, container["name"]
            assert context["readOnlyRootFilesystem"] is True, container["name"]
            assert context["capabilities"] == {"drop": ["ALL"]}, container["name"]


def test_every_container_says_what_it_needs(release: Release) -> None:
    for pod in release.pods().values():
        for container in containers_of(pod):
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]), container["name"]
            assert "memory" in resources["limits"], container["name"]


def test_images_are_pinned(release: Release) -> None:
    for pod in release.pods().values():
        for container in containers_of(pod):
            assert re.search(r"@sha256:[0-9a-f]{64}$|:[\w.-]+$", container["image"]), container["image"]
            assert not container["image"].endswith(":latest")


def test_every_server_is_probed_by_what_it_does(release: Release) -> None:
    for server in release.of_kind("Deployment", "StatefulSet"):
        for container in server["spec"]["template"]["spec"]["containers"]:
            assert {"livenessProbe", "readinessProbe"} <= set(container), container["name"]
            if container["name"] in ("gateway", "worker"):
                assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
                assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
                assert "startupProbe" in container
            elif container["name"] == "valkey":
                # While it reads its file it listens, and answers nothing.
                assert container["startupProbe"]["exec"] == container["readinessProbe"]["exec"]


def test_pods_have_longer_to_stop_than_their_chats(release: Release) -> None:
    for component, variable in (("gateway", "OASST_GATEWAY_DRAIN_GRACE_S"), ("worker", "OASST_WORKER_DRAIN_S")):
        [spec] = [pod["spec"] for name, pod in release.pods().items() if name.endswith(component)]
        [container] = spec["containers"]
        drain_s = next(int(each["value"]) for each in container["env"] if each["name"] == variable)
        delay_s = sum(int(each["value"]) for each in container["env"] if each["name"].endswith("DRAIN_DELAY_S"))
        assert spec["terminationGracePeriodSeconds"] >= delay_s + drain_s + 10


def test_selectors_find_exactly_the_pods_of_their_component(release: Release) -> None:
    pods = release.pods()
    for workload in release.of_kind("Deployment", "StatefulSet"):
        selector = workload["spec"]["selector"]["matchLabels"]
        assert [name for name, pod in pods.items() if selects(selector, pod)] == [workload["metadata"]["name"]]
    for kind, path in (("Service", ("selector",)), ("PodDisruptionBudget", ("selector", "matchLabels"))):
        for manifest in release.of_kind(kind):
            selector = manifest["spec"]
            for key in path:
                selector = selector[key]
            [name] = [name for name, pod in pods.items() if selects(selector, pod)]
            assert manifest["metadata"]["name"].startswith(name)


def test_ports_that_are_named_exist(release: Release) -> None:
    pods = release.pods().values()
    for service in release.of_kind("Service"):
        [pod] = [pod for pod in pods if selects(service["spec"]["selector"], pod)]
        names = {port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    for monitor in release.of_kind("PodMonitor"):
        [pod] = [pod for pod in pods if selects(monitor["spec"]["selector"]["matchLabels"], pod)]
        names = {port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", [])}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= names


def test_what_scales_or_routes_finds_its_target(release: Release) -> None:
    workloads = {
        (each["kind"], each["metadata"]["name"]): each for each in release.of_kind("Deployment", "StatefulSet")
    }
    scalers = release.of_kind("HorizontalPodAutoscaler", "ScaledObject")
    scaled = [(each["spec"]["scaleTargetRef"]["kind"], each["spec"]["scaleTargetRef"]["name"]) for each in scalers]
    for target, workload in workloads.items():
        # Two owners of one number would undo each other's work.
        assert scaled.count(target) == (0 if "replicas" in workload["spec"] else 1), target
    assert set(scaled) <= set(workloads)
    services = {each["metadata"]["name"] for each in release.of_kind("Service")}
    for workload in release.of_kind("StatefulSet"):
        assert workload["spec"]["serviceName"] in services
    for route in release.of_kind("GRPCRoute"):
        assert {backend["name"] for rule in route["spec"]["rules"] for backend in rule["backendRefs"]} <= services


def test_what_a_pod_mounts_or_reads_exists(release: Release) -> None:
    """Secrets, ConfigMaps and claims are of this release, or their names were given in the values."""
    made = {(each["kind"], each["metadata"]["name"]) for each in (*release.objects, *release.tests)}
    given = {("Secret", name) for name in SECRETS_OF_PROFILES}
    given |= {("PersistentVolumeClaim", "models")}
    for pod in release.pods().values():
        volumes = pod["spec"].get("volumes", [])
        used = {("Secret", each["secret"]["secretName"]) for each in volumes if "secret" in each}
        used |= {("ConfigMap", each["configMap"]["name"]) for each in volumes if "configMap" in each}
        claims = [each["persistentVolumeClaim"] for each in volumes if "persistentVolumeClaim" in each]
        used |= {("PersistentVolumeClaim", claim["claimName"]) for claim in claims}
        for container in containers_of(pod):
            sources = [each["valueFrom"]["secretKeyRef"] for each in container.get("env", []) if "valueFrom" in each]
            used |= {("Secret", source["name"]) for source in sources}
        assert used <= made | given


def test_mounts_name_volumes_of_their_pod(release: Release) -> None:
    for workload in release.of_kind("Deployment", "StatefulSet", "Job", "Pod"):
        pod = workload["spec"].get("template", workload)
        volumes = {each["name"] for each in pod["spec"].get("volumes", [])}
        volumes |= {each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", [])}
        mounted = {mount["name"] for container in containers_of(pod) for mount in container.get("volumeMounts", [])}
        assert mounted == volumes, workload["metadata"]["name"]


def test_every_pod_is_denied_by_default_and_every_open_port_allowed_by_name(release: Release) -> None:
    policies = release.of_kind("NetworkPolicy")
    denying = [each for each in policies if not {"ingress", "egress"} & set(each["spec"])]
    for name, pod in release.pods().items():
        assert any(selects(each["spec"]["podSelector"]["matchLabels"], pod) for each in denying), name
        mine = [each["spec"] for each in policies if selects(each["spec"]["podSelector"]["matchLabels"], pod)]
        rules = [rule for spec in mine for rule in spec.get("ingress", [])]
        assert all(rule.get("from") for rule in rules), f"{name}: a rule without peers lets everyone in"
        allowed = {port["port"] for rule in rules for port in rule["ports"]}
        opened = {port["name"] for each in pod["spec"]["containers"] for port in each.get("ports", [])}
        assert allowed == opened, name


def test_whoever_may_call_a_pod_is_let_out_to_it(release: Release) -> None:
    """An allowed way in is of no use without the way out at its other end."""
    policies = release.of_kind("NetworkPolicy")
    pods = release.pods()
    for policy in policies:
        for rule in policy["spec"].get("egress", []):
            for peer in rule.get("to", []):
                if "podSelector" not in peer:
                    continue
                [target] = [pod for pod in pods.values() if selects(peer["podSelector"]["matchLabels"], pod)]
                ports = {
                    name_or_number
                    for container in target["spec"]["containers"]
                    for port in container["ports"]
                    for name_or_number in (port["name"], port["containerPort"])
                }
                assert {port["port"] for port in rule["ports"]} <= ports


def test_no_manifest_shows_a_password(release: Release) -> None:
    passwords = {
        value
        for secret in release.of_kind("Secret")
        for key, value in secret.get("stringData", {}).items()
        if key.endswith("password")
    }
    for manifest in (*release.objects, *release.tests):
        if manifest["kind"] != "Secret":
            assert not [text for text in strings_in(manifest) if any(password in text for password in passwords)]


def test_the_notes_name_services_that_exist(release: Release) -> None:
    services = {each["metadata"]["name"] for each in release.of_kind("Service")}
    assert set(re.findall(r"service/([\w-]+)", release.notes)) <= services
    assert re.search(r"dns:///([\w-]+)\.oasst:50051", release.notes)[1] in services


def test_the_notes_name_what_a_caller_must_show(release: Release) -> None:
    [gateway] = [pod["spec"]["containers"][0] for name, pod in release.pods().items() if name.endswith("gateway")]
    given = {each["name"].removeprefix("OASST_GATEWAY_") for each in gateway["env"]}
    shown = set(re.findall(r"OASST_(\w+)=", release.notes))
    asked = {
        "TLS_CERT": {"TLS", "TLS_SERVER_NAME", "TLS_CA_FILE"},
        "TLS_CLIENT_CA": {"TLS_CERT_FILE", "TLS_KEY_FILE"},
        "TENANTS": {"API_KEY"},
    }
    assert shown == {name for option, names in asked.items() if option in given for name in names}
    assert {name.lower() for name in shown} <= {field.name for field in fields(Profile)}


def test_the_notes_say_who_may_chat_and_whether_in_clear(release: Release) -> None:
    [gateway] = [pod["spec"]["containers"][0] for name, pod in release.pods().items() if name.endswith("gateway")]
    given = {each["name"] for each in gateway["env"]}
    assert ("whoever reaches a gateway may chat" in release.notes) == ("OASST_GATEWAY_TENANTS" not in given)
    assert ("chats reach the gateways unencrypted" in release.notes) == ("OASST_GATEWAY_TLS_CERT" not in given)


def test_the_chart_has_a_profile_for_each_way_to_run_it() -> None:
    profiles = {path.stem for path in (CHART / "profiles").glob("*.yaml")}
    assert profiles >= {"minimal", "one-gpu", "production", "external-redis", "keda", "hpa", "tls"}
