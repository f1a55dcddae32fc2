"""In any order of commands, each uses the artifacts requested last, and the commands that errors advise help."""

import contextlib
import io
import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rings import BEGIN, DAY, HEAD

from rayrec.data.dataset import Dataset
from rayrec.jobs.job_config import resolve_paths
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

pytestmark = pytest.mark.usefixtures("commands_without_ray")

USERS, SONGS, DAYS = 14, 12, 14
FAST_ARGUMENTS = {  # command -> arguments that make it fast
    "import": ["csv", "PLAYS", "--columns", "user=user_id,song=track,played_at=timestamp", "--buckets", "2"],
    "split": ["--test-days", "3", "--validation-days", "3"],
    "embed": ["--dim", "4", "--epochs", "1", "--workers", "1"],
    "train": ["--workers", "0", "--epochs", "1", "--hidden-dim", "4", "--negatives", "4", "--batch", "8"],
    "rank": ["--trees", "2"],
    "evaluate": [
        "--models",
        "taste,popularity",
        "--bootstrap-samples",
        "0",
        "--offsets",
        "0",
        "--max-curve-users",
        "5",
    ],
    "recommend": ["--user", "u0", "-k", "3", "--at", str(BEGIN + 100 * DAY)],
}
STEPS = [
    "import --append 1",
    "import --append 2",
    "import --force",
    "split",
    "split --test-days 2",
    "split --last-fraction 0.2",
    "embed",
    "embed --no-split",
    "train",
    "train",
    "train --seed 1",
    "train --no-split",
    "songs add",
    "retrieval",
    "rank",
    "rank",
    "taste",
    "taste",
    "index",
    "compact",
    "release create",
    "release create",
    "release rollback",
    "evaluate",
    "recommend",
]
# Command -> kind of the artifact that it makes.
ARTIFACT_OF_COMMAND = {
    "embed": "songs",
    "train": "models",
    "songs add": "added_songs",
    "retrieval": "retrieval",
    "rank": "rankers",
    "taste": "tastes",
    "index": "indexes",
}
FIT_COMMANDS = ("embed", "train", "retrieval")  # these fit on the plays that a split allows
MODEL_PARTS = ("added_songs", "rankers", "tastes", "indexes")


def day_of_plays(day: int) -> list[str]:
    """Return CSV rows with the columns of HEAD for one day: each user plays four successive songs of a ring."""
    return [
        f"u{user},s{(user + 4 * day + position) % SONGS},{BEGIN + day * DAY + 240 * position},Song,Artist\n"
        for user in range(USERS)
        for position in range(4)
    ]


@dataclass
class Expected:
    """The expected state of the workspace after the commands so far."""

    dataset: str = ""  # id
    plays: str = ""  # id of the data set with these plays before parts were joined
    versions: set[str] = field(default_factory=set)  # ids of the data set and of its ancestors
    plays_of: dict[str, str] = field(default_factory=dict)  # id of a data set -> id of its plays
    models: dict[str, str] = field(default_factory=dict)  # id -> id of its data set; the model requested last is last
    split: dict[str, Any] | None = None  # as `rayrec split` prints it
    current: dict[str, str] = field(default_factory=dict)  # kind -> id
    # kind and model -> id of the artifact requested last
    latest_of_model: dict[tuple[str, str], str] = field(default_factory=dict)
    split_of: dict[str, str | None] = field(default_factory=dict)  # id of a model or retrieval -> id of its split
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)  # by id
    release_ids: list[str] = field(default_factory=list)  # ids of releases, the live one last
    release_datasets: dict[str, str] = field(default_factory=dict)  # id of a release -> id of its data set
    days: set[int] = field(default_factory=set)  # days appended so far

    @property
    def can_roll_back(self) -> bool:
        """True if there is an earlier release, and its data set was not replaced."""
        return len(self.release_ids) > 1 and self.release_datasets[self.release_ids[-2]] in self.versions


class Session:
    """Runs command lines in one workspace, follows the advice of errors, and compares outcomes with those expected."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.expected = folder, Expected()
        self.lines: list[str] = []  # command lines so far, with exit codes and errors
        self.write("plays", [row for day in range(DAYS) for row in day_of_plays(day)])
        self.write("other", [row for day in range(1, DAYS + 1) for row in day_of_plays(day)])
        for number in (1, 2):
            self.write(f"day{number}", day_of_plays(DAYS - 1 + number))

    def write(self, name: str, rows: list[str]) -> None:
        (self.folder / f"{name}.csv").write_text(HEAD + "".join(rows))

    def run(self, line: str) -> tuple[int, dict[str, Any]]:
        """Run a command line, and return its exit code and its JSON output."""
        name = command_of(line)
        line_words = line.split()
        words = [*line_words, *([] if name == "import" and len(line_words) > 1 else FAST_ARGUMENTS.get(name, []))]
        if name == "import":
            day = "".join(word for word in line_words if word.isdigit())
            flags = [word for word in line_words if word.startswith("--")]
            file = "other" if "--force" in flags else f"day{day}" if day else "plays"
            words = ["import", *FAST_ARGUMENTS["import"], *flags]
            words[words.index("PLAYS")] = str(self.folder / f"{file}.csv")
        elif name == "split" and "--last-fraction" in line_words:
            words = line_words
        elif name == "split":
            words = ["split", *FAST_ARGUMENTS["split"], *line_words[1:]]  # the last value of a repeated flag counts
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["--json", "--workspace", str(self.folder / "workspace"), *words])
        data = json.loads(out.getvalue())
        error_text = (
            "" if code == 0 else ": " + "; ".join(filter(None, (data["error"]["message"], data["error"]["hint"])))
        )
        self.lines.append(f"{line} -> {code}{error_text}")
        assert data.get("error", {}).get("kind") != "internal"
        if code == 0:
            self.compare(line, data)
        return code, data

    def follow(self, line: str, depth: int = 0) -> bool:
        """Run a command and what its errors advise, until it succeeds or an error has no advice; return its success."""
        assert depth < 8, "advice without an end"
        errors: set[str] = set()
        while True:
            code, data = self.run(line)
            if code == 0:
                return True
            text = f"{data['error']['message']}; {data['error']['hint']}"
            advice = advised_commands(text)
            if not advice:
                return False
            assert text not in errors, "the advice did not help"
            errors.add(text)
            for command in advice:
                assert self.follow(command, depth + 1), "what was advised does not work"

    def compare(self, line: str, data: dict[str, Any]) -> None:
        """Assert that a command used the expected inputs, and update the expected state with its result."""
        expected, name = self.expected, command_of(line)
        if line == "import --force":
            expected.dataset = expected.plays = data["id"]
            expected.versions = {data["id"]}
            expected.days = {1}  # other.csv has the plays of day1.csv
            expected.splits = {
                record["id"]: record for record in expected.splits.values() if record["dataset"] == data["id"]
            }
            expected.split = list(expected.splits.values())[-1] if expected.splits else None
        elif name == "import":
            is_new = "--append" not in line or not expected.days >= {int(line[-1])}
            assert (data["id"] != expected.dataset) == is_new
            if is_new:
                expected.dataset = expected.plays = data["id"]
                expected.versions.add(data["id"])
                expected.days |= {int(line[-1])} if "--append" in line else set()
                if expected.split and expected.split["protocol"] != "time":  # their last plays have changed
                    assert "run `rayrec split --last-fraction" in data["warnings"][0]
                    time_splits = [split for split in expected.splits.values() if split["protocol"] == "time"]
                    expected.split = time_splits[-1] if time_splits else None
                    expected.splits = {split["id"]: split for split in time_splits}
        elif name == "compact":
            expected.dataset = data["id"]
            expected.versions.add(data["id"])
        elif name == "split":
            expected.split = data
            expected.splits.pop(data["id"], None)  # made again, it becomes the last one
            expected.splits[data["id"]] = data
        elif name in ARTIFACT_OF_COMMAND:
            self._compare_artifact(line, name, ARTIFACT_OF_COMMAND[name], data)
        elif name == "evaluate":
            model = expected.current["models"]
            assert (data["inputs"]["models"], data["inputs"]["split"]) == (model, expected.split_of[model])
        elif name == "release create":
            self._compare_release(data)
        elif name == "release rollback":
            expected.release_ids.pop()
            assert data["id"] == expected.release_ids[-1]
        expected.plays_of[expected.dataset] = expected.plays
        state = self.status()
        assert state["dataset"]["id"] == expected.dataset
        assert state["current"].items() >= expected.current.items()
        assert state["active"] == (expected.release_ids[-1] if expected.release_ids else None)

    def _compare_artifact(self, line: str, name: str, kind: str, data: dict[str, Any]) -> None:
        expected, inputs = self.expected, dict(data["inputs"])
        current = expected.current
        match = re.search(r"--model (\S+)", line)
        model = match[1] if match else current.get("models", "")
        if name in FIT_COMMANDS:
            split = wanted_split(line, expected)
            assert inputs.get("split") == split
            assert expected.plays_of[inputs["dataset"]] == expected.plays
            assert names_training_plays(data, expected.splits.get(split) if split else None), data
        if name == "train":
            assert inputs.get("songs") == current.get("songs")
        if kind in MODEL_PARTS:
            assert inputs["models"] == model
            expected.latest_of_model[kind, model] = data["id"]
        if name == "rank":
            assert inputs["retrieval"] == current["retrieval"]
            assert inputs["split"] == expected.split_of[model] == expected.split_of[inputs["retrieval"]]
        if name == "taste":
            assert inputs["dataset"] == expected.plays
            assert inputs.get("added_songs") == expected.latest_of_model.get(("added_songs", model))
        if name == "train":
            expected.models.pop(data["id"], None)
            expected.models[data["id"]] = inputs["dataset"]
        if name in ("train", "retrieval"):
            expected.split_of[data["id"]] = inputs.get("split")
        current[kind] = data["id"]

    def _compare_release(self, data: dict[str, Any]) -> None:
        expected = self.expected
        model = [model for model, dataset in expected.models.items() if dataset in expected.versions][-1]
        assert data["models"] == model
        for kind in MODEL_PARTS:
            assert data.get(kind) == expected.latest_of_model.get((kind, model))
        expected.release_datasets[data["id"]] = data["dataset"]
        if not expected.release_ids or expected.release_ids[-1] != data["id"]:
            expected.release_ids.append(data["id"])
        artifacts = {record["id"]: record for record in self.status()["tastes"]}
        is_stale = artifacts[data["tastes"]]["inputs"]["dataset"] != expected.plays
        assert ("run `rayrec taste`" in " ".join(data.get("warnings", []))) == is_stale

    def status(self) -> dict[str, Any]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(["--json", "--workspace", str(self.folder / "workspace"), "status"]) == 0
        return dict(json.loads(out.getvalue()))


def command_of(line: str) -> str:
    """Return the command of a line, with its group."""
    first, *rest = line.split()
    return f"{first} {rest[0]}" if first in ("songs", "release") else first


def advised_commands(text: str) -> list[str]:
    """Return the commands that an error advises to run, in order; of alternatives only the first."""
    _, separator, rest = text.partition("run `rayrec ")
    alternatives = re.split(r"` or `", f"`rayrec {rest}") if separator else [""]
    commands = re.findall(r"`rayrec ([^`]+)`", alternatives[0] + "`")
    return [command for command in commands if command != "serve"]


def wanted_split(line: str, expected: Expected) -> str | None:
    """Return the id of the split that a fit must have used, or None for all plays."""
    match = re.search(r"--split (\S+)", line)
    if match:
        return match[1]
    return None if "--no-split" in line or expected.split is None else str(expected.split["id"])


def names_training_plays(data: dict[str, Any], split: dict[str, Any] | None) -> bool:
    """Return True if the result of a fit names the plays that it was trained on."""
    if split is None:
        return bool(data["trained_on"] == "all plays")
    if split["test_from"] is None:
        return f"all plays except the last {split['last_fraction']:.3g} of each user's plays" in data["trained_on"]
    day = datetime.fromtimestamp(split["test_from"] / 1000, timezone.utc).date()
    return f"all plays except the plays from {day} on" in data["trained_on"]


def run_steps(steps: list[str]) -> None:
    with TemporaryDirectory() as folder:
        session = Session(Path(folder))
        try:
            for step in steps:
                can_roll_back = session.expected.can_roll_back
                assert session.follow(step) == (step != "release rollback" or can_roll_back)
            assert session.follow("release create")
            assert session.follow("recommend")
        except AssertionError as error:
            raise AssertionError("\n".join([*session.lines, "", str(error)])) from None


SEQUENCES = st.lists(st.sampled_from(STEPS), min_size=6, max_size=12)
HYPOTHESIS_SETTINGS: dict[str, Any] = {
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}


@given(SEQUENCES)
@settings(max_examples=15, derandomize=True, **HYPOTHESIS_SETTINGS)
def test_each_command_uses_the_artifacts_requested_last_and_advice_helps(steps: list[str]) -> None:
    run_steps(steps)


def test_the_advice_helps_after_an_append_that_outdates_the_split_of_the_model() -> None:
    last_plays = "split --last-fraction 0.2"
    run_steps(["import", last_plays, "train", "import --append 1", last_plays, "evaluate"])


def test_the_advice_of_rank_helps_after_an_append_that_outdates_the_split_of_the_model() -> None:
    run_steps(["import", "split --last-fraction 0.2", "train", "import --append 1", "rank"])


def test_a_rollback_to_a_release_of_replaced_data_is_refused_and_the_live_one_still_answers() -> None:
    run_steps(["import", "release create", "import --force", "release create", "release rollback", "recommend"])


def test_what_was_fitted_before_a_compaction_is_found_again_after_it() -> None:
    with TemporaryDirectory() as folder:
        session = Session(Path(folder))
        for step in ("import", "import --append 1", "split"):
            assert session.run(step)[0] == 0
        ids = [session.run(step)[1]["id"] for step in ("embed", "train", "retrieval")]
        assert session.run("compact")[0] == 0
        # Train first: it starts from the embeddings of before.
        assert [session.run(step)[1]["id"] for step in ("train", "embed", "retrieval")] == [ids[1], ids[0], ids[2]]


@pytest.mark.slow
@given(SEQUENCES)
@settings(max_examples=100, **HYPOTHESIS_SETTINGS)
def test_many_more_sequences_of_commands(steps: list[str]) -> None:
    run_steps(steps)


@pytest.mark.parametrize("section", ["[import]\n", ""])
def test_a_section_of_a_pipeline_file_or_a_file_without_sections_names_files_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    for folder in ("pipeline", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pipeline" / "plays.csv").write_text(HEAD + "".join(day_of_plays(0)))
    columns = "{user = 'user_id', song = 'track', played_at = 'timestamp'}"
    (tmp_path / "pipeline" / "p.toml").write_text(
        f"{section}format = 'csv'\npaths = ['plays.csv']\ncolumns = {columns}\nbuckets = 2\n"
        + ("[train]\nepochs = 1\n" if section else "")
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    workspace = str(tmp_path / "workspace")
    assert main(["--workspace", workspace, "import", "--config", "../pipeline/p.toml"]) == 0
    assert Dataset(Workspace(workspace)).manifest.plays == USERS * 4


def test_only_relative_paths_of_a_file_of_settings_are_resolved_against_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    settings = {
        "keys_file": "keys",
        "vectors": "",
        "paths": ["plays.csv", "/plays.csv", "~/plays.csv", "s3://music/plays.csv"],
    }
    assert resolve_paths(settings, tmp_path) == {
        "keys_file": str(tmp_path / "keys"),
        "vectors": "",
        "paths": [str(tmp_path / "plays.csv"), "/plays.csv", "/home/ann/plays.csv", "s3://music/plays.csv"],
    }
