"""The space of a sweep: every combination once, drawn the same for a seed, and refused where it is no config."""

from typing import Any

import pytest

from rayrec.errors import InputError
from rayrec.jobs.pipeline import read_configs
from rayrec.jobs.trials import Trial, TuneConfig, read_trials, to_toml

SPACE: dict[str, Any] = {
    "embed": {"dim": [16, 32], "window": 4},
    "train": {"learning_rate": [0.001, 0.003, 0.01], "hidden_dim": 64},
}


def _trials(space: dict[str, Any], **config: int) -> list[Trial]:
    return read_trials(space, TuneConfig(**config), "space.toml")


def test_a_grid_holds_every_combination_once() -> None:
    found = [(trial.embed.dim, trial.train.learning_rate) for trial in _trials(SPACE)]
    assert found == [(dim, rate) for dim in (16, 32) for rate in (0.001, 0.003, 0.01)]
    assert all(trial.embed.window == 4 and trial.train.hidden_dim == 64 for trial in _trials(SPACE))
    assert _trials(SPACE)[1].varied == {"embed.dim": 16, "train.learning_rate": 0.003}


def test_drawn_trials_are_different_ones_and_the_same_for_a_seed() -> None:
    first, again, other = (_trials(SPACE, trials=4, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len({str(trial.varied) for trial in first}) == 4
    assert _trials(SPACE, trials=50) == _trials(SPACE)


def test_trials_are_neither_refitted_nor_given_a_memory() -> None:
    assert not any(trial.train.refit for trial in _trials(SPACE))


def test_of_a_setting_that_is_a_list_lists_are_the_choices() -> None:
    trials = _trials({"train": {"short": [1, 1], "long": [[10, 20], [25, 50], []]}})
    assert [trial.train.long for trial in trials] == [(10, 20), (25, 50), ()]
    assert {trial.train.short for trial in trials} == {(1, 1)}


def test_presets_may_be_chosen_among() -> None:
    trials = _trials({"train": {"preset": ["r_hst", "r_pst"]}})
    assert [trial.train.source for trial in trials] == ["histories", "playlists"]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"split": {"seed": [1, 2]}}, "unknown section 'split'; expected embed, train"),
        ({"train": [1, 2]}, r"expected a section \[train\]"),
        ({"train": {"hiden_dim": [1, 2]}}, "unknown setting 'hiden_dim'"),
        ({"train": {"hidden_dim": [64, 0]}}, "hidden_dim is 0"),
        ({"train": {"hidden_dim": [64, "many"]}}, "with train.hidden_dim = many: hidden_dim is 'many'"),
        ({"train": {"hidden_dim": []}}, "hidden_dim is an empty list"),
        ({"train": {"refit": [True, False]}}, "refit, which the search sets itself"),
        ({"train": {"objective": ["cosine", "softmax"]}}, "requires song_table frozen"),
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
    told = configs["train"]
    assert (told.objective, told.learning_rate, told.long, told.gaps) == ("softmax", 0.01, (), False)
