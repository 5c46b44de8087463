"""A stand-in Kubernetes API server: it knows the kinds a chart uses, has the objects it was given, accepts new ones.

Helm renders a chart for a cluster: it asks which kinds there are, then creates objects. This is as much of a cluster as
that takes. What it does not do: defaults, admission, controllers; it forgets what it is sent.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["KINDS", "running_api_server"]

# API version -> kind -> plural, as a path names it.
KINDS = {
    "v1": {
        "ConfigMap": "configmaps",
        "PersistentVolumeClaim": "persistentvolumeclaims",
        "Pod": "pods",
        "Secret": "secrets",
        "Service": "services",
        "ServiceAccount": "serviceaccounts",
    },
    "apps/v1": {"Deployment": "deployments", "StatefulSet": "statefulsets"},
    "autoscaling/v2": {"HorizontalPodAutoscaler": "horizontalpodautoscalers"},
    "batch/v1": {"Job": "jobs"},
    "networking.k8s.io/v1": {"Ingress": "ingresses", "NetworkPolicy": "networkpolicies"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "gateway.networking.k8s.io/v1": {"GRPCRoute": "grpcroutes"},
    "keda.sh/v1alpha1": {"ScaledObject": "scaledobjects", "TriggerAuthentication": "triggerauthentications"},
    "monitoring.coreos.com/v1": {
        "PodMonitor": "podmonitors",
        "PrometheusRule": "prometheusrules",
        "ServiceMonitor": "servicemonitors",
    },
}
_VERBS = ["create", "delete", "get", "list", "patch", "update"]


@contextmanager
def running_api_server(*objects: Mapping[str, Any]) -> Iterator[str]:
    """The server's URL; it answers as long as the context is open."""
    server = _Server({_path_of(each): each for each in objects})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def __init__(self, objects: Mapping[str, Mapping[str, Any]]) -> None:
        """`objects` by their paths."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects = objects


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/version":
            self._answer(HTTPStatus.OK, {"major": "1", "minor": "34", "gitVersion": "v1.34.0"})
        elif (discovered := _discover(path)) is not None:
            self._answer(HTTPStatus.OK, discovered)
        elif path in self.server.objects:
            self._answer(HTTPStatus.OK, self.server.objects[path])
        else:
            self._answer(HTTPStatus.NOT_FOUND, _status("NotFound", 404))

    def do_POST(self) -> None:
        self._echo(HTTPStatus.CREATED)

    def do_PUT(self) -> None:
        self._echo(HTTPStatus.OK)

    def do_PATCH(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(HTTPStatus.OK, self.server.objects[self.path.partition("?")[0]])

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged."""

    def _echo(self, status: HTTPStatus) -> None:
        self._send(status, self.rfile.read(int(self.headers["Content-Length"])), self.headers["Content-Type"])

    def _answer(self, status: HTTPStatus, document: Mapping[str, Any]) -> None:
        self._send(status, json.dumps(document).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _path_of(manifest: Mapping[str, Any]) -> str:
    version, metadata = manifest["apiVersion"], manifest["metadata"]
    root = "apis" if "/" in version else "api"
    plural = KINDS[version][manifest["kind"]]
    return f"/{root}/{version}/namespaces/{metadata['namespace']}/{plural}/{metadata['name']}"


def _discover(path: str) -> Mapping[str, Any] | None:
    """The answer to a question about the kinds there are; None if `path` asks something else."""
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [version for version in KINDS if "/" in version]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(version) for version in versions]}
    version = path.removeprefix("/apis/") if path.startswith("/apis/") else path.removeprefix("/api/")
    if version not in KINDS:
        return None
    resources = [
        {"name": plural, "kind": kind, "namespaced": True, "verbs": _VERBS} for kind, plural in KINDS[version].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _group(version: str) -> Mapping[str, Any]:
    named = {"groupVersion": version, "version": version.partition("/")[2]}
    return {"name": version.partition("/")[0], "versions": [named], "preferredVersion": named}


def _status(reason: str, code: int) -> Mapping[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}
