"""What rankers learn from: the songs that were played in the horizon of each query."""

import numpy as np
import pytest
import torch
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import DAY_MS
from rayrec.model.network import TasteModel
from rayrec.model.train_config import AnyHorizon, DaysHorizon, FeatureSpec, Horizon, ModelConfig
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import CandidateSource, RankerKind, checks_rankers, collect_examples, examples_for

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
    """Those of its days, or at offsets 25 to 50 where it counts in plays."""
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
