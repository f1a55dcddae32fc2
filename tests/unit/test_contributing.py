"""Files, names and commands in CONTRIBUTING.md and the design page exist; the hooks run what `make check` runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
TEXT = CONTRIBUTING + DESIGN[DESIGN.index("## Add a reader") :]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CODE_SPANS = sorted(set(re.findall(r"`([^`\n]+)`", TEXT)))
PATHS = [span for span in CODE_SPANS if re.fullmatch(r"[\w./-]+", span) and ("/" in span or "." in span[1:])]
# name -> the file that the recipe says it is in
NAMES = {
    "Reader": "rayrec/importing/readers/reader.py",
    "FORMATS": "rayrec/importing/readers/__init__.py",
    "ObjectiveFunction": "rayrec/model/objectives.py",
    "OBJECTIVES": "rayrec/model/objectives.py",
    "Objective": "rayrec/model/train_config.py",
    "REGRESSIONS": "rayrec/model/train_config.py",
    "Retriever": "rayrec/recommend/retrievers.py",
    "Proposals": "rayrec/recommend/retrievers.py",
    "COUNTS": "rayrec/recommend/retrievers.py",
    "make_retrievers": "rayrec/recommend/retrievers.py",
    "Retrieval": "rayrec/recommend/stored_retrieval.py",
    "RuleCounts": "rayrec/recommend/stored_retrieval.py",
    "CANDIDATE_FEATURES": "rayrec/recommend/candidate_features.py",
    "GROUP_FEATURES": "rayrec/recommend/candidate_features.py",
    "QUERY_FEATURES": "rayrec/recommend/candidate_features.py",
    "BaseRecommender": "rayrec/recommend/base.py",
    "FROM_PLAYS": "rayrec/recommend/baselines.py",
    "FROM_VECTORS": "rayrec/recommend/baselines.py",
    "MAKERS": "tests/unit/recommend/test_recommender_suite.py",
}


@pytest.mark.parametrize("path", [path for path in PATHS if not re.match(r"columns\.|rates\.json|\.npy|\.venv", path)])
def test_every_file_named_in_the_guide_exists(path: str) -> None:
    if "NAME" in path:
        assert list(ROOT.glob(path.replace("NAME", "*")))
    else:
        assert (ROOT / path).exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_recipe_is_where_the_recipe_says(name: str) -> None:
    assert f"`{name}`" in TEXT
    assert re.search(rf"^((class|def) )?{name}\b", (ROOT / NAMES[name]).read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_every_make_command_is_a_target_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`|; |=1 )make ([a-z-]+)", TEXT, flags=re.MULTILINE)) <= targets


def test_hooks_run_what_make_check_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in hooks]
    (check_commands,) = re.findall(r"^check:.*\n\t(.*)$", MAKEFILE, flags=re.MULTILINE)
    assert entries == [part.replace("$(BIN)/", "").replace(" .", "") for part in check_commands.split(" && ")]


def test_pre_commit_accepts_the_hooks() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(ROOT / ".pre-commit-config.yaml")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
