"""The chart as Helm itself renders it, without a cluster."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

__all__ = ["CHART", "PROFILES", "Manifest", "Release", "RenderError", "Renderer", "read_profile"]

CHART = Path(__file__).parents[2] / "helm" / "oasst-serve"
PROFILES = sorted(path.stem for path in (CHART / "profiles").glob("*.yaml"))

Manifest = dict[str, Any]


class RenderError(Exception):
    """Helm refused the chart or the values; the message is what a person at the command line reads."""


@dataclass(frozen=True)
class Release:
    """What an installation of the chart creates."""

    objects: tuple[Manifest, ...]
    # What `helm test` creates.
    tests: tuple[Manifest, ...]
    notes: str
    text: str

    def of_kind(self, *kinds: str) -> list[Manifest]:
        return [manifest for manifest in (*self.objects, *self.tests) if manifest["kind"] in kinds]

    def one(self, kind: str, name: str) -> Manifest:
        """The object of this kind whose name ends so."""
        [manifest] = [each for each in self.of_kind(kind) if each["metadata"]["name"].endswith(name)]
        return manifest

    def pods(self) -> dict[str, Manifest]:
        """Name -> the pod or the template of pods."""
        makers = self.of_kind("Deployment", "StatefulSet", "Job")
        templates = {each["metadata"]["name"]: each["spec"]["template"] for each in makers}
        return templates | {each["metadata"]["name"]: each for each in self.of_kind("Pod")}


class Renderer:
    """Helm against an API server. `url` is one that knows the chart's kinds."""

    def __init__(self, url: str) -> None:
        # 120 MB of Helm are inside, for Linux on x86-64 alone: not loaded where only the chart's path is wanted.
        import helm_sdkpy

        self._helm = helm_sdkpy
        self._kubeconfig = yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "stand-in", "cluster": {"server": url}}],
                "users": [{"name": "nobody", "user": {}}],
                "contexts": [{"name": "test", "context": {"cluster": "stand-in", "user": "nobody"}}],
                "current-context": "test",
            }
        )
        self._render = cache(self._render_json)

    def render(self, values: Mapping[str, Any], *, name: str = "chat") -> Release:
        """The release with these values on top of the chart's own.

        Raises:
            RenderError: if the schema, a validation or a template fails.
        """
        return self._render(json.dumps(values, sort_keys=True), name)

    def _render_json(self, values: str, name: str) -> Release:
        configuration = self._helm.Configuration(namespace="oasst", kubeconfig=self._kubeconfig)
        install = self._helm.Install(configuration)
        try:
            release = asyncio.run(install.run(name, str(CHART), values=json.loads(values), wait=False))
        except self._helm.HelmError as error:
            raise RenderError(str(error)) from error
        return Release(
            objects=_parse(release["manifest"]),
            tests=tuple(manifest for hook in release["hooks"] for manifest in _parse(hook["manifest"])),
            notes=release["info"]["notes"],
            text="".join([release["manifest"], *("---\n" + hook["manifest"] for hook in release["hooks"])]),
        )


def read_profile(name: str) -> Mapping[str, Any]:
    """The values of a profile that comes with the chart."""
    values: Mapping[str, Any] = yaml.safe_load((CHART / "profiles" / f"{name}.yaml").read_text())
    return values


def _parse(manifests: str) -> tuple[Manifest, ...]:
    return tuple(manifest for manifest in yaml.safe_load_all(manifests) if manifest)
