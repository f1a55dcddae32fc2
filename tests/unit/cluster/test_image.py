"""The Dockerfile passes hadolint, has two targets, does not run as root, and pins all versions."""

import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from cluster_files import CLUSTER, ROOT
from dockerfile_parse import DockerfileParser

PARSER = DockerfileParser(fileobj=(CLUSTER / "Dockerfile").open("rb"))
INSTRUCTIONS: list[dict[str, Any]] = [item for item in PARSER.structure if item["instruction"] != "COMMENT"]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of each stage, by the stage's name."""
    instructions: dict[str, list[tuple[str, str]]] = {}
    for item in INSTRUCTIONS:
        if item["instruction"] == "FROM":
            instructions[item["value"].split(" AS ")[1]] = stage = []
        stage.append((item["instruction"], item["value"]))
    return instructions


def hadolint(dockerfile: str) -> "subprocess.CompletedProcess[str]":
    command = [Path(sysconfig.get_path("scripts")) / "hadolint", "--no-color", "-"]
    return subprocess.run(command, input=dockerfile, capture_output=True, text=True, check=False)


def test_the_linter_finds_nothing_and_would_find_a_fault() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert hadolint(text).stdout == ""
    for right, wrong, rule in (
        ("--no-install-recommends ", "", "DL3015"),
        (" \\\n    && rm -rf /var/lib/apt/lists/*", "", "DL3009"),
        ("-slim-bookworm AS system", " AS build-cpu", "DL3024"),
    ):
        assert right in text
        assert rule in hadolint(text.replace(right, wrong)).stdout


def test_there_is_a_target_for_each_kind_of_node() -> None:
    assert {"cpu", "gpu"} <= set(stages())


def test_bases_are_pinned_to_a_patch_version() -> None:
    base_images = [item["value"].split()[0] for item in INSTRUCTIONS if item["instruction"] == "FROM"]
    base_images = [image for image in base_images if image not in stages()]
    assert base_images
    assert all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+", image) for image in base_images)


def test_final_stages_do_not_run_as_root() -> None:
    for target in ("cpu", "gpu"):
        users = [value for name, value in stages()[target] if name == "USER"]
        assert users == ["1000:1000"]
        names = [name for name, _ in stages()[target]]
        assert names.index("USER") > names.index("COPY")


def test_python_packages_are_installed_by_the_constraints_alone() -> None:
    runs = [value for name in stages() for kind, value in stages()[name] if kind == "RUN"]
    installs = [step for run in runs for step in run.split("&&") if "pip install" in step]
    assert len(installs) == 4
    assert all("--constraint constraints.txt" in step for step in installs)
    assert not any("--extra-index-url" in step for step in installs)


def test_nothing_is_added_from_an_address_and_no_secret_is_an_argument() -> None:
    assert not any(item["instruction"] in ("ADD", "ARG") for item in INSTRUCTIONS)
    text = (CLUSTER / "Dockerfile").read_text()
    assert not re.search(r"(?i)(password|secret|api_key)\s*=", text)


def test_copied_files_exist_and_the_build_sees_them() -> None:
    ignore_rules = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignore_rules
    for name in ("build-cpu", "build-gpu"):
        source_groups = [value.split()[:-1] for kind, value in stages()[name] if kind == "COPY"]
        sources = [source for group in source_groups for source in group]
        assert {"constraints.txt", "pyproject.toml", "rayrec", "cli"} <= set(sources)
        for source in sources:
            assert (ROOT / source).exists()
            assert any(rule.startswith(f"!{source}") for rule in ignore_rules), source
