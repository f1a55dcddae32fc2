"""The files for `ray up` pass Ray's own checks, and have the settings that README.md describes."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
from cluster_files import LAUNCHER, launcher
from ray.autoscaler._private.util import prepare_config, validate_config

SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


def node_types(name: str) -> dict[str, Any]:
    """Return the node types of a file."""
    types: dict[str, Any] = launcher(name)["available_node_types"]
    return types


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_takes_the_file(name: str) -> None:
    jsonschema.validate(launcher(name), SCHEMA)
    config = prepare_config(deepcopy(launcher(name)))
    validate_config(config)
    assert config["head_setup_commands"] == config["worker_setup_commands"] == []  # Ray adds no default commands


def test_the_check_sees_a_word_that_ray_does_not_know() -> None:
    broken_config = launcher("aws.yaml") | {"idle_minutes": 5}
    with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
        jsonschema.validate(broken_config, SCHEMA)


@pytest.mark.parametrize("name", LAUNCHER)
def test_spot_comes_before_what_costs_more_and_falls_back_to_the_same_machine(name: str) -> None:
    types = node_types(name)
    machine_field = "InstanceType" if name == "aws.yaml" else "machineType"
    for kind in ("cpu", "gpu"):
        spot, fallback = types[f"{kind}-spot"], types[f"{kind}-on-demand"]
        assert spot["priority"] > fallback["priority"]
        assert spot["resources"] == fallback["resources"]
        assert spot["node_config"][machine_field] == fallback["node_config"][machine_field]
        assert spot["min_workers"] == 0
        spot_config, fallback_config = (str(node_type["node_config"]).lower() for node_type in (spot, fallback))
        assert "'spot'" in spot_config
        assert "spot" not in fallback_config


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_dashboard_and_the_ports_of_ray_are_not_public(name: str) -> None:
    config = launcher(name)
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    rules = config["provider"].get("security_group", {}).get("IpPermissions", [])
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules] == ([(22, 22)] if name == "aws.yaml" else [])
    assert all(not item["CidrIp"].startswith("0.0.0.0") for rule in rules for item in rule["IpRanges"])
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_machines_reach_the_bucket_by_role_and_hold_no_key(name: str) -> None:
    role_field = "IamInstanceProfile" if name == "aws.yaml" else "serviceAccounts"
    assert all(node["node_config"][role_field] for node in node_types(name).values())
    text = str(launcher(name)).lower()
    assert not any(word in text for word in ("access_key", "secret", "credentials", "password"))


@pytest.mark.parametrize("name", LAUNCHER)
def test_no_work_lands_on_the_head(name: str) -> None:
    config = launcher(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert "spot" not in str(head["node_config"]).lower()
