"""Reads what nodes a cluster may have: files of `ray up`, and manifests of KubeRay."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rayrec.errors import InputError

GIB = 1 << 30
# Of what a pod may use, the rest is the object store's: Ray's default share of it is 30 %.
HEAP_SHARE = 0.7
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": GIB, "Ti": 1 << 40}
# By the names that Ray gives accelerators; GiB of one device, from the makers' data sheets.
GPU_GIB = {"T4": 16, "V100": 16, "A10G": 24, "L4": 24, "L40S": 48, "A100": 40, "A100-80G": 80, "H100": 80, "H200": 141}


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """Nodes of one kind; bytes of one node."""

    name: str
    cpus: int
    gpus: int
    memory: int  # that tasks may use, beside the object store
    disk: int | None  # None where the file does not say
    gpu_memory: int | None  # of one GPU; None where there is none, or which one is not said
    most: int  # nodes there may be
    head: bool = False


@dataclass(frozen=True, kw_only=True)
class ClusterFile:
    """The nodes that a cluster may grow to."""

    name: str
    nodes: list[NodeType]
    most_nodes: int  # workers at once, of all kinds

    @property
    def workers(self) -> list[NodeType]:
        """Those that work lands on."""
        return [node for node in self.nodes if node.cpus and node.most]


def read_cluster(path: str) -> ClusterFile:
    """The nodes of a file of `ray up`, or of the first RayCluster, RayJob, RayService or RayCronJob in a manifest.

    Raises `InputError` for a file that is neither.
    """
    try:
        documents = [item for item in yaml.safe_load_all(Path(path).read_text(encoding="utf-8")) if item]
    except OSError as error:
        raise InputError(f"cluster file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"cluster file {path} is not YAML: {str(error).splitlines()[0]}") from error
    for item in documents:
        if not isinstance(item, dict):
            continue
        try:
            if "available_node_types" in item:
                return _launcher(path, item)
            spec = _ray_cluster_spec(item)
            if spec is not None:
                return _kuberay(path, spec)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(
                f"cluster file {path} is not valid: {type(error).__name__} {error}; compare it with cluster/"
            ) from error
    raise InputError(
        f"cluster file {path} has neither available_node_types nor a RayCluster; expected a file such as "
        "cluster/aws.yaml or cluster/kuberay/raycluster.yaml"
    )


def _launcher(path: str, config: dict[str, Any]) -> ClusterFile:
    most = int(config.get("max_workers", 2))  # Ray's default
    nodes = []
    for name, kind in config["available_node_types"].items():
        resources, head = kind.get("resources") or {}, name == config.get("head_node_type")
        if "memory" not in resources:
            raise InputError(
                f"cluster file {path}: {name} has no memory; add it to its resources, in bytes, 0.7 of the machine's"
            )
        nodes.append(
            NodeType(
                name=name,
                cpus=int(resources.get("CPU", 0)),
                gpus=int(resources.get("GPU", 0)),
                memory=int(resources["memory"]),
                disk=_boot_disk(kind.get("node_config") or {}),
                gpu_memory=_gpu_memory(resources),
                most=1 if head else min(most, int(kind.get("max_workers", most))),
                head=head,
            )
        )
    return ClusterFile(name=str(config["cluster_name"]), nodes=nodes, most_nodes=most)


def _boot_disk(node_config: dict[str, Any]) -> int | None:
    """Bytes, of AWS's or Google Cloud's way of saying it."""
    aws = [item["Ebs"]["VolumeSize"] for item in node_config.get("BlockDeviceMappings", []) if "Ebs" in item]
    gcp = [item.get("initializeParams", {}).get("diskSizeGb") for item in node_config.get("disks", [])]
    sizes = [int(size) for size in [*aws, *gcp] if size]
    return max(sizes) * 10**9 if sizes else None


def _ray_cluster_spec(item: dict[str, Any]) -> dict[str, Any] | None:
    spec = item.get("spec") or {}
    places = {
        "RayCluster": spec,
        "RayJob": spec.get("rayClusterSpec"),
        "RayService": spec.get("rayClusterConfig"),
        "RayCronJob": (spec.get("jobTemplate") or {}).get("rayClusterSpec"),
    }
    return places.get(str(item.get("kind")))


def _kuberay(path: str, spec: dict[str, Any]) -> ClusterFile:
    nodes = [_pod_node("head", spec["headGroupSpec"], 1, head=True)]
    for group in spec.get("workerGroupSpecs", []):
        most = group.get("maxReplicas") if spec.get("enableInTreeAutoscaling") else group.get("replicas", 0)
        nodes.append(_pod_node(group["groupName"], group, int(most or 0)))
    return ClusterFile(name=Path(path).stem, nodes=nodes, most_nodes=sum(node.most for node in nodes[1:]))


def _pod_node(name: str, group: dict[str, Any], most: int, *, head: bool = False) -> NodeType:
    container = group["template"]["spec"]["containers"][0]
    limits = {**container["resources"].get("requests", {}), **container["resources"].get("limits", {})}
    if "memory" not in limits:
        raise InputError(f"group {name} has no memory limit, and Ray takes a node's memory from it; add one")
    started = group.get("rayStartParams") or {}
    cpus = int(started.get("num-cpus", int(quantity(limits.get("cpu", 0)))))
    named = {**_json(started.get("resources", "")), **(group.get("resources") or {})}
    return NodeType(
        name=name,
        cpus=cpus,
        gpus=int(limits.get("nvidia.com/gpu", 0)),
        memory=int(quantity(limits["memory"]) * HEAP_SHARE),
        disk=int(quantity(limits["ephemeral-storage"])) if "ephemeral-storage" in limits else None,
        gpu_memory=_gpu_memory(named),
        most=most,
        head=head,
    )


def _json(text: str) -> dict[str, Any]:
    """Ray's custom resources as a flag of `ray start` holds them: JSON in quotes."""
    cleaned = text.strip("'").replace('\\"', '"').strip('"')
    return dict(json.loads(cleaned)) if cleaned else {}


def _gpu_memory(resources: dict[str, Any]) -> int | None:
    names = [name.removeprefix("accelerator_type:") for name in _accelerators(resources)]
    known = [GPU_GIB[name] for name in names if name in GPU_GIB]
    return known[0] * GIB if known else None


def _accelerators(resources: dict[str, Any]) -> Iterator[str]:
    return (name for name in resources if name.startswith("accelerator_type:"))


def quantity(value: Any) -> float:
    """A quantity of Kubernetes as a number: `500m` is 0.5, `16Gi` is 17179869184. Raises `ValueError` for others."""
    match = re.fullmatch(r"([0-9.]+)(m|[kMGT]i?|Ki)?", str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a quantity such as 4, 500m or 16Gi")
    number, unit = float(match[1]), match[2] or ""
    return number / 1000 if unit == "m" else number * UNITS[unit]
