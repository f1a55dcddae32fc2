"""Values that occur in several files agree."""

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cluster_files import CLUSTER, LAUNCHER, ROOT, every_manifest, launcher, pods, ray_clusters, serve_config
from dockerfile_parse import DockerfileParser
from pins import pins
from ray.serve.schema import ServeDeploySchema

import rayrec
from rayrec.config import from_mapping, to_mapping
from rayrec.jobs.submit import IMAGE_PYTHON
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.online.redis_store import PASSWORD_VARIABLE
from rayrec.serving.deployments import DeploymentConfig, build
from rayrec.serving.middleware import KEYS_VARIABLE as KEYS_VARIABLE
from rayrec.serving.run import REQUEST_SECONDS, SERVE_SETTINGS
from rayrec_cli.main import app

PYPROJECT = (ROOT / "pyproject.toml").read_text()
CONSTRAINTS = pins("3.11")
IMAGE = re.compile(r"registry\.example\.com/rayrec:(?P<version>[\d.]+)-(?P<kind>cpu|gpu)")


def test_every_image_is_this_version_of_rayrec() -> None:
    texts = [path.read_text() for path in [*CLUSTER.rglob("*.yaml"), CLUSTER / "Dockerfile", CLUSTER / "README.md"]]
    matches = [match for text in texts for match in IMAGE.finditer(text)]
    assert len(matches) > 20
    assert {match["version"] for match in matches} == {rayrec.__version__}


@pytest.mark.parametrize(("name", "spec"), ray_clusters())
def test_gpu_pods_have_the_gpu_image_and_the_others_have_not(name: str, spec: dict[str, Any]) -> None:
    for pod in pods(spec):
        (container,) = pod["containers"]
        needs_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"].endswith("-gpu" if needs_gpu else "-cpu")


@pytest.mark.parametrize("name", LAUNCHER)
def test_gpu_machines_have_the_gpu_image_and_the_others_have_not(name: str) -> None:
    config = launcher(name)
    assert config["docker"]["image"].endswith("-cpu")
    for node in config["available_node_types"].values():
        image = node.get("docker", {}).get("worker_image", config["docker"]["image"])
        assert image.endswith("-gpu" if "GPU" in node["resources"] else "-cpu")


def test_serve_runs_on_a_cluster_as_it_does_under_rayrec_serve() -> None:
    """Serve runs behind HAProxy, which it starts through the wrapper that both stages of the image write."""
    parser = DockerfileParser(fileobj=(CLUSTER / "Dockerfile").open("rb"))
    assignment_groups = [shlex.split(item["value"]) for item in parser.structure if item["instruction"] == "ENV"]
    environment = dict(assignment.split("=", 1) for assignments in assignment_groups for assignment in assignments)
    assert {name: environment.get(name) for name in SERVE_SETTINGS} == SERVE_SETTINGS
    wrapper = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    runs = [
        item["value"]
        for item in parser.structure
        if item["instruction"] == "RUN" and "write_haproxy_wrapper" in item["value"]
    ]
    assert len(runs) == 2
    assert all(f"Path('{Path(wrapper).parent}')" in run for run in runs)


def test_kubernetes_waits_for_the_requests_at_work_and_leaves_serve_as_the_image_sets_it() -> None:
    (spec,) = (spec for name, spec in ray_clusters() if name == "rayservice.yaml")
    replica: Any = build(serve_config()["applications"][0]["args"])._bound_deployment
    shutdown_seconds = REQUEST_SECONDS + replica._deployment_config.graceful_shutdown_timeout_s
    for pod in pods(spec):
        assert pod["terminationGracePeriodSeconds"] > shutdown_seconds
        (container,) = pod["containers"]
        assert {item["name"] for item in container["env"]}.isdisjoint(SERVE_SETTINGS)


def test_replicas_on_a_cluster_come_and_go_with_the_requests_at_work() -> None:
    arguments = serve_config()["applications"][0]["args"]
    replica: Any = build(arguments)._bound_deployment
    scaling = replica._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas) == (arguments["replicas"], arguments["replicas"])
    assert scaling.max_replicas == arguments["max_replicas"] > arguments["replicas"]
    assert scaling.target_ongoing_requests == arguments["target_ongoing"]
    (spec,) = (spec for name, spec in ray_clusters() if name == "rayservice.yaml")
    (group,) = spec["workerGroupSpecs"]
    assert spec["enableInTreeAutoscaling"]
    assert (group["minReplicas"], group["maxReplicas"]) == (arguments["replicas"], arguments["max_replicas"])


def test_ray_is_the_pinned_one_everywhere() -> None:
    assert {spec["rayVersion"] for _, spec in ray_clusters()} == {CONSTRAINTS["ray"]} == {version("ray")}


def test_python_of_the_image_is_one_that_the_project_allows_and_the_constraints_were_made_with() -> None:
    (python,) = set(re.findall(r"python:(\d+\.\d+)\.\d+-", (CLUSTER / "Dockerfile").read_text()))
    low, high = re.search(r'requires-python = ">=(\d+\.\d+),<(\d+\.\d+)"', PYPROJECT).groups()  # type: ignore[union-attr]
    versions = [tuple(map(int, text.split("."))) for text in (low, python, high)]
    assert versions[0] <= versions[1] < versions[2]


def test_what_the_image_adds_is_in_pyproject_and_pinned() -> None:
    extras = set(re.findall(r"'\.\[([a-z,]+)\]'", (CLUSTER / "Dockerfile").read_text()))
    assert extras == {"redis,aws,gcp"}
    assert "faiss-gpu" in CONSTRAINTS
    for extra in {name for names in extras for name in names.split(",")}:
        (requirements,) = re.findall(rf"^{extra} = \[(.*)\]", PYPROJECT, flags=re.MULTILINE)
        for package in re.findall(r'"([A-Za-z0-9_-]+)', requirements):
            assert package in CONSTRAINTS, f"{package} of [{extra}] is not pinned"


def test_the_interpreter_of_jobs_is_the_image_s() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert f"python -m venv {IMAGE_PYTHON.removesuffix('/bin/python')}" in text
    specs = [str(item["spec"]) for _, item in every_manifest() if item["kind"] in ("RayJob", "RayCronJob")]
    assert specs
    assert all("/opt/rayrec/bin/" in text for text in specs)


@pytest.mark.parametrize(
    ("name", "command", "config"),
    [("rayjob-train.yaml", "train", TrainConfig), ("rayjob-taste.yaml", "taste", TasteConfig)],
)
def test_the_jobs_name_commands_and_options_that_are_there(name: str, command: str, config: type) -> None:
    (entrypoint,) = (item["spec"]["entrypoint"] for file_name, item in every_manifest() if file_name == name)
    words = entrypoint.split()
    assert words[3] == command
    options = {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in words[4:] if word[:2] == "--"}
    assert options <= set(to_mapping(config())) | {"resume"}
    assert command in {item.name for item in app.registered_commands}


def test_ports_agree() -> None:
    port = serve_config()["http_options"]["port"]
    (spec,) = (spec for name, spec in ray_clusters() if name == "rayservice.yaml")
    for pod in pods(spec):
        assert {"name": "serve", "containerPort": port} in pod["containers"][0]["ports"]
    for name in LAUNCHER:
        head, worker = launcher(name)["head_start_ray_commands"][1], launcher(name)["worker_start_ray_commands"][1]
        assert "--port=6379" in head
        assert "$RAY_HEAD_IP:6379" in worker
        assert "--dashboard-port=8265" in head


def test_serve_takes_the_config() -> None:
    schema = ServeDeploySchema.model_validate(serve_config())
    assert [item.import_path for item in schema.applications] == ["rayrec.serving.deployments:build"]


def test_the_app_takes_the_arguments_that_the_config_gives_it() -> None:
    config = from_mapping(DeploymentConfig, serve_config()["applications"][0]["args"], "serve.yaml")
    assert build(to_mapping(config)) is not None
    assert config.host == serve_config()["http_options"]["host"]
    assert config.port == serve_config()["http_options"]["port"]


def test_the_app_finds_its_store_and_its_secrets() -> None:
    store = urlsplit(serve_config()["applications"][0]["args"]["store"])
    services = [item for name, item in every_manifest() if name == "redis.yaml" and item["kind"] == "Service"]
    assert [(item["metadata"]["name"], item["spec"]["ports"][0]["port"]) for item in services] == [
        (store.hostname, store.port)
    ]
    assert store.password is None
    (spec,) = (spec for name, spec in ray_clusters() if name == "rayservice.yaml")
    for pod in pods(spec):
        variables = {item["name"]: item["valueFrom"]["secretKeyRef"] for item in pod["containers"][0]["env"]}
        assert set(variables) == {KEYS_VARIABLE, PASSWORD_VARIABLE}
