"""The parts that the chart promises are there, and say what they are for."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from api_server import running_api_server
from helm_release import CHART, Manifest, Release, Renderer, read_profile
from oasst_jobs.connection import ServerAddress, ServerKind

Render = Callable[..., Release]

API = ["oasst.v1.ChatService", "oasst.v1.ModelService", "oasst.v1.ScoringService"]
SCALED_BY = ("oasst_gateway_queue_waiting_tokens", "oasst_worker_kv_tokens_used")


def pod_of(release: Release, kind: str, component: str) -> Manifest:
    spec: Manifest = release.one(kind, component)["spec"]["template"]["spec"]
    return spec


def mounts_of(container: Manifest) -> dict[str, Manifest]:
    return {mount["name"]: mount for mount in container["volumeMounts"]}


def environment_of(container: Manifest) -> dict[str, Any]:
    return {each["name"]: each.get("value") or each.get("valueFrom") for each in container["env"]}


def test_gateways_are_found_one_by_one_and_as_one(release: Release) -> None:
    assert release.one("Service", "gateway")["spec"]["type"] == "ClusterIP"
    assert release.one("Service", "gateway-headless")["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("component", ["gateway", "worker"])
def test_one_pod_at_a_time_may_be_evicted(release: Release, component: str) -> None:
    assert release.one("PodDisruptionBudget", component)["spec"]["maxUnavailable"] == 1


@pytest.mark.parametrize(("kind", "component"), [("Deployment", "gateway"), ("StatefulSet", "worker")])
def test_pods_spread_over_nodes_and_zones(release: Release, kind: str, component: str) -> None:
    spread = pod_of(release, kind, component)["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    labels = release.one(kind, component)["spec"]["selector"]["matchLabels"]
    assert all(each["labelSelector"]["matchLabels"] == labels for each in spread)


def test_every_pod_may_pull_its_images_and_runs_where_it_is_told_to(render: Render) -> None:
    def placement(name: str) -> dict[str, Any]:
        return {"nodeSelector": {"pool": name}, "tolerations": [{"key": name, "operator": "Exists"}]}

    release = render(
        image={"pullSecrets": [{"name": "registry"}]},
        gateway=placement("gateways"),
        worker=placement("workers"),
        redis={"builtIn": placement("queues") | {"priorityClassName": "high"}},
    )
    pools = {"worker": "workers", "valkey": "queues"}
    for pod in release.pods().values():
        assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
        # The Job and the test are of the gateway's image.
        pool = pools.get(pod["metadata"]["labels"]["app.kubernetes.io/component"], "gateways")
        assert {key: pod["spec"][key] for key in placement(pool)} == placement(pool)
    assert pod_of(release, "StatefulSet", "valkey")["priorityClassName"] == "high"


def test_a_worker_has_its_gpus_and_shared_memory_for_them_to_talk_through(render: Render) -> None:
    pod = pod_of(render(worker={"gpus": 4, "sharedMemory": "8Gi"}), "StatefulSet", "worker")
    [worker] = pod["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert mounts_of(worker)["shm"]["mountPath"] == "/dev/shm"  # noqa: S108 - the pod's
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in pod["volumes"]
    assert environment_of(worker)["OASST_WORKER_DEVICE"] == "cuda"


def test_a_worker_without_gpus_asks_for_none(render: Render) -> None:
    [worker] = pod_of(render(worker={"gpus": 0}), "StatefulSet", "worker")["containers"]
    assert set(worker["resources"]["limits"]) == {"memory"}
    assert environment_of(worker)["OASST_WORKER_DEVICE"] == "cpu"


@pytest.mark.parametrize("resources", [None, {"limits": None}, {"limits": {"memory": None}}], ids=str)
@pytest.mark.parametrize("gpus", [0, 4])
def test_a_worker_need_not_have_a_limit_of_memory(render: Render, gpus: int, resources: dict[str, Any] | None) -> None:
    values = {"gpus": gpus, "resources": resources}
    [worker] = pod_of(render(worker=values), "StatefulSet", "worker")["containers"]
    assert worker["resources"].get("requests") == (resources and {"cpu": "2", "memory": "8Gi"})
    assert worker["resources"].get("limits", {}) == ({"nvidia.com/gpu": 4} if gpus else {})


def test_a_worker_that_has_loaded_its_model_waits_for_the_queue_as_long_as_its_start_may_take(render: Render) -> None:
    [worker] = pod_of(render(worker={"startSeconds": 900}), "StatefulSet", "worker")["containers"]
    assert environment_of(worker)["OASST_WORKER_REDIS_WAIT_S"] == "900"
    [worker] = pod_of(render(worker={"options": {"redis-wait-s": 5}}), "StatefulSet", "worker")["containers"]
    assert [each["value"] for each in worker["env"] if each["name"] == "OASST_WORKER_REDIS_WAIT_S"] == ["5"]


def test_weights_are_fetched_by_hash_onto_a_claim_that_outlives_the_pod(render: Render) -> None:
    profile = read_profile("production")
    hub = profile["model"]["hub"]
    release = render(**profile)
    workers = release.one("StatefulSet", "worker")["spec"]
    [claim] = workers["volumeClaimTemplates"]
    assert (claim["metadata"]["name"], claim["spec"]["resources"]["requests"]["storage"]) == ("models", "40Gi")
    [fetch] = workers["template"]["spec"]["initContainers"]
    [worker] = workers["template"]["spec"]["containers"]
    assert "readOnly" not in mounts_of(fetch)["models"]
    assert mounts_of(worker)["models"] == {"name": "models", "mountPath": "/models", "readOnly": True}
    assert f"--folder={environment_of(worker)['OASST_WORKER_MODEL']}" in fetch["args"]
    assert f"--revision={hub['revision']}" in fetch["args"]
    assert [each for each in fetch["args"] if each.startswith("--file=")] == [
        f"--file={name}={sha256}" for name, sha256 in sorted(hub["sha256"].items())
    ]
    assert release.one("ConfigMap", "fetch")["data"]["fetch_model.py"].strip() == read("files/fetch_model.py").strip()


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("", 443),
        ("https://mirror.example.com/hub", 443),
        ("http://mirror.models", 80),
        ("http://mirror.models:8080/hub", 8080),
        ("https://[fd00::1]:8443", 8443),
    ],
)
@pytest.mark.parametrize("component", ["gateway", "worker"])
def test_whoever_fetches_a_model_is_let_out_to_the_hub(
    render: Render, component: str, endpoint: str, port: int
) -> None:
    hub = read_profile("production")["model"]["hub"] | {"endpoint": endpoint}
    somewhere = [{"ipBlock": {"cidr": "10.1.2.3/32"}}]
    release = render(model={"hub": hub}, networkPolicy={"hub": somewhere})
    rules = release.one("NetworkPolicy", component)["spec"]["egress"]
    [to_hub] = [rule for rule in rules if rule.get("to") == somewhere]
    assert to_hub["ports"] == [{"port": port, "protocol": "TCP"}]


def test_a_gateway_fetches_no_weights(render: Render) -> None:
    [fetch] = pod_of(render(**read_profile("production")), "Deployment", "gateway")["initContainers"]
    files = [each.split("=")[1] for each in fetch["args"] if each.startswith("--file=")]
    assert files == ["config.json", "tokenizer.json"]


def test_a_route_lets_in_the_api_and_nothing_else(render: Render) -> None:
    [route] = render(**read_profile("production")).of_kind("GRPCRoute")
    [rule] = route["spec"]["rules"]
    assert [match["method"] for match in rule["matches"]] == [{"service": name} for name in API]
    assert [(backend["name"][-7:], backend["port"]) for backend in rule["backendRefs"]] == [("gateway", 50051)]
    assert route["spec"]["parentRefs"] == [{"name": "public", "namespace": "gateways"}]
    assert route["spec"]["hostnames"] == ["chat.example.com"]


def test_gateways_scale_by_processor_time_and_open_requests(render: Render) -> None:
    release = render(
        gateway={"autoscaling": {"enabled": True, "targetOpenRequests": 200}},
        networkPolicy={"prometheus": [{"podSelector": {}}]},
    )
    [scaler] = release.of_kind("HorizontalPodAutoscaler")
    cpu, requests = scaler["spec"]["metrics"]
    assert cpu["resource"] == {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}
    assert requests["pods"]["metric"]["name"] == "oasst_gateway_requests_in_flight"
    assert requests["pods"]["target"] == {"type": "AverageValue", "averageValue": "200"}


@pytest.mark.usefixtures("renderer")  # Skips where there is no Helm.
@pytest.mark.parametrize(("kind", "component"), [("Deployment", "gateway"), ("StatefulSet", "worker")])
@pytest.mark.parametrize(("before", "after"), [(6, 6), (0, 1)])
def test_an_upgrade_that_begins_to_scale_leaves_as_many_pods_as_there_are(
    kind: str, component: str, before: int, after: int
) -> None:
    """A number that is there and then is not becomes the API's default, which is one; and none stays none."""
    running = {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {
            "name": f"chat-oasst-serve-{component}",
            "namespace": "oasst",
            "labels": {"app.kubernetes.io/managed-by": "Helm"},
            "annotations": {"meta.helm.sh/release-name": "chat", "meta.helm.sh/release-namespace": "oasst"},
        },
        "spec": {"replicas": before},
    }
    with running_api_server(running) as url:
        release = Renderer(url).render({**read_profile("keda"), "gateway": {"autoscaling": {"enabled": True}}})
    assert release.one(kind, component)["spec"]["replicas"] == after


def test_keda_scales_workers_by_waiting_and_running_tokens(render: Render) -> None:
    profile = read_profile("keda")
    [scaled] = render(**profile).of_kind("ScaledObject")
    [trigger] = scaled["spec"]["triggers"]
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
    assert trigger["metadata"]["serverAddress"] == profile["worker"]["autoscaling"]["prometheus"]["address"]
    assert trigger["metadata"]["threshold"] == "30000"
    for name in SCALED_BY:
        assert f'{name}{{release="chat",namespace="oasst"}}' in trigger["metadata"]["query"]
    assert (scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]) == (1, 8)
    behavior = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == 600
    # Blind is not idle: callers are kept, money is not.
    assert scaled["spec"]["fallback"] == {"failureThreshold": 4, "replicas": 8}
    assert trigger["metadata"]["ignoreNullValues"] == "false"


def test_without_keda_the_same_series_scales_workers(render: Render) -> None:
    [scaler] = render(**read_profile("hpa")).of_kind("HorizontalPodAutoscaler")
    [metric] = scaler["spec"]["metrics"]
    assert metric["external"]["metric"]["selector"] == {"matchLabels": {"release": "chat"}}
    assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "30000"}
    rules = [rule for group in yaml.safe_load(read("files/rules.yaml"))["groups"] for rule in group["rules"]]
    [recorded] = [rule for rule in rules if rule.get("record") == metric["external"]["metric"]["name"]]
    assert all(name in recorded["expr"] for name in SCALED_BY)


@pytest.mark.parametrize("profile", ["keda", "hpa"])
@pytest.mark.parametrize("component", ["gateway", "worker"])
def test_what_workers_scale_by_is_scraped_from_where_prometheus_runs(
    render: Render, profile: str, component: str
) -> None:
    release = render(**read_profile(profile))
    address = read_profile("keda")["worker"]["autoscaling"]["prometheus"]["address"]
    [namespace] = re.findall(r"//prometheus\.([a-z-]+):", address)
    rules = release.one("NetworkPolicy", component)["spec"]["ingress"]
    [scraping] = [rule for rule in rules if {"port": "metrics", "protocol": "TCP"} in rule["ports"]]
    assert scraping["from"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}]


@pytest.mark.parametrize(
    ("url", "server", "ports"),
    [
        ("redis://redis.databases:6379/0", ServerKind.SINGLE, [6379]),
        ("redis+sentinel://one:26379,two:26379/main", ServerKind.SENTINEL, [6379, 26379]),
        ("rediss+sentinel://one:26379/main", ServerKind.SENTINEL, [6379, 26379]),
        ("redis+cluster://one:7000,two:7001", ServerKind.CLUSTER, [7000, 7001]),
        ("rediss+cluster://one:7000", ServerKind.CLUSTER, [7000]),
    ],
)
def test_gateways_and_workers_are_given_an_external_queue_and_let_out_to_it(
    render: Render, url: str, server: ServerKind, ports: list[int]
) -> None:
    release = render(redis={"builtIn": {"enabled": False}, "external": {"url": url, "ports": ports}})
    for kind, component in (("Deployment", "gateway"), ("StatefulSet", "worker")):
        [container] = pod_of(release, kind, component)["containers"]
        given = environment_of(container)[f"OASST_{component.upper()}_REDIS_URL"]
        assert given == url
        assert ServerAddress.parse(given).kind is server
        [policy] = [each for each in release.of_kind("NetworkPolicy") if each["metadata"]["name"].endswith(component)]
        opened = [{port["port"] for port in rule["ports"]} for rule in policy["spec"]["egress"]]
        assert set(ports) in opened
    assert not [each for each in release.of_kind("StatefulSet") if each["metadata"]["name"].endswith("valkey")]


def test_an_external_queue_over_tls_knows_gateway_worker_and_admin_apart(render: Render) -> None:
    release = render(**read_profile("production"))
    [load] = [pod["spec"]["containers"][0] for name, pod in release.pods().items() if "functions" in name]
    [gateway] = pod_of(release, "Deployment", "gateway")["containers"]
    [worker] = pod_of(release, "StatefulSet", "worker")["containers"]
    for container, variable, key in (
        (gateway, "OASST_GATEWAY_REDIS_URL", "gateway-url"),
        (worker, "OASST_WORKER_REDIS_URL", "worker-url"),
        (load, "OASST_REDIS_URL", "admin-url"),
    ):
        assert environment_of(container)[variable] == {"secretKeyRef": {"name": "oasst-redis", "key": key}}
        assert mounts_of(container)["redis-ca"]["mountPath"] == "/etc/oasst/redis"


@pytest.mark.parametrize(
    "changed",
    [
        {"image": {"tag": "7"}},
        {"image": {"pullPolicy": "Always"}},
        {"image": {"pullSecrets": [{"name": "registry"}]}},
        {"redis": {"builtIn": {"existingSecret": "oasst-users"}}},
        {
            "redis": {
                "builtIn": {"enabled": False},
                "external": {"existingSecret": "oasst-redis", "loadFunctions": True},
            }
        },
        {"nameOverride": "chat"},
    ],
    ids=str,
)
def test_an_upgrade_changes_no_job_but_makes_another(render: Render, changed: dict[str, Any]) -> None:
    """The API server refuses a Job of the same name with another pod, and the whole upgrade with it."""
    [before] = render().of_kind("Job")
    [after] = render(**changed).of_kind("Job")
    assert before["spec"]["template"] != after["spec"]["template"]
    assert before["metadata"]["name"] != after["metadata"]["name"]


def test_an_upgrade_that_concerns_others_leaves_the_job_as_it_is(render: Render) -> None:
    assert render(worker={"replicas": 7}).of_kind("Job") == render().of_kind("Job")


def test_the_built_in_queue_takes_its_users_from_a_secret_of_yours(render: Render) -> None:
    release = render(redis={"builtIn": {"existingSecret": "oasst-users"}})
    assert not [each for each in release.of_kind("Secret") if each["metadata"]["name"].endswith("valkey")]
    volumes = {each["name"]: each for each in pod_of(release, "StatefulSet", "valkey")["volumes"]}
    assert volumes["users"]["secret"]["secretName"] == "oasst-users"
    [gateway] = pod_of(release, "Deployment", "gateway")["containers"]
    assert environment_of(gateway)["REDIS_PASSWORD"]["secretKeyRef"]["name"] == "oasst-users"


def test_the_built_in_queue_starts_again_for_other_users_and_settings(render: Render) -> None:
    annotations = render().one("StatefulSet", "valkey")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["checksum/users"] == hashlib.sha256((CHART / "files" / "users.acl").read_bytes()).hexdigest()
    changed = render(redis={"builtIn": {"maxmemory": "1gb"}}).one("StatefulSet", "valkey")
    assert changed["spec"]["template"]["metadata"]["annotations"]["checksum/config"] != annotations["checksum/config"]


def test_the_built_in_queue_keeps_its_file_on_a_claim(render: Render) -> None:
    valkey = render().one("StatefulSet", "valkey")["spec"]
    [claim] = valkey["volumeClaimTemplates"]
    container = valkey["template"]["spec"]["containers"][0]
    assert mounts_of(container)["data"]["mountPath"] == "/data"
    assert claim["spec"]["resources"]["requests"]["storage"] == "10Gi"
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)


def test_prometheus_is_given_every_component_and_the_rules_as_they_are(render: Render) -> None:
    release = render(monitoring={"podMonitors": {"enabled": True}, "rules": {"enabled": True}})
    for component in ("gateway", "worker", "valkey"):
        [endpoint] = release.one("PodMonitor", component)["spec"]["podMetricsEndpoints"]
        relabelings = endpoint["relabelings"]
        labels = {each["targetLabel"]: each["replacement"] for each in relabelings if "targetLabel" in each}
        assert labels == {"release": "chat", "component": component}
    [rules] = release.of_kind("PrometheusRule")
    assert rules["spec"] == yaml.safe_load(read("files/rules.yaml"))


def test_a_pod_that_is_pending_is_no_target_that_is_down(render: Render) -> None:
    """Each added worker is one for as long as its model is fetched."""
    for monitor in render(monitoring={"podMonitors": {"enabled": True}}).of_kind("PodMonitor"):
        [endpoint] = monitor["spec"]["podMetricsEndpoints"]
        pending = {"sourceLabels": ["__meta_kubernetes_pod_phase"], "regex": "Pending", "action": "drop"}
        assert pending in endpoint["relabelings"]


def test_grafana_is_given_every_dashboard_as_it_is(render: Render) -> None:
    release = render(monitoring={"dashboards": {"enabled": True}})
    files = sorted((CHART / "files" / "dashboards").glob("*.json"))
    assert files
    for file in files:
        dashboard = release.one("ConfigMap", f"dashboard-{file.stem}")
        assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert yaml.safe_load(dashboard["data"][file.name]) == yaml.safe_load(file.read_text())


def test_helm_test_streams_a_chat_from_a_pod_of_its_own(release: Release) -> None:
    [pod] = [each for each in release.tests if each["kind"] == "Pod"]
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    [chat] = pod["spec"]["containers"]
    service = release.one("Service", "gateway")
    port = service["spec"]["ports"][0]["port"]
    assert environment_of(chat)["OASST_ADDRESS"] == f"{service['metadata']['name']}:{port}"


def test_without_network_policies_the_notes_say_what_is_open(render: Render) -> None:
    assert "NetworkPolicies are off" in render(networkPolicy={"enabled": False}).notes
    assert "NetworkPolicies are off" not in render().notes


def read(path: str) -> str:
    return (CHART / path).read_text()
