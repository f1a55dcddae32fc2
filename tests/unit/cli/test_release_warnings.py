"""`rayrec release create` says for each part which plays it was not fitted on; `update` says how one goes live."""

import json
from typing import Any

import pytest

from rayrec.data.split import Split, save_split
from rayrec.importing.import_run import ImportResult
from rayrec.jobs.update import UpdateResult
from rayrec.storage.artifacts import DatasetManifest, Manifest, publish, write_dataset_manifest
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

DAY = 86_400_000
ALL = {"split": "all"}
TESTED = {"split": "tested"}
FROM_10, FROM_7 = "the plays from 1970-01-11 on, UTC", "the plays from 1970-01-08 on, UTC"


def release_warnings(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], refit: bool, **splits: dict[str, str]
) -> list[str]:
    """Return the warnings of `release create`; `splits` has the split of each kind of part that was fitted with one."""
    write_dataset_manifest(workspace, DatasetManifest(id="d", source="", buckets=1, parts=1, users=0, plays=0, songs=0))
    save_split(workspace, Split(id="tested", dataset="d", validation_from=7 * DAY, test_from=10 * DAY))
    save_split(workspace, Split(id="all", dataset="d", validation_from=7 * DAY, test_from=20 * DAY, has_test=False))
    inputs: dict[str, dict[str, str]] = {
        "songs": splits.get("songs", {}),
        "models": {"songs": "songs1", **splits.get("models", {})},
        "retrieval": splits.get("retrieval", {}),
        "rankers": {"models": "models1", "retrieval": "retrieval1", **splits.get("models", {})},
        "tastes": {"models": "models1"},
        "indexes": {"models": "models1"},
    }
    for kind, part_inputs in inputs.items():
        config: dict[str, Any] = {"refit": refit} if kind == "models" else {}
        manifest = Manifest(kind=kind, id=f"{kind}1", config=config, inputs={"dataset": "d", **part_inputs})
        files = ["selection/model.safetensors"] if kind == "models" else []
        for name in files:
            workspace.write_bytes(manifest.path(name), b"weights")
        publish(workspace, manifest, files)
    assert main(["--json", "--workspace", workspace.uri, "release", "create"]) == 0
    return list(json.loads(capsys.readouterr().out).get("warnings", []))


@pytest.mark.parametrize(
    ("refit", "splits", "expected"),
    [
        (True, {"songs": ALL, "models": ALL, "retrieval": ALL}, []),
        (True, {}, []),
        (False, {"songs": ALL, "models": ALL, "retrieval": ALL}, [f"not trained on {FROM_7}: model models1"]),
        (True, {"songs": TESTED}, [f"not trained on {FROM_10}: song embeddings songs1"]),
        (True, {"models": ALL, "retrieval": TESTED}, [f"not trained on {FROM_10}: retrievers retrieval1"]),
        (
            True,
            {"songs": TESTED, "models": TESTED, "retrieval": TESTED},
            [f"not trained on {FROM_10}: song embeddings songs1, model models1, retrievers retrieval1"],
        ),
        (
            False,
            {"songs": TESTED, "models": TESTED},
            [
                f"not trained on {FROM_10}: song embeddings songs1",
                f"not trained on {FROM_7}: model models1",
            ],
        ),
    ],
)
def test_each_part_that_was_fitted_without_some_plays_is_named(
    refit: bool,
    splits: dict[str, dict[str, str]],
    expected: list[str],
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    advice = "; `rayrec fit` trains the final models on all plays"
    assert release_warnings(workspace, capsys, refit, **splits) == [text + advice for text in expected]


@pytest.mark.parametrize("store", ["", "--store redis://:secret@127.0.0.1:6379/0"])
def test_a_rejected_update_advises_to_load_the_states_of_its_release_before_it_goes_live(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    dataset = DatasetManifest(id="d", source="", buckets=1, parts=1, users=0, plays=0, songs=0)
    result = UpdateResult(
        outcomes=[],
        appended=ImportResult(dataset=dataset),
        new_plays=1,
        new_users=0,
        new_songs=0,
        trained=True,
        release="r2",
        live=False,
        reason="worse",
    )
    monkeypatch.setattr("rayrec.jobs.update.update", lambda *arguments, **options: result)
    assert main(["--workspace", workspace.uri, "update", "day.csv", *store.split()]) == 1
    text = " ".join(capsys.readouterr().out.split())
    load = "`rayrec states load --release r2" + (" --store STORE`" if store else "`")
    assert f"run {load}, then `rayrec release activate r2`." in text
    assert "secret" not in text
