"""`rayrec train` on data that has almost nothing to learn."""

from pathlib import Path
from typing import Any

import pytest
from rings import ring_plays, write_rows

from rayrec.errors import RayrecError
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.import_data import import_data
from rayrec.jobs.train import train
from rayrec.jobs.trainer import has_counts_of
from rayrec.model.train_config import TrainConfig
from rayrec.storage import artifacts
from rayrec.storage.workspace import Workspace

CONFIG = TrainConfig(hidden_dim=8, epochs=1, negatives=4, workers=0)

pytestmark = pytest.mark.usefixtures("run_without_ray")


def import_ring(workspace: Workspace, folder: Path, *, songs: int) -> None:
    """Import plays of a ring of `songs` songs: ten users with 40 plays each."""
    path = write_rows(folder / "plays.csv", ring_plays(range(10), songs=songs))
    columns = {"user": "user_id", "song": "track", "played_at": "timestamp"}
    import_data(workspace, ImportConfig(format="csv", paths=(path,), columns=columns, buckets=2))


def test_a_catalog_of_one_song_can_be_trained_though_there_is_nothing_to_tell_apart(
    workspace: Workspace, tmp_path: Path
) -> None:
    import_ring(workspace, tmp_path, songs=1)
    model = train(workspace, CONFIG)
    assert model.metrics["loss"] == 0
    assert model.metrics["plays"] == 10 * 39
    assert workspace.read_array(model.path("song_vectors.npy")).shape[0] == 1


def test_histories_too_short_for_every_horizon_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    import_ring(workspace, tmp_path, songs=60)
    expected = r"no training sequence \(source: histories\) is long enough for a horizon of 40 to 50 plays later"
    with pytest.raises(RayrecError, match=expected):
        train(workspace, CONFIG.replace(short=(), long=(40, 50)))


def test_the_checkpoints_stay_until_the_model_is_published(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a training that is killed in between would start over."""
    import_ring(workspace, tmp_path, songs=60)
    publish = artifacts.publish
    run_files: list[str] = []

    def publish_with_run_files(*arguments: Any) -> artifacts.Manifest:
        run_files.extend(path for path in workspace.files("models") if "/run/" in path)
        return publish(*arguments)

    monkeypatch.setattr(artifacts, "publish", publish_with_run_files)
    model = train(workspace, CONFIG)
    assert run_files
    assert not workspace.exists(model.path("run"))
    assert sorted(model.path(name) for name in [*model.files, "manifest.json"]) == sorted(workspace.files(model.folder))
    workspace.write_json(model.path("run/checkpoint.json"), {})  # as if the training was killed just after it published
    assert train(workspace, CONFIG) == model
    assert not workspace.exists(model.path("run"))


def test_a_training_killed_while_its_model_is_published_keeps_the_counts_that_resume_needs(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them its checkpoints are taken for those of a smaller catalog, and deleted."""
    import_ring(workspace, tmp_path, songs=60)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        train(workspace, CONFIG)
    (model_id,) = workspace.folders("models")
    assert has_counts_of(workspace, f"models/{model_id}", 60)
