"""Inputs of a plan: the size of the data, the settings of the stages, the rates of a CPU, the nodes of a cluster.

Nodes are read from cluster files of `ray up` or from manifests of KubeRay.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from pydantic import Field, model_validator

from rayrec.config import Settings
from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.errors import InputError
from rayrec.importing.import_plan import BUCKET_BYTES, MAX_BUCKETS, MIN_BUCKETS
from rayrec.model.train_config import TrainConfig
from rayrec.storage.artifacts import DatasetManifest
from rayrec.storage.workspace import HISTORIES

LISTED = 5  # number of largest buckets and longest histories in `Skew`
CSV_BYTES = 33  # bytes per play with user, song and Unix seconds, measured
ASSUMED_SKEW = 1.25  # plays of the largest bucket divided by the mean, if there is no data set to measure
BUILT_IN_FROM = "two shared cores of an AMD EPYC without a GPU, 2026-11-24"
BUILT_IN = {
    "import_plays_per_second_per_cpu": 650_000.0,
    "embed_tokens_per_second_per_cpu": 262_000.0,
    "train_plays_per_second_per_cpu": 23_300.0,
    "retrieval_plays_per_second_per_cpu": 100_000.0,
    "taste_plays_per_second_per_cpu": 322_000.0,
    "read_plays_per_second_per_cpu": 4_500_000.0,
    "rank_queries_per_second_per_cpu": 125.0,
    "evaluate_queries_per_second_per_cpu": 90.0,
    "recommend_users_per_second_per_cpu": 190.0,
}
TRAIN_ON_GPU = "train_plays_per_second_per_gpu"  # no built-in rate: only a file of rates can have it
ANSWERS = "answers_per_second_per_cpu"  # of `rayrec bench answers --save`; not built in, since catalogs differ too much
_EMBED_DEFAULTS, _TRAIN_DEFAULTS = EmbedConfig(), TrainConfig()
GIB = 1 << 30
# Share of a pod's memory for tasks. The rest is for the object store: Ray's default share of it is 30 %.
HEAP_SHARE = 0.7
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": GIB, "Ti": 1 << 40}
# Ray's name of an accelerator -> GiB of memory of one device, from the manufacturers' data sheets.
GPU_GIB = {"T4": 16, "V100": 16, "A10G": 24, "L4": 24, "L40S": 48, "A100": 40, "A100-80G": 80, "H100": 80, "H200": 141}


@dataclass(frozen=True, kw_only=True)
class Skew:
    """The largest buckets and the longest histories of a data set.

    The plays of a bucket are estimated from the size of its files; the plays of a user are counted.
    """

    largest_buckets: list[tuple[int, int]]  # (bucket, approximate number of plays), largest first
    longest_histories: list[tuple[str, int]]  # (user id, number of plays) in the largest bucket, longest first


def measure_skew(dataset: Dataset) -> Skew:
    """Return the skew of a data set from one listing of files and the history lengths of its largest bucket.

    This is cheap for any number of users.
    """
    sizes = _bucket_bytes(dataset)
    total = max(1, sum(sizes.values()))
    bucket_plays = [
        (bucket, round(dataset.manifest.plays * size / total)) for bucket, size in sizes.most_common(LISTED)
    ]
    return Skew(
        largest_buckets=bucket_plays,
        longest_histories=_longest_histories(dataset, bucket_plays[0][0]) if bucket_plays else [],
    )


def _bucket_bytes(dataset: Dataset) -> Counter[int]:
    sizes = dataset.workspace.sizes(HISTORIES)
    buckets = range(dataset.manifest.buckets)
    return Counter(
        {bucket: sum(sizes.get(path, 0) for path in dataset.manifest.histories_files(bucket)) for bucket in buckets}
    )


def _longest_histories(dataset: Dataset, bucket: int) -> list[tuple[str, int]]:
    lengths_by_user: Counter[str] = Counter()
    for path in dataset.manifest.histories_files(bucket):
        with dataset.workspace.open_input(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(5_000, columns=[columns.USER, columns.SONGS]):
                lengths = np.diff(batch.column(columns.SONGS).offsets.to_numpy())
                longest_rows = np.argsort(-lengths, kind="stable")[:LISTED]
                for user, length in zip(
                    batch.column(columns.USER).take(longest_rows).to_pylist(), lengths[longest_rows], strict=True
                ):
                    lengths_by_user[user] += int(length)
    return lengths_by_user.most_common(LISTED)


class PlanConfig(Settings):
    """The size of the data and the settings of the stages; the defaults are those of the stages."""

    users: int | None = Field(
        None, ge=1, le=10**10, description="Number of users, if no data set exists yet, 10 billion at most"
    )
    plays: int | None = Field(None, ge=1, le=10**14, description="Number of plays of all users, 100 trillion at most")
    songs: int | None = Field(None, ge=1, le=10**10, description="Number of songs, 10 billion at most")
    dim: int = Field(_EMBED_DEFAULTS.dim, ge=1, description="Embedding dimension")
    hidden_dim: int = Field(_TRAIN_DEFAULTS.hidden_dim, ge=1, description="Hidden size of the recurrent network")
    embed_epochs: int = Field(_EMBED_DEFAULTS.epochs, ge=1, description="Epochs of word2vec")
    epochs: int = Field(_TRAIN_DEFAULTS.epochs, ge=1, description="Maximum epochs of the network")
    window: int = Field(
        _TRAIN_DEFAULTS.window, ge=1, description="Sequence length of truncated backpropagation, in plays"
    )
    batch: int = Field(0, ge=0, description="Batch size in windows, over all workers; 0: 64 per worker")
    workers: int = Field(0, ge=0, description="Training workers; 0: one per GPU, or one per CPU node without GPUs")
    gpu: bool = Field(_TRAIN_DEFAULTS.gpu, description="Train on GPUs")
    validation: bool = Field(
        True, description="Hold back a validation range: embeddings, network and retrieval are fitted twice"
    )
    buckets: int = Field(
        0, ge=0, le=MAX_BUCKETS, description="Buckets of users; 0: one per 64 MiB of input, 16 to 4096"
    )
    queries: int = Field(100_000, ge=1, description="Queries that evaluate samples")
    k: int = Field(100, ge=1, description="Songs per user of recommend --all")
    nodes: int = Field(0, ge=0, description="Number of CPU nodes; 0: the cluster's maximum")
    serve_rate: float = Field(100.0, gt=0, description="Requests per second that the server has to answer")

    @model_validator(mode="after")
    def _check_together(self) -> "PlanConfig":
        counts = (self.users, self.plays, self.songs)
        if None in counts and counts != (None, None, None):
            raise ValueError(
                "--users, --plays and --songs belong together; give all of them, or none to plan for the data set of "
                "the workspace"
            )
        return self

    @property
    def fits(self) -> int:
        """Number of fits of embeddings, network and retrieval: the final one and, with a validation range, another."""
        return 2 if self.validation else 1


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """The size of the data. `largest_bucket` is a number of plays, assumed unless it was measured on a data set."""

    users: int
    plays: int
    songs: int
    buckets: int
    largest_bucket: int
    looked_at: bool  # True if `largest_bucket` was measured on a data set

    @classmethod
    def assumed(cls, users: int, plays: int, songs: int, buckets: int = 0) -> "DataSize":
        """Return the size from counts alone, each at least 1; with `buckets` 0 the number of buckets is derived."""
        bucket_count = buckets or min(MAX_BUCKETS, max(MIN_BUCKETS, ceil(plays * CSV_BYTES / BUCKET_BYTES)))
        largest_bucket = ceil(plays / bucket_count * ASSUMED_SKEW)
        return cls(
            users=users, plays=plays, songs=songs, buckets=bucket_count, largest_bucket=largest_bucket, looked_at=False
        )

    @classmethod
    def of(cls, manifest: DatasetManifest, skew: Skew) -> "DataSize":
        """Return the size of an existing data set."""
        return cls(
            users=manifest.users,
            plays=manifest.plays,
            songs=manifest.songs,
            buckets=manifest.buckets,
            largest_bucket=max([plays for _, plays in skew.largest_buckets], default=manifest.plays),
            looked_at=True,
        )


def read_rates(path: str) -> dict[str, float]:
    """Return the rates in a file that `rayrec bench ... --save` wrote. Raises `InputError` for any other file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))["rates"]
        rates = {str(name): float(rate) for name, rate in content.items()}
    except OSError as error:
        raise InputError(f"rates file {path} cannot be read: {error.strerror}; check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has no rates; expected a file written by `rayrec bench scale --save FILE`") from error
    invalid_names = [name for name, rate in rates.items() if not rate > 0]
    if invalid_names:
        raise InputError(f"{invalid_names[0]} in {path} is {rates[invalid_names[0]]}; expected a number above 0")
    return rates


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """A type of node. Sizes are in bytes per node."""

    name: str
    cpus: int
    gpus: int
    memory: int  # for tasks, without the object store
    disk: int | None  # None if the file does not give it
    gpu_memory: int | None  # of one GPU; None without a GPU or if the file does not name the GPU
    most: int  # maximum number of nodes
    head: bool = False


@dataclass(frozen=True, kw_only=True)
class ClusterFile:
    """The nodes that a cluster may have at most."""

    name: str
    nodes: list[NodeType]
    most_nodes: int  # maximum number of worker nodes at the same time, all types together

    @property
    def workers(self) -> list[NodeType]:
        """The types of node that run tasks."""
        return [node for node in self.nodes if node.cpus and node.most]


def read_cluster(path: str) -> ClusterFile:
    """Return the nodes of a `ray up` file, or of the first RayCluster, RayJob, RayService or RayCronJob in a manifest.

    Raises `InputError` for any other file.
    """
    try:
        documents = [document for document in yaml.safe_load_all(Path(path).read_text(encoding="utf-8")) if document]
    except OSError as error:
        raise InputError(f"cluster file {path} cannot be read: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"cluster file {path} is not YAML: {str(error).splitlines()[0]}") from error
    for document in documents:
        if not isinstance(document, dict):
            continue
        try:
            if "available_node_types" in document:
                return _launcher_cluster(path, document)
            spec = _ray_cluster_spec(document)
            if spec is not None:
                return _kuberay_cluster(path, spec)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(
                f"cluster file {path} is not valid: {type(error).__name__} {error}; compare it with the files in "
                "cluster/"
            ) from error
    raise InputError(
        f"cluster file {path} has neither available_node_types nor a RayCluster; expected a file such as "
        "cluster/aws.yaml or cluster/kuberay/raycluster.yaml"
    )


def _launcher_cluster(path: str, config: dict[str, Any]) -> ClusterFile:
    max_workers = int(config.get("max_workers", 2))  # Ray's default
    nodes = []
    for name, node_type in config["available_node_types"].items():
        resources, is_head = node_type.get("resources") or {}, name == config.get("head_node_type")
        if "memory" not in resources:
            raise InputError(
                f"cluster file {path}: node type {name} has no `memory` resource; add 70 % of the machine's memory, "
                "in bytes"
            )
        nodes.append(
            NodeType(
                name=name,
                cpus=int(resources.get("CPU", 0)),
                gpus=int(resources.get("GPU", 0)),
                memory=int(resources["memory"]),
                disk=_boot_disk(node_type.get("node_config") or {}),
                gpu_memory=_gpu_memory(resources),
                most=1 if is_head else min(max_workers, int(node_type.get("max_workers", max_workers))),
                head=is_head,
            )
        )
    return ClusterFile(name=str(config["cluster_name"]), nodes=nodes, most_nodes=max_workers)


def _boot_disk(node_config: dict[str, Any]) -> int | None:
    """Return the bytes of the largest disk in a node configuration of AWS or Google Cloud, None without a disk."""
    aws_sizes = [disk["Ebs"]["VolumeSize"] for disk in node_config.get("BlockDeviceMappings", []) if "Ebs" in disk]
    gcp_sizes = [disk.get("initializeParams", {}).get("diskSizeGb") for disk in node_config.get("disks", [])]
    sizes = [int(size) for size in [*aws_sizes, *gcp_sizes] if size]
    return max(sizes) * 10**9 if sizes else None


def _ray_cluster_spec(document: dict[str, Any]) -> dict[str, Any] | None:
    spec = document.get("spec") or {}
    spec_by_kind = {
        "RayCluster": spec,
        "RayJob": spec.get("rayClusterSpec"),
        "RayService": spec.get("rayClusterConfig"),
        "RayCronJob": (spec.get("jobTemplate") or {}).get("rayClusterSpec"),
    }
    return spec_by_kind.get(str(document.get("kind")))


def _kuberay_cluster(path: str, spec: dict[str, Any]) -> ClusterFile:
    nodes = [_pod_node("head", spec["headGroupSpec"], 1, is_head=True)]
    for group in spec.get("workerGroupSpecs", []):
        max_nodes = group.get("maxReplicas") if spec.get("enableInTreeAutoscaling") else group.get("replicas", 0)
        nodes.append(_pod_node(group["groupName"], group, int(max_nodes or 0)))
    return ClusterFile(name=Path(path).stem, nodes=nodes, most_nodes=sum(node.most for node in nodes[1:]))


def _pod_node(name: str, group: dict[str, Any], max_nodes: int, *, is_head: bool = False) -> NodeType:
    container = group["template"]["spec"]["containers"][0]
    limits = {**container["resources"].get("requests", {}), **container["resources"].get("limits", {})}
    if "memory" not in limits:
        raise InputError(f"group {name} has no memory limit, which Ray uses as the memory of a node; add one")
    start_params = group.get("rayStartParams") or {}
    cpus = int(start_params.get("num-cpus", int(quantity(limits.get("cpu", 0)))))
    ray_resources = {**_parse_resources(start_params.get("resources", "")), **(group.get("resources") or {})}
    return NodeType(
        name=name,
        cpus=cpus,
        gpus=int(limits.get("nvidia.com/gpu", 0)),
        memory=int(quantity(limits["memory"]) * HEAP_SHARE),
        disk=int(quantity(limits["ephemeral-storage"])) if "ephemeral-storage" in limits else None,
        gpu_memory=_gpu_memory(ray_resources),
        most=max_nodes,
        head=is_head,
    )


def _parse_resources(text: str) -> dict[str, Any]:
    """Parse Ray's custom resources as written in a flag of `ray start`: JSON in quotes."""
    cleaned = text.strip("'").replace('\\"', '"').strip('"')
    return dict(json.loads(cleaned)) if cleaned else {}


def _gpu_memory(resources: dict[str, Any]) -> int | None:
    names = [name.removeprefix("accelerator_type:") for name in _accelerators(resources)]
    known_sizes = [GPU_GIB[name] for name in names if name in GPU_GIB]
    return known_sizes[0] * GIB if known_sizes else None


def _accelerators(resources: dict[str, Any]) -> Iterator[str]:
    return (name for name in resources if name.startswith("accelerator_type:"))


def quantity(value: Any) -> float:
    """Convert a Kubernetes quantity to a number: 0.5 for `500m`, 17179869184 for `16Gi`.

    Raises `ValueError` for other text.
    """
    match = re.fullmatch(r"([0-9.]+)(m|[kMGT]i?|Ki)?", str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a quantity such as 4, 500m or 16Gi")
    number, unit = float(match[1]), match[2] or ""
    return number / 1000 if unit == "m" else number * UNITS[unit]
