"""The report of an experiment finds what was planted in the impression log and in later plays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import write_dataset

from rayrec.data.histories import Histories
from rayrec.data.impressions import ImpressionLog, LogBounds
from rayrec.errors import InputError, NotFoundError
from rayrec.evaluation import experiment_report
from rayrec.evaluation.experiment_report import ArmResult, ExperimentReport, ExperimentReportConfig, report_experiment
from rayrec.storage.workspace import Workspace

NOW = 1_790_000_000_000  # ms UTC
HOUR = 3_600_000
DAY = 24 * HOUR


class PlantedLog:
    """An impression log with planted answers and events."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._log = ImpressionLog(workspace, "hand", LogBounds(seconds=3600, rows=1_000_000, disk_bytes=1 << 40))
        self._count = 0

    def answer(self, user: str, arm: str | None, songs: list[str], at: int = NOW, **fields: Any) -> str:
        """Log an answer with `songs` for a user, and return its id."""
        self._count += 1
        answer_id = f"r{self._count}"
        row = {
            "recommendation_id": answer_id,
            "user_id": user,
            "moment": at,
            "at": at,
            "release": f"of-{arm}",
            "first": 0,
        }
        experiment = "x" if arm else None
        self._log.add("answers", {**row, "song_ids": songs, "experiment": experiment, "arm": arm, **fields})
        return answer_id

    def event(self, user: str, song: str, at: int, **fields: Any) -> None:
        """Log an event of a user."""
        self._count += 1
        row = {"event_id": f"e{self._count}", "user_id": user, "song_id": song, "type": "play", "moment": at}
        self._log.add("events", {**row, "played_at": at, "skipped": False, **fields})

    def report(self, **settings: Any) -> ExperimentReport:
        """Write the logged rows and return the report."""
        self._log.flush()
        return report_experiment(self.workspace, ExperimentReportConfig(**settings))

    def arm(self, name: str = "a", **settings: Any) -> ArmResult:
        """The figures of the arm `name`."""
        return next(arm for arm in self.report(**settings).arms if arm.arm == name)


@pytest.fixture
def planted(tmp_path: Path) -> PlantedLog:
    return PlantedLog(Workspace(tmp_path / "workspace"))


def plant_arms(planted: PlantedLog, num_users: int, shares: dict[str, float]) -> None:
    """Users of each arm get 20 songs and play 5; the arm's share is the chance that a played song is one of the 20."""
    random = np.random.default_rng(0)
    for row in range(num_users):
        for arm, share in shares.items():
            user = f"{arm}-{row}"
            songs = [f"song-{song}" for song in random.permutation(40)]
            planted.answer(user, arm, songs[:20])
            for position in range(5):
                song = songs[position] if random.random() < share else songs[20 + position]
                planted.event(user, song, NOW + HOUR)


def test_an_arm_whose_songs_are_played_lies_above_the_other_and_the_true_shares_are_in_the_intervals(
    planted: PlantedLog,
) -> None:
    plant_arms(planted, 200, {"control": 0.3, "better": 0.5})
    control, better = planted.report().arms
    assert (control.arm, control.users, control.answers, control.played) == ("control", 200, 200, 1000)
    assert better.releases == ["of-better"]
    for arm, share in ((control, 0.3), (better, 0.5)):
        assert arm.low < share < arm.high  # type: ignore[operator]
        assert 0.03 < arm.high - arm.low < 0.1  # type: ignore[operator]
    assert control.high < better.low  # type: ignore[operator]
    assert control.difference is None
    assert 0 < better.difference_low < 0.2 < better.difference_high  # type: ignore[operator]
    assert planted.report().verdict.startswith("better: recall is higher than in control")


def test_between_equal_arms_no_significant_difference_is_reported(planted: PlantedLog) -> None:
    plant_arms(planted, 100, {"a": 0.4, "b": 0.4})
    report = planted.report()
    assert report.arms[1].difference_low < 0 < report.arms[1].difference_high  # type: ignore[operator]
    assert report.verdict.startswith("b: no significant difference from a,")


def test_arms_of_fewer_than_30_users_with_plays_are_not_compared(planted: PlantedLog) -> None:
    plant_arms(planted, 29, {"control": 0.1, "better": 0.9})
    planted.answer("silent", "better", ["one"])  # a user without plays does not count towards the 30
    control, better = planted.report().arms
    assert (better.users, better.users_with_plays) == (30, 29)
    assert better.difference == pytest.approx(0.8, abs=0.15)
    assert (control.low, better.high, better.difference_low, better.difference_high) == (None, None, None, None)
    assert planted.report().verdict.startswith("better: no comparison, because one of the arms has fewer than 30 users")
    for user in ("c", "b"):
        planted.answer(user, "control" if user == "c" else "better", ["one"])
        planted.event(user, "one", NOW + HOUR)
    assert planted.report().verdict.startswith("better: recall is higher than in control")


def test_an_interval_without_width_is_none(planted: PlantedLog) -> None:
    for arm, song in (("control", "one"), ("worse", "another")):
        for row in range(40):
            planted.answer(f"{arm}-{row}", arm, ["one"])
            planted.event(f"{arm}-{row}", song, NOW + HOUR)
    control, worse = planted.report().arms
    assert (control.recall, control.low, control.high) == (1.0, None, None)
    assert (worse.difference, worse.difference_low, worse.difference_high) == (-1.0, None, None)
    assert planted.report().verdict.startswith("worse: no comparison, because")


def test_a_report_computed_in_small_parts_is_the_same(planted: PlantedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_arms(planted, 50, {"a": 0.2, "b": 0.6})
    expected = planted.report()
    monkeypatch.setattr(experiment_report, "PART_BYTES", 1_000)
    assert planted.report() == expected


def test_a_play_counts_only_in_the_days_after_an_answer(planted: PlantedLog) -> None:
    planted.answer("ann", "a", ["one", "two"])
    planted.event("ann", "one", NOW - HOUR)  # before the answer
    planted.event("ann", "one", NOW + 3 * DAY)  # too late
    planted.event("ann", "two", NOW)  # at the moment of the answer
    planted.event("ann", "three", NOW + DAY)
    planted.event("bob", "one", NOW + DAY)  # had no answer
    assert (planted.arm(days=2).played, planted.arm(days=2).recommended) == (2, 1)
    assert (planted.arm(days=4).played, planted.arm(days=4).recommended) == (3, 2)


def test_a_song_counts_once_for_a_user_however_often_it_is_played_and_recommended(planted: PlantedLog) -> None:
    for hour in range(3):
        planted.answer("ann", "a", ["one"], NOW + hour * HOUR)
        planted.event("ann", "one", NOW + hour * HOUR + 1)
    planted.answer("bob", "a", ["one"])
    planted.event("bob", "one", NOW + 1)
    arm = planted.arm()
    assert (arm.users, arm.answers, arm.played, arm.recommended) == (2, 4, 2, 2)


def test_a_play_that_names_an_answer_belongs_to_it_and_to_no_other(planted: PlantedLog) -> None:
    answer_id = planted.answer("ann", "a", ["one"])
    planted.answer("ann", "b", ["two"], NOW + HOUR)
    planted.event("ann", "two", NOW + 2 * HOUR, recommendation_id=answer_id)  # that answer did not hold the song
    planted.event("ann", "one", NOW + 30 * DAY, recommendation_id=answer_id)  # after the window
    planted.event("ann", "one", NOW + 2 * HOUR)  # names no answer: belongs to the last answer, of b
    first, second = planted.report(control="a").arms
    assert (first.played, first.recommended) == (2, 1)
    assert (second.played, second.recommended) == (1, 0)


def test_a_play_that_names_an_answer_outside_of_the_experiment_counts_for_no_arm(planted: PlantedLog) -> None:
    songs = ["one", "two", "three", "four", "five"]
    planted.answer("ann", "a", songs)
    bob_answer = planted.answer("bob", "a", songs)
    other_experiment_answer = planted.answer("ann", "other", ["one"], NOW + 1, experiment="y")
    answer_without_arm = planted.answer("ann", None, ["two"], NOW + 1)
    for song, answer_id in zip(
        songs, [other_experiment_answer, answer_without_arm, bob_answer, "in no log", None], strict=True
    ):
        planted.event("ann", song, NOW + HOUR, recommendation_id=answer_id)
    planted.event("ann", "one", NOW + HOUR, type="like", recommendation_id=other_experiment_answer)
    (arm,) = planted.report(name="x").arms
    assert (arm.played, arm.recommended, arm.likes) == (1, 1, 0)


def test_skips_and_likes_are_counted_and_are_no_plays(planted: PlantedLog) -> None:
    planted.answer("ann", "a", ["one", "two"])
    planted.event("ann", "one", NOW + 1, type="skip", skipped=True)
    planted.event("ann", "other", NOW + 1, type="skip", skipped=True)  # was not recommended
    planted.event("ann", "two", NOW + 1, type="like")
    arm = planted.arm()
    assert (arm.played, arm.skips, arm.likes) == (0, 1, 1)
    assert (arm.recall, arm.low) == (None, None)


def test_with_k_only_the_first_songs_of_a_ranking_count(planted: PlantedLog) -> None:
    planted.answer("ann", "a", ["one", "two"])
    planted.answer("ann", "a", ["three", "four"], NOW + 1, first=2)  # the second page
    for song in ("one", "two", "three", "four"):
        planted.event("ann", song, NOW + HOUR)
    assert [planted.arm(k=k).recommended for k in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert planted.arm().recommended == 4


def test_rows_that_are_in_the_log_twice_count_once(planted: PlantedLog) -> None:
    planted.answer("ann", "a", ["one"])
    planted.event("ann", "one", NOW + 1)
    expected = planted.report()
    for path in [*Path(planted.workspace.root).rglob("*.parquet")]:
        path.with_stem(path.stem + "-again").write_bytes(path.read_bytes())
    assert planted.report() == expected


def test_plays_after_answers_without_songs_count_as_not_recommended(planted: PlantedLog) -> None:
    for user in ("ann", "bob"):
        planted.answer(user, "a", [])
        planted.event(user, "one", NOW + 1)
    arm = planted.arm()
    assert (arm.answers, arm.played, arm.recommended, arm.recall) == (2, 2, 0, 0.0)


def test_plays_may_be_those_of_the_data_set(planted: PlantedLog) -> None:
    songs, times = [[3, 4, 5], [3, 3]], [[NOW - 1, NOW + 1, NOW + 2], [NOW + 1, NOW + 2]]
    histories = Histories.from_lists(songs, times, user_ids=["ann", "bob"])
    write_dataset(planted.workspace, histories, 10)
    planted.answer("ann", "a", ["song-4", "song-3"])
    planted.answer("bob", "a", ["song-3"])
    planted.event("ann", "song-9", NOW + 1)
    arm = planted.arm(plays="dataset")
    assert (arm.played, arm.recommended) == (3, 2)
    assert planted.arm().played == 1


def test_answers_outside_of_the_experiment_count_for_no_arm(planted: PlantedLog) -> None:
    planted.answer("ann", "a", ["one"])
    planted.answer("ann", None, ["two"], NOW + 1)
    planted.event("ann", "two", NOW + 2)
    arm = planted.arm()
    assert (arm.answers, arm.played, arm.recommended) == (1, 1, 0)


def test_a_name_that_is_not_in_the_log_is_an_error_that_lists_the_known_names(planted: PlantedLog) -> None:
    with pytest.raises(NotFoundError, match="--log-impressions"):
        planted.report()
    planted.answer("ann", "a", ["one"])
    planted.answer("ann", "b", ["one"], experiment="y")
    with pytest.raises(InputError, match="2 experiments; set --name to one of x, y"):
        planted.report()
    with pytest.raises(NotFoundError, match="'z'; set --name to one of x, y"):
        planted.report(name="z")
    with pytest.raises(NotFoundError, match="set --control to one of a"):
        planted.report(name="x", control="b")
