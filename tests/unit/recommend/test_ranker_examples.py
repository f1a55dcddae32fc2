"""The examples of rankers: the songs that were played in the horizon of each query."""

import numpy as np
import pytest
import torch
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import DAY_MS, Split
from rayrec.model.network import TasteModel
from rayrec.model.train_config import AnyHorizon, DaysHorizon, FeatureSpec, Horizon, ModelConfig
from rayrec.recommend.stored_retrieval import Retrieval
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
    return CandidateSource(network, Retrieval.fit([histories], num_songs=NUM_SONGS))


@pytest.mark.parametrize("long", [DAYS, PLAYS])
def test_the_long_ranker_learns_the_plays_that_the_long_horizon_is_for(long: AnyHorizon) -> None:
    """The plays within its days; if the horizon counts in plays, the plays at offsets 25 to 50."""
    histories = random_histories(12, NUM_SONGS, longest=70, seed=2)
    times = np.cumsum(np.random.default_rng(0).choice([0, DAY_MS // 5], size=histories.num_plays))
    histories = Histories(
        user_ids=histories.user_ids, offsets=histories.offsets, songs=histories.songs, played_at=times
    )
    source, plays = _source(long, histories), np.flatnonzero(histories.places > 3)[::5]
    ends = histories.offsets[1:][histories.rows]
    rows: list[int] = []
    songs: list[int] = []
    for query, play in enumerate(plays.tolist()):
        for later in range(play, int(ends[play])):
            passed = int(times[later] - times[play])
            if (DAY_MS <= passed < 3 * DAY_MS) if long is DAYS else (25 <= later - play + 1 <= 50):
                rows.append(query)
                songs.append(int(histories.songs[later]))
    queries = Queries.before_plays(histories, plays)
    held_out = checks_rankers(histories.user_ids)[queries.rows]
    answers: dict[RankerKind, tuple[np.ndarray, np.ndarray]] = {"long": (np.array(rows), np.array(songs))}
    wanted = examples_for(source, histories, queries, answers, held_out=held_out)["long"]
    found = collect_examples({"": source}, histories, plays)[""]["long"]
    assert wanted.right.sum() > 50
    np.testing.assert_array_equal(found.right, wanted.right)
    np.testing.assert_array_equal(found.counts, wanted.counts)


IN_TIME = Split(id="s", dataset="d", validation_from=100, test_from=200)
BY_SHARE = Split(id="s", dataset="d", protocol="last-fraction", last_fraction=0.25, validation_fraction=0.25)
TIMES = {
    "before, in and after": [50, 99, 100, 150, 199, 200, 250],
    "first play in it": [130, 180, 300],
    "before alone": [10, 20],
    "after alone": [200, 300, 400],
    "only a first play in it": [150, 220],
    "eight": [1, 2, 3, 4, 5, 6, 7, 8],
}


def _planted() -> Histories:
    """Users named after the times of their plays; every play is of a different song."""
    ends = np.cumsum([len(times) for times in TIMES.values()])
    songs = [list(range(end - len(times), end)) for end, times in zip(ends, TIMES.values(), strict=True)]
    return Histories.from_lists(songs, list(TIMES.values()), list(TIMES))


def _asked(histories: Histories, plays: np.ndarray) -> dict[str, list[int]]:
    """The times of the plays to predict, by user."""
    asked: dict[str, list[int]] = {}
    for play, row in zip(plays.tolist(), histories.rows[plays].tolist(), strict=True):
        asked.setdefault(str(histories.user_ids[row]), []).append(int(histories.played_at[play]))
    return asked


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (IN_TIME, {"before, in and after": [100, 150, 199], "first play in it": [180]}),
        (
            BY_SHARE,  # of n plays those from floor(n / 2 + 1/2) up to floor(3 n / 4 + 1/2)
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
def test_rankers_are_asked_for_the_plays_of_the_validation_range_that_have_one_before_them(
    split: Split, expected: dict[str, list[int]]
) -> None:
    planted = _planted()
    histories, plays = validation_queries(planted, split, 100)
    assert _asked(histories, plays) == expected
    # The histories end with each user's last play in the range, and hold the earlier plays of these users.
    of_user = dict(zip(planted.user_ids.tolist(), np.split(planted.songs, planted.offsets[1:-1]), strict=True))
    assert set(histories.user_ids) == set(_asked(histories, plays))
    for row, user in enumerate(histories.user_ids):
        last = max(expected[user])
        songs = histories.songs[histories.offsets[row] : histories.offsets[row + 1]]
        assert songs.tolist() == of_user[user][: TIMES[user].index(last) + 1].tolist()


def test_which_plays_rankers_are_asked_for_follows_from_user_and_time() -> None:
    histories = random_histories(40, NUM_SONGS, longest=20, seed=4)
    split = Split(id="s", dataset="d", validation_from=400_000, test_from=1_500_000)
    whole = _asked(*validation_queries(histories, split, 10**6))
    some = _asked(*validation_queries(histories, split, 25))
    assert sum(map(len, whole.values())) > 100
    assert sum(map(len, some.values())) == 25
    assert all(set(times) <= set(whole[user]) for user, times in some.items())
    backwards = histories.take(np.arange(len(histories))[::-1])
    assert _asked(*validation_queries(backwards, split, 25)) == some
    assert validation_queries(histories, split, 0)[1].tolist() == []


def test_users_held_out_teach_rankers_nothing() -> None:
    histories = random_histories(40, NUM_SONGS, longest=20, seed=4)
    split = Split(id="s", dataset="d", validation_from=400_000, test_from=1_500_000, held_out_share=0.5)
    asked = set(_asked(*validation_queries(histories, split, 10**6)))
    held_out = set(histories.user_ids[~split.final.allowed_users(histories.user_ids)])
    assert len(asked) > 5
    assert len(held_out) > 5
    assert not asked & held_out
