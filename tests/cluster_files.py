"""The files of cluster/, read."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
LAUNCHER = ("aws.yaml", "gcp.yaml")
MANIFESTS = sorted(path.name for path in (CLUSTER / "kuberay").glob("*.yaml"))


def launcher(name: str) -> dict[str, Any]:
    """A file of `ray up`."""
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return loaded


def manifests(name: str) -> list[dict[str, Any]]:
    """The objects of a file for Kubernetes."""
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text()))


def every_manifest() -> list[tuple[str, dict[str, Any]]]:
    """File and object, of all files for Kubernetes."""
    return [(name, item) for name in MANIFESTS for item in manifests(name)]


def ray_clusters() -> list[tuple[str, dict[str, Any]]]:
    """File and RayClusterSpec, wherever one stands."""
    places = {
        "RayCluster": lambda spec: spec,
        "RayJob": lambda spec: spec["rayClusterSpec"],
        "RayService": lambda spec: spec["rayClusterConfig"],
        "RayCronJob": lambda spec: spec["jobTemplate"]["rayClusterSpec"],
    }
    return [(name, places[item["kind"]](item["spec"])) for name, item in every_manifest() if item["kind"] in places]


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod specs of a RayClusterSpec, the head's first."""
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def serve_config() -> dict[str, Any]:
    """The config of the HTTP API."""
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    return loaded
