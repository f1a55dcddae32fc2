"""The nodes that a cluster may have, read from the files that launch it."""

from pathlib import Path

import pytest

from rayrec.errors import InputError
from rayrec.jobs.planning.plan_inputs import GIB, quantity, read_cluster

CLUSTER_FOLDER = Path(__file__).parents[4] / "cluster"


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_a_file_of_ray_up_says_nodes_memory_disk_and_gpus(name: str) -> None:
    cluster = read_cluster(str(CLUSTER_FOLDER / name))
    nodes = {node.name: node for node in cluster.nodes}
    assert cluster.most_nodes == 80
    assert [node.name for node in cluster.workers] == ["cpu-spot", "cpu-on-demand", "gpu-spot", "gpu-on-demand"]
    assert nodes["head"].head
    assert nodes["cpu-spot"].cpus == 16
    assert nodes["cpu-spot"].disk == 200 * 10**9
    assert nodes["cpu-spot"].memory == pytest.approx(0.7 * 128 * GIB, rel=1e-6)
    assert (nodes["gpu-spot"].gpus, nodes["gpu-spot"].gpu_memory) == (1, 24 * GIB)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob-train.yaml", "rayservice.yaml", "nightly.yaml"])
def test_a_manifest_of_kuberay_says_nodes_memory_and_disk_too(name: str) -> None:
    cluster = read_cluster(str(CLUSTER_FOLDER / "kuberay" / name))
    head, *workers = cluster.nodes
    assert (head.cpus, head.head) == (0, True)
    assert workers
    assert all(node.memory and node.disk and node.most for node in workers)
    assert cluster.most_nodes == sum(node.most for node in workers)


def test_pods_leave_a_share_of_their_memory_to_the_object_store() -> None:
    nodes = {node.name: node for node in read_cluster(str(CLUSTER_FOLDER / "kuberay" / "raycluster.yaml")).nodes}
    assert nodes["cpu-spot"].memory == int(0.7 * 120 * GIB)
    assert nodes["gpu-spot"].gpu_memory == 24 * GIB


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), (4, 4), ("500m", 0.5), ("16Gi", 16 * GIB), ("1.5G", 1.5e9), ("2Ki", 2048)],
)
def test_quantities_of_kubernetes_are_numbers(text: object, value: float) -> None:
    assert quantity(text) == value


def test_a_cluster_without_autoscaling_has_a_fixed_number_of_nodes(tmp_path: Path) -> None:
    path = tmp_path / "fixed.yaml"
    text = (CLUSTER_FOLDER / "kuberay" / "raycluster.yaml").read_text()
    path.write_text(text.replace("enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false"))
    assert read_cluster(str(path)).most_nodes == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cluster: [", "is not YAML"),
        ("kind: Deployment", "neither available_node_types nor a RayCluster"),
        ("cluster_name: a\navailable_node_types: {a: {resources: {CPU: 4}}}", "node type a has no `memory` resource"),
        ("kind: RayCluster\nspec: {headGroupSpec: {}}", "is not valid"),
    ],
)
def test_other_files_are_refused_with_what_is_wrong(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_cluster(str(path))
    with pytest.raises(InputError, match="cannot be read"):
        read_cluster(str(tmp_path / "missing.yaml"))
