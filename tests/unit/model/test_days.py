"""A horizon in days: the plays a week later are planted, at no fixed number of plays ahead."""

import numpy as np
import torch
from networks import NUM_SONGS, MemoryHost, model_config
from worlds import random_vectors

from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import DAY_MS
from rayrec.model.checkpoint import export_song_vectors
from rayrec.model.epochs import Fit, FitData, Validation
from rayrec.model.inference import TasteEncoder
from rayrec.model.train_config import DaysHorizon, TrainConfig

GROUPS, SONGS_PER_GROUP = 5, 4  # groups of songs that are played on the first day of a week, and songs per group
PLANTED = GROUPS * SONGS_PER_GROUP
MINUTE = 60_000
A_WEEK_LATER = DaysHorizon(first_day=6, last_day=8)


def weekly_histories(users: int, weeks: int = 5, seed: int = 0) -> Histories:
    """Users who play one group on the first day of each week, the next group a week later, and other songs between."""
    random = np.random.default_rng(seed)
    songs: list[list[int]] = []
    played_at: list[list[int]] = []
    for _ in range(users):
        first_group = int(random.integers(GROUPS))
        songs.append([])
        played_at.append([])
        for week in range(weeks):
            other_count = int(random.integers(3, 13))
            songs[-1] += (
                (first_group + week) % GROUPS * SONGS_PER_GROUP + random.permutation(SONGS_PER_GROUP)
            ).tolist()
            songs[-1] += random.integers(PLANTED, NUM_SONGS, other_count).tolist()
            times = [MINUTE * position for position in range(SONGS_PER_GROUP)]
            times += sorted((DAY_MS + random.integers(0, 3 * DAY_MS, other_count)).tolist())
            played_at[-1] += [7 * DAY_MS * week + time for time in times]
    return Histories.from_lists(songs, played_at)


def first_day_plays(histories: Histories) -> np.ndarray:
    """int64 (Q,): plays of planted songs that follow another planted song of the same day, which shows the group."""
    is_planted = histories.songs < PLANTED
    return np.flatnonzero(is_planted & np.append(False, is_planted[:-1]) & (histories.places > 0))


def recall_a_week_later(**horizons: tuple[int, ...]) -> float:
    """The share of next week's group in the four songs nearest to the long taste vector, for users outside the fit."""
    config = TrainConfig(
        hidden_dim=24,
        window=40,
        batch=8,
        objective="softmax",
        averages=(0.0, 0.5),
        learning_rate=0.02,
        table_learning_rate=0.02,
        averaged_part=0.2,
        dropout=0.0,
        epochs=10,
        **horizons,
    )
    torch.set_num_threads(1)
    plays = weekly_histories(80)
    data = FitData(vectors=random_vectors(NUM_SONGS), counts=np.bincount(plays.songs, minlength=NUM_SONGS))
    host = MemoryHost({"final": plays}, config)
    model = Fit(model_config(config), config, {"final": data}, host, validation=None).run()
    vectors = export_song_vectors(model, np.ones(NUM_SONGS, dtype=bool)).numpy()
    evaluation_histories = weekly_histories(20, seed=1)
    query_plays = first_day_plays(evaluation_histories)
    tastes = TasteEncoder(model).vectors(
        evaluation_histories, Queries.before_plays(evaluation_histories, query_plays), "long"
    )
    nearest = np.argsort(-(tastes @ vectors.T), axis=1)[:, :SONGS_PER_GROUP]
    next_groups = (evaluation_histories.songs[query_plays] // SONGS_PER_GROUP + 1) % GROUPS
    return float((nearest // SONGS_PER_GROUP == next_groups[:, None]).mean())


def test_a_horizon_of_days_finds_what_is_played_a_week_later_and_one_of_plays_does_not() -> None:
    assert recall_a_week_later(long_days=(6, 8)) > 0.9
    assert recall_a_week_later(long=(1, 10)) < 0.3


def test_a_network_of_days_alone_is_validated_by_plays_in_the_range() -> None:
    histories = weekly_histories(10)
    query_plays = first_day_plays(histories)
    start, end = A_WEEK_LATER.spans(histories, Queries.before_plays(histories, query_plays))
    validation = Validation(histories=histories, plays=query_plays[start < end], horizon=A_WEEK_LATER)
    groups = histories.songs // SONGS_PER_GROUP
    np.testing.assert_array_equal(groups[validation.answers], (groups[validation.plays] + 1) % GROUPS)
    assert (histories.rows[validation.answers] == histories.rows[validation.plays]).all()
    assert len(set((validation.answers - validation.plays).tolist())) > 10
    next_play_validation = Validation(histories=histories, plays=query_plays)
    np.testing.assert_array_equal(next_play_validation.answers, next_play_validation.plays)
