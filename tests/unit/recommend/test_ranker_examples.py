"""The examples of rankers: the songs that were played in the horizon of each query."""

import numpy as np
import pytest
import torch
from rankings import retrieval_of
from worlds import random_histories, random_vectors, with_opinions

from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import DAY_MS
from rayrec.data.split import Split
from rayrec.model.network import TasteModel
from rayrec.model.train_config import AnyHorizon, DaysHorizon, FeatureSpec, Horizon, ModelConfig
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import (
    CandidateSource,
    RankerKind,
    checks_rankers,
    collect_examples,
    examples_for,
    validation_queries,
)

NUM_SONGS = 40
DAYS = DaysHorizon(first_day=1, last_day=3)
PLAYS = Horizon(min_offset=2, max_offset=4)


def _source(long: AnyHorizon, histories: Histories) -> CandidateSource:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig(
        num_songs=NUM_SONGS,
        embedding_dim=8,
        hidden_dim=12,
        num_layers=1,
        dropout=0.0,
        features=FeatureSpec(),
        horizons={"short": Horizon(min_offset=1, max_offset=1), "long": long},
        song_table="frozen",
        logit_scales={"short": 9.0, "long": 6.0},
        cell="gru",
        averages=(),
        input_table=False,
    )
    vectors = random_vectors(NUM_SONGS, 8)
    network = TasteRecommender(TasteModel(config, torch.from_numpy(vectors)).eval(), vectors)
    return CandidateSource(network, retrieval_of([histories], num_songs=NUM_SONGS))


@pytest.mark.parametrize("long", [DAYS, PLAYS])
def test_the_long_ranker_learns_the_plays_that_the_long_horizon_is_for(long: AnyHorizon) -> None:
    """The plays within its days; if the horizon counts in plays, the plays at offsets 25 to 50."""
    histories = random_histories(12, NUM_SONGS, longest=70, seed=2)
    times = np.cumsum(np.random.default_rng(0).choice([0, DAY_MS // 5], size=histories.num_plays))
    histories = Histories(
        user_ids=histories.user_ids, offsets=histories.offsets, songs=histories.songs, played_at=times
    )
    source, plays = _source(long, histories), np.flatnonzero(histories.places > 3)[::5]
    user_ends = histories.offsets[1:][histories.rows]
    rows: list[int] = []
    songs: list[int] = []
    for query, play in enumerate(plays.tolist()):
        for later_play in range(play, int(user_ends[play])):
            elapsed = int(times[later_play] - times[play])
            if (DAY_MS <= elapsed < 3 * DAY_MS) if long is DAYS else (25 <= later_play - play + 1 <= 50):
                rows.append(query)
                songs.append(int(histories.songs[later_play]))
    queries = Queries.before_plays(histories, plays)
    held_out = checks_rankers(histories.user_ids)[queries.rows]
    answers: dict[RankerKind, tuple[np.ndarray, np.ndarray]] = {"long": (np.array(rows), np.array(songs))}
    expected = examples_for(source, histories, queries, answers, held_out=held_out)["long"]
    actual = collect_examples({"": source}, histories, plays)[""]["long"]
    assert expected.right.sum() > 50
    np.testing.assert_array_equal(actual.right, expected.right)
    np.testing.assert_array_equal(actual.counts, expected.counts)


RANDOM_SPLIT = Split(id="s", dataset="d", validation_from=400_000, test_from=1_500_000)  # of random histories
TIME_SPLIT = Split(id="s", dataset="d", validation_from=100, test_from=200)
LAST_FRACTION_SPLIT = Split(id="s", dataset="d", protocol="last-fraction", last_fraction=0.25, validation_fraction=0.25)
PLAY_TIMES = {
    "before, in and after": [50, 99, 100, 150, 199, 200, 250],
    "first play in it": [130, 180, 300],
    "before alone": [10, 20],
    "after alone": [200, 300, 400],
    "only a first play in it": [150, 220],
    "eight": [1, 2, 3, 4, 5, 6, 7, 8],
}


def _planted_histories() -> Histories:
    """Users named after the times of their plays; every play is of a different song."""
    ends = np.cumsum([len(times) for times in PLAY_TIMES.values()])
    songs = [list(range(end - len(times), end)) for end, times in zip(ends, PLAY_TIMES.values(), strict=True)]
    return Histories.from_lists(songs, list(PLAY_TIMES.values()), list(PLAY_TIMES))


def _predicted_times(histories: Histories, plays: np.ndarray) -> dict[str, list[int]]:
    """The times of the plays to predict, by user."""
    times_by_user: dict[str, list[int]] = {}
    for play, row in zip(plays.tolist(), histories.rows[plays].tolist(), strict=True):
        times_by_user.setdefault(str(histories.user_ids[row]), []).append(int(histories.played_at[play]))
    return times_by_user


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (TIME_SPLIT, {"before, in and after": [100, 150, 199], "first play in it": [180]}),
        (
            LAST_FRACTION_SPLIT,  # of n plays those from floor(n / 2 + 1/2) up to floor(3 n / 4 + 1/2)
            {
                "before, in and after": [199],
                "before alone": [20],
                "only a first play in it": [220],
                "eight": [5, 6],
            },
        ),
    ],
    ids=["in time", "last fraction"],
)
def test_rankers_predict_the_validation_plays_that_have_an_earlier_play(
    split: Split, expected: dict[str, list[int]]
) -> None:
    all_histories = _planted_histories()
    histories, plays = validation_queries([all_histories], split, 100)
    assert _predicted_times(histories, plays) == expected
    # The histories end with each user's last play in the range, and hold the earlier plays of these users.
    songs_by_user = dict(
        zip(all_histories.user_ids.tolist(), np.split(all_histories.songs, all_histories.offsets[1:-1]), strict=True)
    )
    assert set(histories.user_ids) == set(_predicted_times(histories, plays))
    for row, user in enumerate(histories.user_ids):
        last_time = max(expected[user])
        songs = histories.songs[histories.offsets[row] : histories.offsets[row + 1]]
        assert songs.tolist() == songs_by_user[user][: PLAY_TIMES[user].index(last_time) + 1].tolist()


def test_the_sample_of_predicted_plays_depends_only_on_user_and_time() -> None:
    histories = random_histories(40, NUM_SONGS, longest=20, seed=4)
    split = RANDOM_SPLIT
    full = _predicted_times(*validation_queries([histories], split, 10**6))
    sample = _predicted_times(*validation_queries([histories], split, 25))
    assert sum(map(len, full.values())) > 100
    assert sum(map(len, sample.values())) == 25
    assert all(set(times) <= set(full[user]) for user, times in sample.items())
    reversed_histories = histories.take(np.arange(len(histories))[::-1])
    assert _predicted_times(*validation_queries([reversed_histories], split, 25)) == sample
    assert validation_queries([histories], split, 0)[1].tolist() == []


@pytest.mark.parametrize("limit", [1, 25, 10**6])
@pytest.mark.parametrize("split", [RANDOM_SPLIT, LAST_FRACTION_SPLIT], ids=["in time", "last fraction"])
def test_the_sample_of_predicted_plays_does_not_depend_on_the_batches_of_users(split: Split, limit: int) -> None:
    histories = with_opinions(random_histories(40, NUM_SONGS, longest=20, seed=4), NUM_SONGS)
    expected_histories, expected_plays = validation_queries([histories], split, limit)
    batches = [histories.take(np.arange(start, min(start + 7, 40))) for start in range(0, 40, 7)]
    batch_histories, batch_plays = validation_queries(batches, split, limit)
    assert 0 < len(expected_plays) <= limit
    np.testing.assert_array_equal(batch_plays, expected_plays)
    assert batch_histories.to_arrow().equals(expected_histories.to_arrow())


def test_users_held_out_teach_rankers_nothing() -> None:
    histories = random_histories(40, NUM_SONGS, longest=20, seed=4)
    split = Split(id="s", dataset="d", validation_from=400_000, test_from=1_500_000, held_out_share=0.5)
    predicted_users = set(_predicted_times(*validation_queries([histories], split, 10**6)))
    held_out_users = set(histories.user_ids[~split.final.allowed_users(histories.user_ids)])
    assert len(predicted_users) > 5
    assert len(held_out_users) > 5
    assert not predicted_users & held_out_users
