"""What the chart accepts, what it refuses, and with which sentence."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_release import CHART, Manifest, Release, RenderError
from oasst_gateway.settings import GatewaySettings
from oasst_gateway.settings import read_settings as read_gateway_settings
from oasst_worker.model.shards import find_shards
from oasst_worker.settings import WorkerSettings
from oasst_worker.settings import read_settings as read_worker_settings

Render = Callable[..., Release]

HUB: dict[str, Any] = {
    "id": "example/model",
    "revision": "0" * 40,
    "sha256": {"config.json": "a" * 64, "tokenizer.json": "b" * 64},
}
NO_BUILT_IN = {"enabled": False}


def hub_of(*weights: str) -> dict[str, Any]:
    """A hub's model with these files of weights."""
    return HUB | {"sha256": HUB["sha256"] | dict.fromkeys(weights, "c" * 64)}


# Options that follow from other values, or must be as the chart's probes, ports and mounts are: no volume of a worker's
# own is there to keep a converted checkpoint in.
CLOSED = {
    "gateway": {"gateway-id", "listen", "metrics", "metrics-listen", "model", "model-name", "redis-url", "reuse-port"}
    | {"drain-delay-s", "drain-grace-s", "resume-secret", "tls-cert", "tls-key", "tls-client-ca", "tenants", "jwt-key"}
    | {"otlp-endpoint"},
    "worker": {"device", "drain-s", "metrics-listen", "model", "model-name", "otlp-endpoint", "redis-url", "worker-id"}
    | {"convert-bin"},
}
FOR_TESTS = {"failpoints"}

SCALED_BY_METRICS = {
    "worker": {"autoscaling": {"type": "hpa"}},
    "monitoring": {"podMonitors": {"enabled": True}, "rules": {"enabled": True}},
}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"gatway": {}}, "additional properties 'gatway' not allowed"),
    ({"worker": {"gpu": 1}}, "additional properties 'gpu' not allowed"),
    ({"worker": {"options": {"max-sequence": 8}}}, "additional properties 'max-sequence' not allowed"),
    ({"worker": {"options": {"device": "cpu"}}}, "additional properties 'device' not allowed"),
    ({"worker": {"options": {"convert-bin": "/models/x"}}}, "additional properties 'convert-bin' not allowed"),
    ({"traces": {"endpoint": "collector:4317"}}, "does not match pattern"),
    ({"worker": {"options": {"dtype": "int3"}}}, "value must be one of"),
    ({"gateway": {"replicas": 0}}, "minimum: got 0, want 1"),
    ({"gateway": {"image": {"digest": "sha256:1"}}}, "does not match pattern"),
    ({"image": {"tag": "latest"}}, "at '/image/tag'"),
    ({"model": {"hub": {"id": "example/model", "revision": "main"}}}, "at '/model/hub/revision'"),
    ({"redis": {"external": {"url": "redis://r"}}}, "set redis.builtIn.enabled=false"),
    ({"redis": {"builtIn": NO_BUILT_IN}}, "There is no queue: set redis.external.url"),
    (
        {"redis": {"builtIn": NO_BUILT_IN, "external": {"url": "redis://r", "existingSecret": "s"}}},
        "are both set: keep one",
    ),
    (
        {"redis": {"builtIn": NO_BUILT_IN, "external": {"url": "redis://user:secret@r"}}},
        "put whole URLs into a Secret",
    ),
    (
        {"redis": {"builtIn": NO_BUILT_IN, "external": {"url": "redis://r", "loadFunctions": True}}},
        "needs redis.external.existingSecret",
    ),
    (
        {"redis": {"builtIn": NO_BUILT_IN, "external": {"url": "redis://r", "caSecret": "ca"}}},
        "begin it with rediss.",
    ),
    (
        {"redis": {"builtIn": NO_BUILT_IN, "external": {"url": "redis+cluster://r", "caSecret": "ca"}}},
        "begin it with rediss.",
    ),
    (
        {"redis": {"builtIn": NO_BUILT_IN, "external": {"url": "redis+sentinel://s/main?sentinel_password=x"}}},
        "put whole URLs into a Secret",
    ),
    (
        {"redis": {"builtIn": NO_BUILT_IN, "external": {"url": "redis+cluster://a:6379,b:7000"}}},
        "to which no pod may connect: add it to redis.external.ports",
    ),
    ({"gateway": {"options": {"queue-shards": 4}}}, "different numbers of queue-shards"),
    ({"model": {"hub": HUB | {"revision": ""}}}, "name the full commit to serve"),
    ({"model": {"hub": HUB | {"sha256": {}}}}, "lacks config.json or tokenizer.json"),
    ({"model": {"hub": HUB}}, "names no weights"),
    ({"model": {"hub": hub_of("model.safetensors.index.json")}}, "names no weights"),
    (
        {"model": {"hub": hub_of("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")}},
        "names weights that no worker finds",
    ),
    ({"model": {"volume": {"existingClaim": "models"}}}, "set model.path to a folder below it"),
    (
        {"model": {"hub": hub_of("pytorch_model.bin"), "volume": {"existingClaim": "models"}}},
        "model.hub.id and model.volume.existingClaim are both set",
    ),
    (
        {"worker": {"autoscaling": {"type": "hpa", "minReplicas": 9, "maxReplicas": 3}}},
        "worker.autoscaling.minReplicas is above maxReplicas",
    ),
    (
        {"worker": {"gpus": 4, "resources": {"limits": {"nvidia.com/gpu": 4}}}},
        "set worker.gpus instead.",
    ),
    ({"worker": {"sharedMemory": ""}}, "at '/worker/sharedMemory'"),
    (
        {"gateway": {"autoscaling": {"enabled": True, "minReplicas": 9, "maxReplicas": 3}}},
        "gateway.autoscaling.minReplicas is above maxReplicas",
    ),
    ({"gateway": {"route": {"enabled": True}}}, "name the Gateway that the route is attached to"),
    ({"gateway": {"tls": {"clientCertificates": True}}}, "needs gateway.tls.secret"),
    ({"gateway": {"options": {"jwt-issuer": "i", "jwt-audience": "a"}}}, "set gateway.tenantsSecret"),
    ({"gateway": {"ingress": {"enabled": True}}}, "needs gateway.ingress.host"),
    ({"worker": {"autoscaling": {"type": "keda"}}}, "set monitoring.podMonitors.enabled=true"),
    (
        # Whoever scrapes by it sets no labels, and gateways are not scraped.
        {"worker": {"autoscaling": {"type": "keda"}, "podAnnotations": {"prometheus.io/scrape": "true"}}},
        "are labelled where the chart's PodMonitors scrape them",
    ),
    (
        {"worker": {"autoscaling": {"type": "keda"}}, "monitoring": {"podMonitors": {"enabled": True}}},
        "needs worker.autoscaling.prometheus.address",
    ),
    (
        {"worker": {"autoscaling": {"type": "hpa"}}, "monitoring": {"podMonitors": {"enabled": True}}},
        "set monitoring.rules.enabled=true",
    ),
    (SCALED_BY_METRICS, "name in it where Prometheus runs"),
    (
        {"gateway": {"autoscaling": {"enabled": True, "targetOpenRequests": 200}}},
        "name in it where Prometheus runs",
    ),
    ({"gateway": {"ingress": {"enabled": True, "host": "h"}}}, "an empty networkPolicy.clients lets only pods"),
    (
        {"gateway": {"route": {"enabled": True, "parentRefs": [{"name": "public"}]}}},
        "an empty networkPolicy.clients lets only pods",
    ),
    ({"gateway": {"service": {"type": "LoadBalancer"}}}, "an empty networkPolicy.clients lets only pods"),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_bad_values_are_refused_with_what_to_change(render: Render, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RenderError, match=r"(?s).*") as refusal:
        render(**values)
    assert sentence in str(refusal.value)


def test_without_network_policies_nobody_need_be_named(render: Render) -> None:
    values = SCALED_BY_METRICS | {"gateway": {"service": {"type": "LoadBalancer"}}, "networkPolicy": {"enabled": False}}
    assert render(**values).of_kind("NetworkPolicy") == []


@pytest.mark.parametrize(
    "weights",
    [
        ["model.safetensors"],
        ["model.safetensors.index.json", "model-00001-of-00001.safetensors"],
        ["pytorch_model.bin"],
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"],
    ],
    ids=lambda weights: weights[0],
)
def test_weights_that_a_worker_finds_may_be_named(render: Render, tmp_path: Path, weights: list[str]) -> None:
    for name in weights:
        (tmp_path / name).write_text(json.dumps({"weight_map": {"embed_in": weights[-1]}}))
    assert find_shards(tmp_path) == [tmp_path / weights[-1]]
    assert render(model={"hub": hub_of(*weights)}).of_kind("StatefulSet")


def test_every_validation_has_a_case_in_which_it_refuses() -> None:
    validations = (CHART / "templates" / "validations.yaml").read_text()
    sentences = re.findall(r'fail \(?(?:printf )?"([^"]+)"', validations)
    assert len(sentences) == validations.count("{{- fail ")
    assert [sentence for sentence in sentences if not any(said in sentence for _, said in REFUSED)] == []


def test_the_schema_knows_every_value_and_no_other() -> None:
    def check(schema: dict[str, Any], values: dict[str, Any], path: str) -> None:
        if schema.get("additionalProperties") is not False or path.endswith(".options"):
            return
        known = set(schema["properties"]) - {"global"}
        assert known == set(values), path
        for key in known:
            if isinstance(values[key], dict):
                check(schema["properties"][key], values[key], f"{path}.{key}")

    schema = json.loads((CHART / "values.schema.json").read_text())
    check(schema, yaml.safe_load((CHART / "values.yaml").read_text()), "")


@pytest.mark.parametrize(("component", "settings"), [("gateway", GatewaySettings), ("worker", WorkerSettings)])
def test_the_schema_takes_every_option_that_the_chart_leaves_open(
    component: str, settings: type[GatewaySettings | WorkerSettings]
) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    options = set(schema["properties"][component]["properties"]["options"]["properties"])
    assert options == {name.replace("_", "-") for name in settings.model_fields} - CLOSED[component] - FOR_TESTS


@pytest.mark.parametrize(("component", "read"), [("gateway", read_gateway_settings), ("worker", read_worker_settings)])
def test_gateway_and_worker_understand_the_environment_they_are_given(
    release: Release,
    component: str,
    read: Callable[[list[str]], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [pod] = [pod for name, pod in release.pods().items() if name.endswith(component)]
    [container] = pod["spec"]["containers"]
    for variable in container["env"]:
        if variable["name"].endswith("REDIS_URL") and "valueFrom" in variable:
            value = f"rediss://{component}:secret@redis:6379/0"
        else:
            value = variable.get("value", "0123456789abcdef")
        monkeypatch.setenv(variable["name"], value.replace("$(REDIS_PASSWORD)", "secret"))
    assert read([])


def test_options_reach_the_process_as_they_were_written(render: Render) -> None:
    release = render(gateway={"options": {"max-message-bytes": 8388608, "reflection": False}})
    [container] = release.one("Deployment", "gateway")["spec"]["template"]["spec"]["containers"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert environment["OASST_GATEWAY_MAX_MESSAGE_BYTES"] == "8388608"
    assert environment["OASST_GATEWAY_REFLECTION"] == "false"


def test_workers_may_be_of_another_tag_than_gateways_while_a_release_is_upgraded(render: Render) -> None:
    """The queue has the functions of both by then: each waits for its own."""
    release = render(image={"tag": "8"}, gateway={"image": {"tag": "7"}})
    component = "app.kubernetes.io/component"
    images = {pod["metadata"]["labels"][component]: images_of(pod) for pod in release.pods().values()}
    assert (images["gateway"], images["worker"]) == (["oasst-gateway:7"], ["oasst-worker:8"])
    assert images["functions"] == ["oasst-gateway:7", "oasst-worker:8"]


def test_functions_come_from_one_image_where_both_are_of_one_version(render: Render) -> None:
    [job] = render(image={"tag": "8"}).of_kind("Job")
    assert images_of(job["spec"]["template"]) == ["oasst-gateway:8"]


def images_of(pod: Manifest) -> list[str]:
    return [container["image"] for container in pod["spec"]["containers"]]


def test_a_digest_wins_over_the_tag(render: Render) -> None:
    release = render(
        image={"registry": "registry.example.com", "tag": "7"}, gateway={"image": {"digest": "sha256:" + "0" * 64}}
    )
    [gateway] = release.one("Deployment", "gateway")["spec"]["template"]["spec"]["containers"]
    [worker] = release.one("StatefulSet", "worker")["spec"]["template"]["spec"]["containers"]
    assert gateway["image"] == "registry.example.com/oasst-gateway@sha256:" + "0" * 64
    assert worker["image"] == "registry.example.com/oasst-worker:7"


def test_a_long_release_name_still_gives_names_that_fit(renderer: Any) -> None:
    release = renderer.render({}, name="a" * 53)
    names = [each["metadata"]["name"] for each in (*release.objects, *release.tests)]
    assert max(map(len, names)) <= 63


def test_an_ingress_lets_in_the_api_and_nothing_else(render: Render) -> None:
    release = render(
        gateway={"ingress": {"enabled": True, "host": "chat.example.com", "tlsSecret": "chat-tls"}},
        networkPolicy={"clients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]},
    )
    [ingress] = release.of_kind("Ingress")
    [rule] = ingress["spec"]["rules"]
    paths = [path["path"] for path in rule["http"]["paths"]]
    assert paths == ["/oasst.v1.ChatService", "/oasst.v1.ModelService", "/oasst.v1.ScoringService"]
    assert ingress["spec"]["tls"] == [{"hosts": ["chat.example.com"], "secretName": "chat-tls"}]
