"""Settings of baselines follow the validation range of the data set, whatever another set would want."""

from collections.abc import Callable

import numpy as np
from worlds import write_dataset

from rayrec.data.histories import Histories
from rayrec.data.split import DAY_MS, Split
from rayrec.evaluation.tuning import CHOICES, TuningMetric, tune_baseline
from rayrec.recommend.baselines import Selection, fit_baselines, make_selection
from rayrec.storage.workspace import Workspace

NUM_SONGS = 400
MINUTE = 60_000
VALIDATION, TEST, END = 100 * DAY_MS, 110 * DAY_MS, 120 * DAY_MS
SPLIT = Split(id="s", dataset="by-hand", validation_from=VALIDATION, test_from=TEST)


def _selection(workspace: Workspace, sessions: Callable[[np.random.Generator, int], list[int]]) -> Selection:
    """A world of one session a user, on a day from 0 to 120; `sessions` gives its songs from the day."""
    random = np.random.default_rng(0)
    days = random.integers(0, 120, size=600)
    songs = [sessions(random, int(day)) for day in days]
    times = [day * DAY_MS + MINUTE * np.arange(len(some)) for day, some in zip(days, songs, strict=True)]
    histories = Histories.from_lists(songs, times, user_ids=[f"user-{row}" for row in range(600)])  # type: ignore[arg-type]
    selection = make_selection(write_dataset(workspace, histories, NUM_SONGS), SPLIT, None)
    assert selection is not None
    return selection


def _changing(random: np.random.Generator, day: int) -> list[int]:
    """A song of the first ten and then those that follow it in this fortnight, and never again."""
    first = int(random.integers(10))
    return [first, *(10 + 39 * first + 4 * (day // 14) + random.permutation(4)).tolist()]


def test_sessions_fade_fast_where_what_follows_changes_by_the_fortnight(workspace: Workspace) -> None:
    selection = _selection(workspace, _changing)
    settings = tune_baseline("vstan", selection)
    assert settings["days_decay"] <= 30
    metric = TuningMetric(selection)
    usual, tuned = (
        metric(fit_baselines(["vstan"], selection.dataset, None, selection.allowed, settings={"vstan": some})[0])
        for some in ({"days_decay": 1825.0}, settings)
    )
    assert tuned > usual


def test_popularity_counts_the_last_week_where_each_week_has_songs_of_its_own(workspace: Workspace) -> None:
    def weekly(random: np.random.Generator, day: int) -> list[int]:
        return (20 * (day // 7) + random.integers(0, 20, size=6)).tolist()

    assert tune_baseline("popularity-recent", _selection(workspace, weekly))["days"] <= 7


def test_rules_fade_fast_where_what_comes_often_later_hides_what_comes_next(workspace: Workspace) -> None:
    def hidden(random: np.random.Generator, day: int) -> list[int]:
        first = 3 * int(random.integers(20))
        return [first, first + 1, *[first + 2] * 7]

    # By 1/distance the third song outweighs the second after the first: 1/2 + 1/3 + ... + 1/8 > 1.
    assert tune_baseline("sequential-rules", _selection(workspace, hidden)) == {"decay": 2.0}


def test_every_baseline_with_choices_is_tuned_on_plays_before_the_test_range(workspace: Workspace) -> None:
    selection = _selection(workspace, _changing)
    assert selection.histories.played_at.max() < TEST
    for name, choices in CHOICES.items():
        settings = tune_baseline(name, selection)
        assert choices.keys() <= settings.keys()
        (fitted,) = fit_baselines([name], selection.dataset, None, SPLIT.final, settings={name: settings})
        assert fitted.settings == settings
