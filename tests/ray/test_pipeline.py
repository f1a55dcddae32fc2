"""The whole pipeline on a tiny world, and commands on the workspace that it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayrec.errors import InputError, MismatchError
from rayrec.jobs import pipeline
from rayrec.jobs.pipeline import MIN_PLAYS, Outcome, demo, run
from rayrec.storage import artifacts, releases
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

TINY: dict[str, dict[str, Any]] = {
    "generate": {"users": 120, "songs": 60, "artists": 12, "genres": 4, "plays": 40.0, "buckets": 2, "playlists": 50},
    "split": {"test_days": 30.0, "validation_days": 10.0},
    "embed": {"dim": 8, "epochs": 2},
    "train": {"hidden_dim": 8, "epochs": 1, "negatives": 16, "workers": 0},
    "evaluate": {"bootstrap_samples": 20, "max_curve_users": 20, "models": ["taste", "popularity"]},
}
STAGES = ["generate", "split", "embed", "train", "retrieval", "rank", "taste", "index", "evaluate", "release"]


@pytest.fixture(scope="module")
def pipeline_run(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> tuple[Workspace, list[Outcome]]:
    """A workspace after a run of TINY, and the outcomes of the run."""
    workspace = Workspace(tmp_path_factory.mktemp("run") / "workspace")
    return workspace, run(workspace, TINY)


def statuses(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.stage: outcome.status for outcome in outcomes}


def test_a_first_run_does_every_stage_and_releases(pipeline_run: tuple[Workspace, list[Outcome]]) -> None:
    workspace, outcomes = pipeline_run
    assert statuses(outcomes) == dict.fromkeys(STAGES, "done")
    live_release = releases.active_release(workspace)
    assert live_release is not None
    ids = {outcome.stage: outcome.id for outcome in outcomes}
    assert (live_release.id, live_release.inputs["models"], live_release.inputs["tastes"]) == (
        ids["release"],
        ids["train"],
        ids["taste"],
    )
    releases.verify_release(workspace, live_release)
    metrics = {outcome.stage: outcome.figures for outcome in outcomes}
    assert metrics["generate"]["users"] == 120
    assert metrics["evaluate"]["default"] == "two-step"


def test_the_report_says_which_settings_are_not_the_defaults(pipeline_run: tuple[Workspace, list[Outcome]]) -> None:
    workspace, outcomes = pipeline_run
    (report_id,) = (outcome.id for outcome in outcomes if outcome.stage == "evaluate")
    report = artifacts.load_manifest(workspace, "reports", report_id)
    about = workspace.read_json(report.path("results.json"))["about"]
    settings = {name.removeprefix("settings of "): text for name, text in about.items() if "settings of" in name}
    assert settings == {
        "the network": "hidden dim: 8; negatives: 16; epochs: 1; workers: 0",
        "the retrievers": "defaults",
        "the rankers": "defaults",
        "the evaluation": "models: taste, popularity; bootstrap samples: 20; max curve users: 20",
    }


def test_a_second_run_skips_everything_and_says_so(pipeline_run: tuple[Workspace, list[Outcome]]) -> None:
    workspace, outcomes = pipeline_run
    reported_outcomes: list[Outcome] = []
    second_outcomes = run(workspace, TINY, on_stage=reported_outcomes.append)
    assert statuses(second_outcomes) == dict.fromkeys(STAGES, "skipped")
    assert [outcome.id for outcome in second_outcomes] == [outcome.id for outcome in outcomes]
    assert reported_outcomes == second_outcomes


@pytest.mark.slow
def test_a_changed_setting_repeats_its_stage_and_what_follows(tmp_path: Path, cluster: None) -> None:
    workspace = Workspace(tmp_path / "workspace")
    run(workspace, TINY)
    ranked_outcomes = run(workspace, {**TINY, "rank": {"trees": 3}})
    assert [outcome.stage for outcome in ranked_outcomes if outcome.status == "done"] == ["rank", "evaluate", "release"]
    ids = {outcome.stage: outcome.id for outcome in ranked_outcomes}
    report = artifacts.load_manifest(workspace, "reports", ids["evaluate"])
    assert report.inputs["rankers"] == ids["rank"]  # not the rankers of the live release
    trained_outcomes = run(workspace, {**TINY, "train": {**TINY["train"], "hidden_dim": 4}})
    done_stages = [outcome.stage for outcome in trained_outcomes if outcome.status == "done"]
    assert done_stages == ["train", "rank", "taste", "index", "evaluate", "release"]
    assert len(releases.list_releases(workspace)) == 3
    forced_outcomes = run(workspace, TINY, force=True)
    assert statuses(forced_outcomes) == dict.fromkeys(STAGES, "done")


def test_files_that_changed_are_imported_anew_and_other_data_never_replaced(tmp_path: Path, cluster: None) -> None:
    plays = tmp_path / "plays.csv"
    rows = [f"u{user},s{(user + step) % 5},{1_400_000_000 + 300 * step}" for user in range(30) for step in range(20)]
    plays.write_text("\n".join(["user_id,song_id,ts", *rows]))
    columns = {"user": "user_id", "song": "song_id", "played_at": "ts"}
    file = tmp_path / "run.toml"
    lines = ["[import]", "format = 'csv'", "paths = ['plays.csv']"]
    lines += [f"columns.{role} = '{name}'" for role, name in columns.items()]
    lines += ["[embed]", "dim = 4", "epochs = 1", "[train]", "hidden_dim = 4", "epochs = 1", "workers = 0"]
    file.write_text("\n".join(lines))
    workspace = Workspace(tmp_path / "workspace")
    first = run(workspace, file)
    stages = ["import", "embed", "train", "retrieval", "rank", "taste", "index", "release"]  # no split: no evaluate
    assert [outcome.stage for outcome in first] == stages
    assert first[0].figures == {"plays": 600, "users": 30, "songs": 5, "rejected": 0}
    plays.write_text(plays.read_text() + "\nu99,s1,1400000000\nu99,s2,1400000300")
    second = run(workspace, file)
    assert second[0].figures["plays"] == 602
    assert statuses(second) == dict.fromkeys(statuses(second), "done")
    with pytest.raises(InputError, match="already has a data set"):
        run(workspace, {"generate": {}})


def run_command(workspace: Workspace, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run a command with --json; return its parsed output."""
    assert main(["--workspace", workspace.uri, "--json", *arguments]) == 0
    output = capsys.readouterr()
    assert output.out.count("\n") == 1
    return json.loads(output.out)


def test_the_command_line_answers_from_the_live_release(
    pipeline_run: tuple[Workspace, list[Outcome]], capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, outcomes = pipeline_run
    ids = {outcome.stage: outcome.id for outcome in outcomes}
    output = run_command(workspace, capsys, "recommend", "--songs", "song-000001,song-000002", "-k", "5")
    scores = [song["score"] for song in output["songs"]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert all(song["title"] for song in output["songs"])
    assert not {"song-000001", "song-000002"} & {song["song_id"] for song in output["songs"]}
    assert run_command(workspace, capsys, "embed", *flags("embed"))["id"] == ids["embed"]
    assert run_command(workspace, capsys, "train", *flags("train"))["id"] == ids["train"]
    assert run_command(workspace, capsys, "taste")["id"] == ids["taste"]
    assert run_command(workspace, capsys, "index")["id"] == ids["index"]
    release = run_command(workspace, capsys, "release", "create")
    assert release["id"] == ids["release"]
    assert "not trained on the plays from" in release["warnings"][0]  # the test range
    report = run_command(workspace, capsys, "evaluate", *flags("evaluate"))
    assert {"default", "results"} <= set(report)
    assert {"model", "kind", "users", "target", "metric", "k", "value", "low", "high"} <= set(report["results"][0])
    assert run_command(workspace, capsys, "status")["active"] == ids["release"]


def flags(stage: str) -> list[str]:
    """Return the settings of a stage in TINY as command-line flags."""
    arguments = []
    for name, value in TINY[stage].items():
        arguments += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, list) else str(value)]
    return arguments


def test_people_see_tables_of_80_columns(
    pipeline_run: tuple[Workspace, list[Outcome]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"COLUMNS": "80", "TTY_COMPATIBLE": "1", "TERM": "dumb"}.items():  # a terminal without colors
        monkeypatch.setenv(name, value)
    for arguments in (["recommend", "--songs", "song-000001"], ["evaluate", *flags("evaluate")], ["status"], ["index"]):
        assert main(["--workspace", pipeline_run[0].uri, *arguments]) == 0
        output = capsys.readouterr().out
        # a line with a path may be longer: paths are never broken
        assert all(len(line) <= 80 for line in output.splitlines() if pipeline_run[0].root[:10] not in line)


def test_a_model_of_other_data_is_refused(pipeline_run: tuple[Workspace, list[Outcome]], tmp_path: Path) -> None:
    workspace, _ = pipeline_run
    manifest = workspace.read_json("dataset/dataset.json")
    workspace.write_json("dataset/dataset.json", {**manifest, "id": "other"})
    try:
        with pytest.raises(MismatchError, match=f"{manifest['id']}.*other"):
            releases.create_release(workspace, model_id=releases.default_parts(workspace)["models"])
        assert main(["--workspace", workspace.uri, "recommend", "--songs", "song-000001"]) == 2
    finally:
        workspace.write_json("dataset/dataset.json", manifest)


def test_the_demo_shows_one_user_and_never_replaces_other_data(
    pipeline_run: tuple[Workspace, list[Outcome]], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, outcomes = pipeline_run
    with pytest.raises(InputError, match="holds another data set"):
        demo(workspace)
    monkeypatch.setattr(pipeline, "DEMO_PIPELINE", TINY)
    result = demo(workspace)
    assert [outcome.id for outcome in result.outcomes] == [outcome.id for outcome in outcomes]
    assert result.answer.plays >= MIN_PLAYS
    assert len(result.answer.song_ids) == 10
    assert {"stages", "default", "results", "report", "user", "songs", "last_plays"} <= set(result.to_mapping())
