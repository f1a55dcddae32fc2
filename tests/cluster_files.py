"""Functions that read the files in cluster/."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
LAUNCHER = ("aws.yaml", "gcp.yaml")
MANIFESTS = sorted(path.name for path in (CLUSTER / "kuberay").glob("*.yaml"))


def launcher(name: str) -> dict[str, Any]:
    """Return the content of a file for `ray up`."""
    content: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return content


def manifests(name: str) -> list[dict[str, Any]]:
    """Return the objects of a Kubernetes file."""
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text()))


def every_manifest() -> list[tuple[str, dict[str, Any]]]:
    """Return (file name, object) for each object of all Kubernetes files."""
    return [(name, item) for name in MANIFESTS for item in manifests(name)]


def ray_clusters() -> list[tuple[str, dict[str, Any]]]:
    """Return (file name, RayClusterSpec) for each Kubernetes object that contains a RayClusterSpec."""
    spec_getters = {
        "RayCluster": lambda spec: spec,
        "RayJob": lambda spec: spec["rayClusterSpec"],
        "RayService": lambda spec: spec["rayClusterConfig"],
        "RayCronJob": lambda spec: spec["jobTemplate"]["rayClusterSpec"],
    }
    return [
        (name, spec_getters[item["kind"]](item["spec"]))
        for name, item in every_manifest()
        if item["kind"] in spec_getters
    ]


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pod specs of a RayClusterSpec, the head's first."""
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def serve_config() -> dict[str, Any]:
    """Return the Serve configuration of the HTTP API."""
    content: dict[str, Any] = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    return content
