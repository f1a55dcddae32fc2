"""A trial that diverges has no figure, and a sweep never takes it for the best."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import random_vectors, write_dataset, write_song_vectors

from rayrec.data.histories import Histories
from rayrec.data.split import Split, SplitConfig, split_dataset
from rayrec.errors import DivergedError, InputError
from rayrec.jobs import tune as job
from rayrec.jobs.job_config import Trial, TuneConfig, read_trials, to_toml
from rayrec.jobs.pipeline import read_configs
from rayrec.jobs.tune import CSV, tune
from rayrec.model.epochs import SELECTION_METRIC
from rayrec.model.train_config import TrainConfig
from rayrec.storage.artifacts import Manifest, current_ids, publish
from rayrec.storage.workspace import Workspace

DAY_MS = 86_400_000


@pytest.fixture
def split(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Split:
    """The split of a small data set. A fake `train` replaces the real one and diverges at learning rates above 0.01."""
    times = np.arange(20) * DAY_MS
    histories = Histories.from_lists(
        songs=[np.arange(20) % 5] * 4, played_at=[times] * 4, user_ids=[f"user-{row}" for row in range(4)]
    )
    write_dataset(workspace, histories, num_songs=5)
    songs = write_song_vectors(workspace, random_vectors(5), {})

    def train(workspace: Workspace, config: TrainConfig, **options: Any) -> Manifest:
        if config.learning_rate > 0.01:
            raise DivergedError("training diverged: the loss is not finite")
        model = Manifest(kind="models", id="learned", metrics={SELECTION_METRIC: 0.25, "epochs": 1, "seconds": 1.0})
        workspace.write_bytes(model.path("weights"), b"")
        return publish(workspace, model, ["weights"])

    monkeypatch.setattr(job, "train", train)
    monkeypatch.setattr(job, "embed", lambda *arguments, **options: songs)
    monkeypatch.setattr(job, "ray_cluster", contextlib.nullcontext)
    return split_dataset(workspace, SplitConfig(test_days=4, validation_days=4))


def write_space(folder: Path, rates: str) -> str:
    path = folder / "space.toml"
    path.write_text(f"[train]\nlearning_rate = {rates}\n")
    return str(path)


def test_the_best_trial_is_one_that_did_not_diverge(workspace: Workspace, split: Split, tmp_path: Path) -> None:
    result = tune(workspace, TuneConfig(), write_space(tmp_path, "[1.0, 0.001, 0.5]"), split=split)
    assert [row[SELECTION_METRIC] for row in result.metrics["trials"]] == [None, 0.25, None]
    assert result.metrics["best"]["train"]["learning_rate"] == 0.001
    assert result.metrics["best_ndcg"] == 0.25
    rates = [line.split(",")[1:3] for line in workspace.read_bytes(result.path(CSV)).decode().splitlines()[1:]]
    assert rates == [["1.0", ""], ["0.001", "0.25"], ["0.5", ""]]


def test_files_of_vectors_are_named_relative_to_the_file_of_the_sweep_and_the_best_settings_name_them_anywhere(
    workspace: Workspace, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("sweep", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "sweep" / "space.toml").write_text("[embed]\nvectors = ['a.npy', 'b.npy']\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = tune(workspace, TuneConfig(), "../sweep/space.toml", split=split)
    assert result.metrics["best"]["embed"]["vectors"] == str(tmp_path / "sweep" / "a.npy")


def test_what_was_current_before_a_sweep_that_is_stopped_is_current_after(
    workspace: Workspace, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = current_ids(workspace)

    def embed(workspace: Workspace, *_: Any, **__: Any) -> Manifest:
        return publish(workspace, Manifest(kind="songs", id="of-a-trial"), [])

    def train(*_: Any, **__: Any) -> Manifest:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "embed", embed)
    monkeypatch.setattr(job, "train", train)
    with pytest.raises(KeyboardInterrupt):
        tune(workspace, TuneConfig(), write_space(tmp_path, "[1.0, 0.001]"), split=split)
    assert workspace.folders("songs") == ["by-hand", "of-a-trial"]
    assert current_ids(workspace) == before


def test_a_sweep_of_which_every_trial_diverges_has_no_result(
    workspace: Workspace, split: Split, tmp_path: Path
) -> None:
    with pytest.raises(DivergedError, match="give smaller learning rates"):
        tune(workspace, TuneConfig(), write_space(tmp_path, "[1.0, 0.5]"), split=split)


SPACE: dict[str, Any] = {
    "embed": {"dim": [16, 32], "window": 4},
    "train": {"learning_rate": [0.001, 0.003, 0.01], "hidden_dim": 64},
}


def _trials(space: dict[str, Any], **config: int) -> list[Trial]:
    return read_trials(space, TuneConfig(**config), "space.toml")


def test_a_grid_holds_every_combination_once() -> None:
    pairs = [(trial.embed.dim, trial.train.learning_rate) for trial in _trials(SPACE)]
    assert pairs == [(dim, rate) for dim in (16, 32) for rate in (0.001, 0.003, 0.01)]
    assert all(trial.embed.window == 4 and trial.train.hidden_dim == 64 for trial in _trials(SPACE))
    assert _trials(SPACE)[1].varied == {"embed.dim": 16, "train.learning_rate": 0.003}


def test_drawn_trials_are_different_ones_and_the_same_for_a_seed() -> None:
    first, repeated, other = (_trials(SPACE, trials=4, seed=seed) for seed in (1, 1, 2))
    assert first == repeated
    assert first != other
    assert len({str(trial.varied) for trial in first}) == 4
    assert _trials(SPACE, trials=50) == _trials(SPACE)


def test_trials_are_not_refitted() -> None:
    assert not any(trial.train.refit for trial in _trials(SPACE))


def test_choices_of_a_setting_that_is_a_list_are_lists() -> None:
    trials = _trials({"train": {"short": [1, 1], "long": [[10, 20], [25, 50], []]}})
    assert [trial.train.long for trial in trials] == [(10, 20), (25, 50), ()]
    assert {trial.train.short for trial in trials} == {(1, 1)}


def test_presets_can_be_choices() -> None:
    trials = _trials({"train": {"preset": ["r_hst", "r_pst"]}})
    assert [trial.train.source for trial in trials] == ["histories", "playlists"]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"split": {"seed": [1, 2]}}, "unknown section 'split'; expected one of embed, train"),
        ({"train": [1, 2]}, r"expected a section \[train\]"),
        ({"train": {"hiden_dim": [1, 2]}}, "unknown setting 'hiden_dim'"),
        ({"train": {"hidden_dim": [64, 0]}}, "hidden_dim is 0"),
        ({"train": {"hidden_dim": [64, "many"]}}, "with train.hidden_dim = many: hidden_dim is 'many'"),
        ({"train": {"hidden_dim": []}}, "hidden_dim is an empty list"),
        ({"train": {"refit": [True, False]}}, "refit, which the search sets itself"),
        ({"train": {"objective": ["cosine", "softmax"]}}, "use --song-table frozen, not trained"),
        ({"train": {"hidden_dim": 64}}, "has nothing to search"),
    ],
)
def test_spaces_that_cannot_be_tried_are_refused_before_any_work(space: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _trials(space)


def test_counts_below_zero_are_refused() -> None:
    with pytest.raises(InputError, match="trials is -1; expected an integer of at least 0"):
        TuneConfig(trials=-1)


def test_settings_are_printed_as_a_file_for_run(tmp_path: Any) -> None:
    settings = {
        "embed": {"dim": 32},
        "train": {"objective": "softmax", "learning_rate": 0.01, "long": [], "gaps": False},
    }
    (tmp_path / "best.toml").write_text(to_toml(settings))
    configs = read_configs(tmp_path / "best.toml")
    assert configs["embed"].dim == 32
    config = configs["train"]
    assert (config.objective, config.learning_rate, config.long, config.gaps) == ("softmax", 0.01, (), False)
