"""The Kubernetes manifests pass the schemas of KubeRay and of Kubernetes, and have safe and consistent settings."""

import gzip
import json
import os
import re
import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
import typer
import yaml
from cluster_files import MANIFESTS, ROOT, every_manifest, manifests, pods, ray_clusters, serve_config
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from stores import SERVER, needs_redis

from rayrec.bench.redis_servers import free_port
from rayrec_cli.main import app

ARTIFACTS = Path(__file__).parents[2] / "artifacts"
KUBERAY = json.loads((ARTIFACTS / "kuberay.json").read_text())
KUBERNETES = json.loads(gzip.decompress((ARTIFACTS / "kubernetes-1.34.json.gz").read_bytes()))
REGISTRY: Registry = Registry().with_resources(
    [("kuberay.json", Resource.from_contents(KUBERAY)), ("kubernetes.json", Resource.from_contents(KUBERNETES))]
)
KUBERNETES_KINDS = {
    "Service": "core.v1",
    "ServiceAccount": "core.v1",
    "StatefulSet": "apps.v1",
    "NetworkPolicy": "networking.v1",
    "CronJob": "batch.v1",
}


def faults(item: dict[str, Any]) -> list[str]:
    """Return the schema's errors for an object, each with its place in the object."""
    kind = item["kind"]
    if item["apiVersion"] == "ray.io/v1":
        reference = f"kuberay.json#/$defs/{kind}"
    else:
        reference = f"kubernetes.json#/$defs/io.k8s.api.{KUBERNETES_KINDS[kind]}.{kind}"
    validator = Draft202012Validator({"$ref": reference}, registry=REGISTRY)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(item)]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_object_fits_its_schema(name: str) -> None:
    for item in manifests(name):
        if item["kind"] != "Namespace":
            assert faults(item) == [], item["kind"]


def test_the_files_are_those_that_a_cluster_needs() -> None:
    kinds = {item["kind"] for _, item in every_manifest()}
    assert kinds >= {"RayCluster", "RayJob", "RayService", "RayCronJob", "StatefulSet", "ServiceAccount", "CronJob"}
    assert len(ray_clusters()) == 5


def test_no_two_objects_share_the_name_from_which_kuberay_makes_that_of_the_heads_service() -> None:
    kinds = ("RayCluster", "RayService", "RayJob", "RayCronJob")
    names = [
        (item["metadata"]["namespace"], item["metadata"]["name"])
        for _, item in every_manifest()
        if item["kind"] in kinds
    ]
    assert len(names) == 5
    assert len(set(names)) == len(names), names


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "enableInTreeAutoscaler"), True, "enableInTreeAutoscaler"),
        (("spec", "headGroupSpec", "template", "spec", "container"), [], "container"),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "one", "'one' is not of type"),
        (("spec", "authOptions", "mode"), "tokens", "'tokens' is not one of"),
    ],
)
def test_the_schemas_find_an_error_at_any_depth(path: tuple[Any, ...], value: Any, message: str) -> None:
    (item,) = manifests("raycluster.yaml")
    node: Any = item
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert any(message in fault for fault in faults(item))


@pytest.mark.parametrize(("name", "spec"), ray_clusters())
def test_every_cluster_asks_for_a_token_and_keeps_its_dashboard_inside(name: str, spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in spec["headGroupSpec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize(("name", "spec"), ray_clusters())
def test_no_pod_runs_as_root_or_without_bounds(name: str, spec: dict[str, Any]) -> None:
    for pod in pods(spec):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["serviceAccountName"] == "rayrec"
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            # Ray takes its number of CPUs and its memory from the limits.
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_every_pod_pulls_the_image_of_the_project_that_was_pushed_last() -> None:
    containers = [container for _, spec in ray_clusters() for pod in pods(spec) for container in pod["containers"]]
    (job,) = manifests("cronjob.yaml")
    containers += job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert {container["imagePullPolicy"] for container in containers} == {"Always"}


@pytest.mark.parametrize(("name", "spec"), [cluster for cluster in ray_clusters() if cluster[0] != "rayservice.yaml"])
def test_spot_groups_come_first_and_have_a_fallback(name: str, spec: dict[str, Any]) -> None:
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for group_name, group in groups.items():
        if group_name.endswith("-spot"):
            fallback = groups[group_name.replace("-spot", "-on-demand")]
            assert group["priority"] > fallback["priority"]
            assert (
                pods({"headGroupSpec": group, "workerGroupSpecs": []})[0]["nodeSelector"]
                != (fallback["template"]["spec"]["nodeSelector"])
            )


def test_permanent_clusters_keep_their_state_in_redis_with_a_password_from_a_secret() -> None:
    specs = [spec for name, spec in ray_clusters() if name in ("raycluster.yaml", "rayservice.yaml")]
    for spec in specs:
        options = spec["gcsFaultToleranceOptions"]
        assert options["redisAddress"] == "redis:6379"
        assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "rayrec-redis"
    for name, item in every_manifest():
        assert item["kind"] != "Secret", f"{name} holds a Secret: make it by hand"


@needs_redis
def test_redis_has_the_password_of_the_secret_and_ends_by_itself_when_its_pod_ends(tmp_path: Path) -> None:
    (redis_set,) = (item for item in manifests("redis.yaml") if item["kind"] == "StatefulSet")
    (container,) = redis_set["spec"]["template"]["spec"]["containers"]
    (script,), port = container["args"], free_port()
    script = script.replace("/data", str(tmp_path)).replace("redis-server -", f"{SERVER} - --port {port}", 1)
    process = subprocess.Popen(
        [*container["command"], script],
        env={"PASSWORD": "planted-4711"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert any("Ready to accept connections" in line for line in process.stdout)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
        assert redis.Redis(port=port, password="planted-4711").ping()
        assert b"planted-4711" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.terminate()
        assert process.wait() == 0  # a shell would end by the signal, and Redis would be killed without its last save
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a redis-server that a shell left behind


def test_the_cron_job_submits_existing_commands_to_the_permanent_cluster() -> None:
    (job,), (cluster,) = manifests("cronjob.yaml"), manifests("raycluster.yaml")
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["image"] == pods(cluster["spec"])[0]["containers"][0]["image"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    environment = {item["name"]: item for item in container["env"]}
    name = cluster["metadata"]["name"]
    assert environment["RAY_API_SERVER_ADDRESS"]["value"] == f"http://{name}-head-svc:8265"
    assert environment["RAY_AUTH_MODE"]["value"] == cluster["spec"]["authOptions"]["mode"]
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}
    head = {item["name"] for item in pods(cluster["spec"])[0]["containers"][0]["env"]}
    assert "RAYREC_REDIS_PASSWORD" in head  # for the store that `update` loads; submitted commands run on the head
    (script,) = container["args"]
    group = typer.main.get_command(app)
    for line in re.findall(r"/opt/[^;&]*", script):
        program, submit, command, *words = shlex.split(re.sub(r"\$\([^)]*\)", "DAY", line))
        assert (program, submit) == ("/opt/rayrec/bin/rayrec", "submit")
        known_options = {name for item in group.commands[command].params for name in item.opts}  # type: ignore[attr-defined]
        assert {word for word in words if word.startswith("--")} <= known_options


def test_kuberay_submits_the_whole_entrypoint_as_one_command() -> None:
    """KubeRay writes the entrypoint unquoted into the submitting pod's command line, in front of `; fi ; ...`."""
    specs = [item["spec"] for _, item in every_manifest() if item["kind"] in ("RayJob", "RayCronJob")]
    assert len(specs) == 3
    for spec in specs:
        entrypoint = spec.get("jobTemplate", spec)["entrypoint"]
        words = list(shlex.shlex(entrypoint, posix=False, punctuation_chars=True))
        assert not [word for word in words if set(word) <= set("();<>|&")], entrypoint
        assert not any("$" in word for word in words if not word.startswith("'")), entrypoint


def test_the_nightly_job_updates_and_then_cleans_in_one_workspace() -> None:
    (job,) = manifests("nightly.yaml")
    shell, option, script = shlex.split(job["spec"]["jobTemplate"]["entrypoint"])
    assert (shell, option) == ("/bin/sh", "-c")
    assert script.split()[0] == "export"
    commands = re.findall(r"/opt/[^;&]*", script)
    group = typer.main.get_command(app)
    for line, expected in zip(commands, ("update", "clean"), strict=True):
        program, command, *words = shlex.split(re.sub(r"\$\([^)]*\)", "DAY", line))
        assert (program, command) == ("/opt/rayrec/bin/rayrec", expected)
        known_options = {name for item in group.commands[command].params for name in item.opts}  # type: ignore[attr-defined]
        assert {word for word in words if word.startswith("--")} <= known_options


def nightly_script(name: str) -> str:
    """The lines that a shell runs every night."""
    if name.endswith(".md"):
        (line,) = re.findall(r"^30 2 \* \* \* +(.*)$", (ROOT / name).read_text("utf-8"), re.MULTILINE)
        return str(line).replace("\\%", "%")
    (job,) = manifests(name)
    if name == "nightly.yaml":
        return shlex.split(job["spec"]["jobTemplate"]["entrypoint"])[-1]
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return str(container["args"][0])


@pytest.mark.parametrize("name", ["nightly.yaml", "cronjob.yaml", "docs/operations.md", "cluster/README.md"])
@pytest.mark.parametrize(("update", "clean", "expected"), [(0, 0, 0), (1, 0, 1), (0, 2, 2)])
def test_every_night_cleans_whatever_the_update_returned_and_fails_if_one_of_both_failed(
    tmp_path: Path, name: str, update: int, clean: int, expected: int
) -> None:
    program = tmp_path / "rayrec"
    program.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\ncase "$*" in *update*) exit {update};; *) exit {clean};; esac\n'
    )
    program.chmod(0o755)
    (tmp_path / "rayrec.env").touch()
    script = nightly_script(name).replace("/opt/rayrec/bin/rayrec", str(program))
    for folder in ("/srv/rayrec", "/etc"):
        script = script.replace(folder, str(tmp_path))
    assert subprocess.run(["/bin/sh", "-c", script], check=False).returncode == expected
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [re.sub("^submit ", "", call).split()[0] for call in calls] == ["update", "clean"]


@pytest.mark.parametrize("name", ["nightly.yaml", "cronjob.yaml", "docs/operations.md", "cluster/README.md"])
def test_every_night_passes_the_files_of_the_last_three_days_so_that_a_failed_night_is_caught_up(name: str) -> None:
    script = nightly_script(name)
    commands = re.findall(r"\$\((date [^)]*)\)", script)
    today = "2026-03-02"
    days = [
        subprocess.run(
            ["/bin/sh", "-c", command.replace("--date ", f"--date {today}")], check=True, capture_output=True, text=True
        ).stdout.strip()
        for command in commands
    ]
    assert days == ["2026-02-27", "2026-02-28", "2026-03-01"]
    assert script.count("plays/day=$(") == 3


def test_the_service_runs_the_config_that_serve_yaml_holds() -> None:
    (service,) = (item for item in manifests("rayservice.yaml") if item["kind"] == "RayService")
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == serve_config()
