"""A cluster that loses a node during import, training and tastes gives right results, and repeats only lost work."""

from dataclasses import dataclass
from typing import Any

import many_nodes
import numpy as np
import pyarrow as pa
import pytest
from many_nodes import BUCKETS
from safetensors.numpy import load as load_safetensors

from rayrec.bench.rounds import PlainProcess
from rayrec.data.dataset import Dataset
from rayrec.model.taste_table import tastes_file
from rayrec.storage import artifacts
from rayrec.storage.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Runs:
    """Results and workspaces of the stages, with lost nodes (`lossy`) and without (`undisturbed`)."""

    lossy: dict[str, Any]
    undisturbed: dict[str, Any]
    lossy_workspace: Workspace
    undisturbed_workspace: Workspace


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("nodes")
    plays = folder / "plays"
    plays.mkdir()
    many_nodes.write_plays(plays)
    folders = {name: str(folder / name) for name in ("lossy", "whole")}
    with PlainProcess(0) as driver:
        undisturbed = driver.run(many_nodes.undisturbed, str(plays), folders["whole"])
    with PlainProcess(0) as driver:
        lossy = driver.run(many_nodes.lose_nodes, str(plays), folders["lossy"], str(folder / "log"))
    return Runs(lossy, undisturbed, Workspace(folders["lossy"]), Workspace(folders["whole"]))


def test_every_stage_ends_in_a_sound_artifact(runs: Runs) -> None:
    for kind in ("songs", "models", "tastes", "indexes", "reports"):
        (manifest,) = artifacts.listing(runs.lossy_workspace, kind)
        artifacts.verify(runs.lossy_workspace, manifest)


@pytest.mark.parametrize("stage", ["import", "taste"])
def test_only_the_buckets_in_the_hands_of_the_lost_node_are_done_again(runs: Runs, stage: str) -> None:
    report = runs.lossy[stage]
    assert report["held"]
    assert set(report["again"]) <= set(report["held"])
    assert len(report["held"]) < BUCKETS // 2


def test_the_import_is_the_same_data_set(runs: Runs) -> None:
    assert runs.lossy["made"]["import"] == runs.undisturbed["import"]


def test_the_training_repeats_no_more_than_the_steps_since_the_last_checkpoint_but_one(runs: Runs) -> None:
    assert runs.lossy["train"]["again"]
    assert not runs.lossy["train"]["needless"]
    assert runs.lossy["train"]["steps"] > 10


def test_the_training_ends_where_one_without_losses_ends(runs: Runs) -> None:
    actual, expected = (
        load_safetensors(workspace.read_bytes(f"{manifests['train']['folder']}/model.safetensors"))
        for workspace, manifests in (
            (runs.lossy_workspace, runs.lossy["made"]),
            (runs.undisturbed_workspace, runs.undisturbed),
        )
    )
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, atol=1e-4, err_msg=name)
    recall = "validation_recall@20"
    assert runs.lossy["made"]["train"]["metrics"][recall] == runs.undisturbed["train"]["metrics"][recall]


def test_every_user_has_exactly_one_row_of_tastes(runs: Runs) -> None:
    manifest = runs.lossy["made"]["taste"]
    workspace = runs.lossy_workspace
    rows = pa.concat_tables(
        [workspace.read_table(tastes_file(manifest["folder"], bucket)) for bucket in range(BUCKETS)]
    )
    users = [user for batch in Dataset(workspace).read_all() for user in batch.user_ids.tolist()]
    assert sorted(rows.column("user_id").to_pylist()) == sorted(users)
    assert len(users) == len(set(users)) == 160
