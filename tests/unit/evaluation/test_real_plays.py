"""Sequential rules and popularity on real plays, against figures measured elsewhere on the same plays."""

from pathlib import Path

import numpy as np
import pyarrow.csv
import pytest

from rayrec.data.histories import Histories
from rayrec.data.split import SplitConfig, make_split
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.results import Statistics
from rayrec.recommend.baselines import PopularityRecommender, SequentialRulesRecommender


@pytest.fixture(scope="module")
def plays(real_data: Path) -> Histories:
    table = pyarrow.csv.read_csv(real_data / "30music-sample10" / "sessions_sample_10.csv")
    users, songs, seconds = (table.column(name).to_numpy() for name in ("user_id", "song_id", "ts"))
    order = np.lexsort((seconds, users))
    user_ids, counts = np.unique(users, return_counts=True)
    return Histories(
        user_ids=user_ids.astype(str).astype(object),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        songs=np.unique(songs, return_inverse=True)[1][order].astype(np.int32),
        played_at=seconds[order].astype(np.int64) * 1000,
    )


def test_rules_and_popularity_find_as_many_songs_as_measured_elsewhere(plays: Histories) -> None:
    first_play = int(plays.played_at.min())
    last_play = int(plays.played_at.max())
    num_songs = int(plays.songs.max()) + 1
    split = make_split(SplitConfig(test_days=30), dataset="real", first_play=first_play, last_play=last_play)
    fit_histories = split.final.select(plays)
    popularity = PopularityRecommender.fit([fit_histories], num_songs=num_songs, allowed=split.final)
    rules = SequentialRulesRecommender.fit([fit_histories], num_songs=num_songs, allowed=split.final)
    config = EvaluateConfig(ks=(20,), bootstrap_samples=100, offsets=0)
    evaluator = Evaluator([popularity, rules], split=split, song_plays=popularity.plays, config=config)
    results = Statistics(evaluator(plays), evaluator.recommenders, config).results(["next", "served"])
    next_entries = {
        (entry["model"], entry["metric"]): entry
        for entry in results
        if (entry["users"], entry["target"]) == ("all", "next")
    }
    served_values = {
        (entry["model"], entry["metric"]): entry["value"]
        for entry in results
        if (entry["users"], entry["target"]) == ("all", "served")
    }
    assert next_entries["popularity", "recall"]["plays"] == 77_589
    assert next_entries["popularity", "recall"]["users_count"] == 5_215
    # 0.015, 0.367 and 0.264 were measured on a sample of 20,000 of these plays.
    assert next_entries["popularity", "recall"]["value"] == pytest.approx(0.015, abs=0.003)
    assert next_entries["sequential-rules", "recall"]["value"] == pytest.approx(0.367, abs=0.01)
    assert next_entries["sequential-rules", "mrr"]["value"] == pytest.approx(0.264, abs=0.01)
    # As served, 0.3597 and 0.2649 were measured on a sample of 8,000 of these plays.
    assert served_values["sequential-rules", "recall"] == pytest.approx(0.36, abs=0.01)
    assert served_values["sequential-rules", "mrr"] == pytest.approx(0.265, abs=0.01)
