"""Every command that makes or uses artifacts prints the ids of its inputs."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rings import BEGIN, DAY, ring_plays, write_rows

from rayrec.data.dataset import Dataset
from rayrec.errors import InputError
from rayrec.storage.artifacts import listing
from rayrec.storage.releases import active_release
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

pytestmark = pytest.mark.usefixtures("commands_without_ray")

LAST = str(BEGIN + 30 * DAY)
TRAIN = ["--workers", "0", "--epochs", "1", "--hidden-dim", "4", "--negatives", "4"]
SPACE = "[embed]\ndim = 4\nepochs = 1\n[train]\nworkers = 0\nepochs = 1\nhidden_dim = [4, 6]\nnegatives = 4\n"
EVALUATE = [
    "--models",
    "two-step,taste,sequential-rules",
    "--bootstrap-samples",
    "0",
    "--offsets",
    "0",
    "--max-curve-users",
    "5",
]
SETTINGS = """
[import]
buckets = 2
[embed]
dim = 4
epochs = 1
[train]
workers = 0
epochs = 1
hidden_dim = 4
negatives = 4
[rank]
trees = 2
"""
STAGES = [  # in the order in which they build on each other; files are in the folder of the test
    ["describe", "songs.csv"],
    ["split", "--test-days", "4", "--validation-days", "4"],
    ["tune", "space.toml"],
    ["embed", "--dim", "4", "--epochs", "1", "--workers", "1"],
    ["train", *TRAIN],
    ["songs", "add"],
    ["retrieval"],
    ["rank", "--trees", "2"],
    ["taste"],
    ["index"],
    ["evaluate", *EVALUATE],
    ["evaluate", "--prefixes", "prefixes.txt", *EVALUATE[:4]],
    ["recommend", "--user", "u1", "--at", LAST],
    ["release", "create"],
    ["recommend", "--user", "u1", "--at", LAST],
    ["recommend", "--all", "-k", "3"],
]
Outputs = tuple[dict[str, Any], str]  # output with --json, and without


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of plays and settings, and a workspace with the plays imported."""
    folder = tmp_path_factory.mktemp("inputs")
    write_rows(folder / "plays.csv", ring_plays(range(60)))
    write_rows(folder / "day.csv", ring_plays(range(60), plays=10, begin=20, days=1))
    (folder / "songs.csv").write_text("song,album\ns1,One\n")
    (folder / "space.toml").write_text(SPACE)
    (folder / "settings.toml").write_text(SETTINGS)
    (folder / "prefixes.txt").write_text("".join(f"s{song} s{song + 1}\ts{song + 2}\n" for song in range(40)))
    pipeline = SETTINGS.replace("[import]", f'[import]\nformat = "csv"\npaths = ["plays.csv"]\ncolumns = {COLUMNS}')
    pipeline += f"[split]\ntest_days = 4\nvalidation_days = 4\n[evaluate]\n{TOML_EVALUATE}"
    (folder / "pipeline.toml").write_text(pipeline)
    run(folder / "workspace", ["import", "csv", str(folder / "plays.csv"), "--columns", FLAG_COLUMNS, "--buckets", "2"])
    return folder


ROLES = {"user": "user_id", "song": "track", "played_at": "timestamp"}
FLAG_COLUMNS = ",".join(f"{role}={name}" for role, name in ROLES.items())
COLUMNS = "{ " + ", ".join(f'{role} = "{name}"' for role, name in ROLES.items()) + " }"
TOML_EVALUATE = 'models = ["taste", "popularity"]\nbootstrap_samples = 0\noffsets = 0\nmax_curve_users = 5\n'


def run(workspace: Path, words: list[str], max_code: int = 0) -> str:
    """Run a command and return its stdout; its exit code must be at most `max_code`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["--workspace", str(workspace), *words])
    assert code <= max_code, err.getvalue()
    return out.getvalue()


def json_and_text(folder: Path, words: list[str], workspace: str = "workspace") -> Outputs:
    """Return a command's output as JSON and as text; most commands find the result of the first run in the second."""
    words = [str(folder / word) if (folder / word).is_file() else word for word in words]
    return json.loads(run(folder / workspace, ["--json", *words])), run(folder / workspace, words)


def require_printed(ids: dict[str, str], text: str) -> None:
    assert ids
    missing = {role: artifact_id for role, artifact_id in ids.items() if artifact_id not in text}
    assert not missing, text


@pytest.fixture(scope="module")
def printed(folder: Path) -> list[Outputs]:
    return [json_and_text(folder, words) for words in STAGES]


@pytest.mark.parametrize("number", range(len(STAGES)), ids=[" ".join(words[:2]) for words in STAGES])
def test_each_stage_prints_the_ids_of_its_inputs(folder: Path, printed: list[Outputs], number: int) -> None:
    data, text = printed[number]
    inputs = data.get("inputs") or {name: data[name] for name in ("dataset", "models", "tastes", "indexes")}
    require_printed({role: artifact_id for role, artifact_id in inputs.items() if role != "descriptions"}, text)
    manifest = Dataset(Workspace(folder / "workspace")).manifest
    if "index" not in STAGES[number]:  # an index is made from the model alone
        assert inputs["dataset"] in (manifest.id, *manifest.ancestors)


def test_an_evaluation_prints_the_calibration_error_and_the_settings_of_baselines(printed: list[Outputs]) -> None:
    for (data, text), words in zip(printed, STAGES, strict=True):
        if words[0] == "evaluate":
            errors = [round(entry["value"], 3) for entry in data["calibration"]]
            assert "Expected calibration error of two-step: served {:.3f}, all {:.3f}\n".format(*errors) in text
            (settings,) = data["settings"]
            assert f"\n  sequential-rules: decay: {settings['decay']:g}\n" in text


@pytest.mark.parametrize(
    "words",
    [
        *(["rank", "--model", ""], ["rank", "--retrieval", ""], ["index", "--model", ""], ["taste", "--model", ""]),
        *(["train", "--songs", ""], ["evaluate", "--model", ""], ["evaluate", "--split", ""]),
        *(["evaluate", "--prefixes", "prefixes.txt", "--split", ""], ["release", "create", "--model", ""]),
    ],
    ids=" ".join,
)
def test_an_empty_id_is_an_id_that_does_not_exist_and_not_the_current_artifact(
    folder: Path, printed: list[Outputs], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder / word) if word.endswith(".txt") else word for word in words]
    assert main(["--workspace", str(folder / "workspace"), *words]) == 2
    assert "'' not found" in capsys.readouterr().err


def test_recommendations_name_the_release_that_answers_or_the_parts_where_none_is_live(
    folder: Path, printed: list[Outputs]
) -> None:
    release = active_release(Workspace(folder / "workspace"))
    assert release is not None
    from_parts, from_release, all_users = (printed[position][0] for position in (-4, -2, -1))
    assert (from_parts["release"], from_release["release"]) == (None, release.id)
    assert {"dataset", "models", "indexes", "rankers", "retrieval"} <= set(from_parts["inputs"])
    for data in (from_release, all_users):
        assert (data["inputs"]["releases"], data["inputs"]["models"]) == (release.id, release.inputs["models"])


@pytest.mark.parametrize(
    "words", [["fit", "plays.csv", "--settings", "settings.toml"], ["run", "pipeline.toml"]], ids=str
)
def test_commands_of_many_stages_print_the_inputs_of_each(folder: Path, words: list[str]) -> None:
    data, text = json_and_text(folder, words, words[0])
    stages = [stage for stage in data["stages"] if stage["id"] and stage["stage"] != "import"]
    assert len(stages) >= 7
    for stage in stages:
        require_printed(stage["inputs"], text)


def test_a_file_of_settings_names_vectors_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings.toml").write_text("[embed]\nvectors = 'vectors.npy'\n")
    seen: list[Any] = []

    def fit(*arguments: object, settings: object, **options: object) -> None:
        seen.append(settings)
        raise InputError("stop here")

    monkeypatch.setattr("rayrec.jobs.fit.fit", fit)
    words = ["fit", "plays.csv", "--settings", str(tmp_path / "settings.toml")]
    assert main(["--workspace", str(tmp_path / "workspace"), *words]) == 2
    assert seen == [{"embed": {"vectors": str(tmp_path / "vectors.npy")}}]


def test_an_update_prints_what_its_release_is_made_of(folder: Path) -> None:
    run(folder / "updated", ["fit", str(folder / "plays.csv"), "--settings", str(folder / "settings.toml")])
    text = run(folder / "updated", ["update", str(folder / "day.csv")], 1)  # 1 if the release is not made live
    require_printed(listing(Workspace(folder / "updated"), "releases")[-1].inputs, text)


def test_serve_names_the_release_before_it_starts(
    folder: Path, printed: list[Outputs], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release = active_release(Workspace(folder / "workspace"))
    assert release is not None
    for _ in range(2):  # the second time the states are already loaded
        with monkeypatch.context() as patch:
            patch.setattr("rayrec.serving.run.running", lambda *_: (_ for _ in ()).throw(InputError("stop here")))
            assert main(["--workspace", str(folder / "workspace"), "serve", "--port", "0"]) == 2
        output = " ".join(capsys.readouterr().err.split())
        assert f"Live release {release.id}: " in output
        require_printed({role: release.inputs[role] for role in ("models", "dataset")}, output)
