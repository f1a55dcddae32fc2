"""The warnings of an evaluation about the models that it compares, and the split that it refuses."""

from pathlib import Path

import pytest
from rings import ring_plays, write_rows
from without_ray import without_ray

from rayrec.data.dataset import Dataset
from rayrec.data.split import choose_split, hold_back_validation
from rayrec.errors import InputError
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.evaluate import ComparedModels, evaluate
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace


def _compared_models(*, split: bool = True, **sources: str) -> ComparedModels:
    """The network `model`, another network `r_pst` and the song embeddings, each trained on its source in `sources`."""
    manifests = {
        name: Manifest(kind="models", id=name, metrics={"source": sources.get(name, "histories")})
        for name in ("model", "r_pst", "songs")
    }
    return ComparedModels(
        names=("taste", "r_pst"),
        default="taste",
        model=manifests["model"],
        other_networks={"r_pst": manifests["r_pst"]},
        songs=manifests["songs"],
        inputs={"split": "s"} if split else {},
    )


@pytest.mark.parametrize(
    ("part", "named"), [("model", "the network"), ("r_pst", "r_pst"), ("songs", "the song embeddings")]
)
def test_parts_made_of_playlists_are_named_where_a_split_evaluates_them(part: str, named: str) -> None:
    warning = _compared_models(**{part: "playlists"}).warning  # type: ignore[arg-type]
    assert warning is not None
    assert warning.startswith(f"{named}: trained on playlists, which have no times")
    assert _compared_models(split=False, **{part: "playlists"}).warning is None


def test_models_trained_on_plays_that_the_split_cut_give_no_warning() -> None:
    assert _compared_models().warning is None
    assert _compared_models(model="sessions").warning is None


def test_a_split_that_only_held_plays_back_to_choose_by_is_refused_after_an_append_too(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With such a split baselines see all plays, including the appended plays, which are the ones to predict."""
    without_ray(monkeypatch)
    config = EvaluateConfig(models=("popularity",), bootstrap_samples=0, offsets=0)
    plays_path, days_path = (
        write_rows(tmp_path / f"{begin}.csv", ring_plays(range(60), begin=begin)) for begin in (0, 20)
    )
    columns = {"user": "user_id", "song": "track", "played_at": "timestamp"}
    import_data(workspace, ImportConfig(format="csv", paths=(plays_path,), columns=columns, buckets=2))
    validation_split = hold_back_validation(Dataset(workspace))
    append_plays(workspace, ImportConfig(format="csv", paths=(days_path,), columns=columns))
    assert choose_split(workspace) == validation_split
    for split in (validation_split, None):
        with pytest.raises(InputError, match=r"^No split to evaluate on; run `rayrec split`"):
            evaluate(workspace, config, split=split)
