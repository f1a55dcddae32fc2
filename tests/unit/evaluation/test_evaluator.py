"""Evaluators loaded from files give the same sums and send little to workers; pairs of prefix and target are read."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from networks import model_config, network
from rankings import retrieval_of
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import Split
from rayrec.errors import InputError
from rayrec.evaluation.accumulator import MetricAccumulator
from rayrec.evaluation.evaluator import (
    Evaluator,
    Prefixes,
    PrefixEvaluator,
    PrefixFile,
    evaluator_files,
    parse_prefixes,
    read_prefixes,
)
from rayrec.evaluation.protocol import EvaluateConfig, TargetSongs
from rayrec.evaluation.ranks import rank_targets
from rayrec.evaluation.results import Statistics
from rayrec.importing.readers.reader import byte_ranges
from rayrec.model.checkpoint import save_model
from rayrec.recommend.base import HorizonName
from rayrec.recommend.baselines import ItemKnnRecommender, PopularityRecommender
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.ranker import LinearModel, Ranker, calibrate
from rayrec.recommend.session_knn import VstanRecommender
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import CandidateSource, RankerKind, TwoStepRecommender
from rayrec.storage.workspace import Workspace

SPLIT = Split(id="cut", dataset="by-hand", validation_from=400_000, test_from=700_000)
SETTINGS = EvaluateConfig(offsets=5)
FOLDER = "reports/r/run"


def _evaluator(workspace: Workspace, histories: Histories, num_songs: int, *, index: str = "flat") -> Evaluator:
    """An evaluator of a two-step recommender, a network and baselines, with their arrays in files, as in artifacts."""
    fit_histories = [SPLIT.final.select(histories)]
    retrieval_of(fit_histories, num_songs=num_songs).save(workspace, "retrieval")
    model = network(model_config(num_songs=num_songs, input_table=True))
    save_model(workspace, "model", model, np.ones(num_songs, dtype=np.bool_))
    taste = TasteRecommender.from_folder(workspace, "model")
    taste.index = SongIndex.build(taste.song_vectors, IndexConfig(kind=index, nlist=4))  # type: ignore[arg-type]
    source = CandidateSource(taste, Retrieval.load(workspace, "retrieval"))
    weights = np.random.default_rng(0).random((5, len(source.sources.names)))
    calibration = calibrate(np.array([0, 0]), np.array([1.0, 0.0]), np.array([True, False]))
    served_weights = weights * np.array([1, 1, 1, 1, -1])[:, None]  # the opposite order
    rankers: dict[RankerKind, Ranker] = {
        "next": Ranker(LinearModel(weights), source.sources.names, calibration),
        "served": Ranker(LinearModel(served_weights), source.sources.names, calibration),
    }
    two_step = TwoStepRecommender(source, rankers)
    workspace.write_array("songs.npy", random_vectors(num_songs, seed=1))
    item_knn = ItemKnnRecommender(workspace.read_array("songs.npy"))
    vstan = VstanRecommender.fit(fit_histories, num_songs=num_songs, allowed=SPLIT.final)
    popularity = PopularityRecommender.fit(fit_histories, num_songs=num_songs, allowed=SPLIT.final)
    models = [two_step, taste, taste.short_only(), item_knn, vstan, popularity]
    return Evaluator(models, split=SPLIT, song_plays=popularity.plays, config=SETTINGS)


def _sums(accumulator: MetricAccumulator) -> dict[str, np.ndarray]:
    return {field.name: getattr(accumulator, field.name) for field in fields(accumulator)}


@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_an_evaluator_from_files_adds_up_the_same_sums(workspace: Workspace, index: str) -> None:
    histories = random_histories(60, 40, seed=3)
    evaluator = _evaluator(workspace, histories, 40, index=index)
    with evaluator_files(workspace, FOLDER, evaluator) as files:
        loaded: Evaluator = files.load()
        expected, actual = _sums(evaluator(histories)), _sums(loaded(histories))
    assert expected["queries"].sum() > 0
    for name, sums in expected.items():
        np.testing.assert_array_equal(actual[name], sums, err_msg=name)
    assert not workspace.exists(FOLDER)


def test_songs_rank_in_the_order_of_answers_with_heard_songs_and_without_them(workspace: Workspace) -> None:
    histories = random_histories(60, 40, seed=3)
    histories = histories.take(histories.lengths > 5)
    evaluator = _evaluator(workspace, histories, 40)
    two_step = evaluator.recommenders[0]
    assert isinstance(two_step, TwoStepRecommender)
    moment = int(histories.played_at.max())
    queries = Queries.at_end(histories, moment)
    first_songs = []
    for served in (False, True):
        answers = two_step.recommend(histories, moment, 40, exclude_heard=served)
        rows, columns = np.nonzero((answers[0] >= 0) & (answers[1] > 0))  # only songs that were proposed
        songs, scores = (values[rows, columns] for values in answers)
        is_known = evaluator.known_songs[songs]
        targets = TargetSongs(
            rows=rows[is_known],
            songs=songs[is_known].astype(np.int64),
            sizes=np.bincount(rows[is_known], minlength=len(queries)),
            served=served,
        )
        ranked = rank_targets(two_step, histories, queries, {"songs": targets}, evaluator.known_songs, depth=40)
        # Songs of equal score count.
        expected_ranks = (answers[1][rows[is_known]] >= scores[is_known][:, None]).sum(axis=1)
        np.testing.assert_array_equal(ranked.ranks["songs"], expected_ranks)
        first_songs.append(answers[0][:, 0])
    assert (first_songs[0] != first_songs[1]).mean() > 0.5


def test_what_is_sent_to_workers_does_not_grow_with_the_catalog(workspace: Workspace) -> None:
    sizes = []
    for num_songs in (2_000, 20_000):
        evaluator = _evaluator(workspace, random_histories(60, num_songs, seed=3), num_songs)
        with evaluator_files(workspace, FOLDER, evaluator) as files:
            sizes.append(len(files.pickled))
    assert max(sizes) - min(sizes) < 500
    assert max(sizes) < 100_000


def test_arrays_of_artifacts_are_not_written_again(workspace: Workspace) -> None:
    num_songs, dim = 20_000, 64
    workspace.write_array("songs.npy", random_vectors(num_songs, dim))
    recommender = ItemKnnRecommender(np.asarray(workspace.read_array("songs.npy")))
    evaluator = Evaluator([recommender], split=SPLIT, song_plays=np.ones(num_songs), config=SETTINGS)
    with evaluator_files(workspace, FOLDER, evaluator) as files:
        assert workspace.size(FOLDER) < num_songs * 50 < 4 * num_songs * dim
        loaded: Evaluator = files.load()
        vectors = loaded.recommenders[0].song_vectors  # type: ignore[attr-defined]
        np.testing.assert_array_equal(vectors, recommender.song_vectors)
        assert vectors.flags.writeable is False


SONGS = pa.chunked_array([["a", "b"], ["c", "d"]])
TAB_SEPARATED = PrefixFile(path="pairs.txt")


def _parse(lines: list[str], file: PrefixFile = TAB_SEPARATED) -> Prefixes:
    return parse_prefixes(pa.array(lines, pa.string()), file, SONGS)


def test_lines_read_as_songs_three_minutes_apart_and_a_target() -> None:
    pairs = _parse(["a b\tc", "d\ta", "c x  a \ty", "\tb"])
    assert pairs.histories.offsets.tolist() == [0, 2, 3, 6, 6]
    assert pairs.histories.songs.tolist() == [0, 1, 3, 2, 4, 0]  # x is not in the catalog
    assert pairs.histories.played_at.tolist() == [0, 180_000, 0, 0, 180_000, 360_000]
    assert pairs.targets.tolist() == [2, 0, 4, 1]
    assert pairs.counts.tolist() == [4, 1, 1]


def test_other_separators_can_be_set() -> None:
    file = PrefixFile(path="p", item_separator=":", target_separator=" > ")
    pairs = _parse(["a:b > c"], file)
    assert (pairs.histories.songs.tolist(), pairs.targets.tolist()) == ([0, 1], [2])
    comma_pairs = _parse(["a,b,c"], PrefixFile(path="p", item_separator=" ", target_separator=","))
    # The last one is the target.
    assert (comma_pairs.histories.songs.tolist(), comma_pairs.targets.tolist()) == ([4], [2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"item_separator": ""}, "item_separator is ''; expected a non-empty string"),
        ({"target_separator": ""}, "target_separator is ''; expected a non-empty string"),
        ({"item_separator": "\\t"}, "--item-separator and --target-separator are both '\\\\t'"),
    ],
)
def test_separators_must_tell_songs_apart(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PrefixFile(path="p", **settings)


def test_a_line_without_a_target_is_refused_by_its_text() -> None:
    with pytest.raises(InputError, match=r"pairs.txt has a line without the target separator .*: 'a b c'"):
        _parse(["a\tb", "a b c"])


def test_shards_of_a_file_hold_every_pair_once(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    lines = [f"{'abcd'[row % 4]} {'abcd'[row % 3]}\t{'abcdx'[row % 5]}" for row in range(40)]
    path.write_text("\ufeff" + "\r\n".join([*lines[:20], "", *lines[20:]]))
    units = byte_ranges(str(path), path.stat().st_size, 50)
    assert len(units) > 3
    parts = [parts for unit in units for parts in read_prefixes(unit, TAB_SEPARATED, SONGS)]
    expected = _parse(lines)
    assert sum(part.counts for part in parts).tolist() == [40, 8, 0]
    np.testing.assert_array_equal(np.concatenate([part.targets for part in parts]), expected.targets)
    np.testing.assert_array_equal(np.concatenate([part.histories.songs for part in parts]), expected.histories.songs)


def test_figures_are_those_worked_out_by_hand_and_unknown_songs_are_misses() -> None:
    # b is the most popular, then a; c is in the catalog without a play, d is rare, and x is not in the catalog.
    plays = np.array([3, 5, 0, 1])
    popularity = PopularityRecommender(np.array([3, 5, 9, 1]))
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], dtype=np.float32)
    models = [popularity, ItemKnnRecommender(vectors)]
    config = EvaluateConfig(ks=(1, 2), bootstrap_samples=50)
    evaluator = PrefixEvaluator(models, song_plays=plays, config=config)
    sums = evaluator(_parse(["a\tb", "a\ta", "b\tc", "b\tx", "x\tb"]))
    values = {
        (row["model"], row["metric"], row["k"]): row["value"]
        for row in Statistics(sums, models, config).results(["next"])
        if row["users"] == "all"
    }
    # Popularity ranks c, b, a, d, so b is second twice. Item kNN ranks a, b, c, d after a, and nothing after x.
    assert values["popularity", "recall", 1] == 0
    assert values["popularity", "recall", 2] == pytest.approx(2 / 5)
    assert values["popularity", "mrr", 2] == pytest.approx(1 / 5)
    assert values["item-knn", "recall", 1] == pytest.approx(1 / 5)
    assert values["item-knn", "recall", 2] == pytest.approx(2 / 5)
    assert values["item-knn", "ndcg", 2] == pytest.approx((1 + 1 / np.log2(3)) / 5, abs=1e-6)
    # As served, the songs of the prefix are left out: popularity finds b after a and after x, item kNN only after a.
    differences = {
        (entry["target"], entry["metric"]): entry["difference"]
        for entry in Statistics(sums, models, config).comparisons("item-knn")
    }
    assert differences == {
        ("served", "recall"): -0.25,
        ("served", "mrr"): 0,
        ("next", "recall"): 0,
        ("next", "mrr"): pytest.approx(0.1),
    }
    served_recalls = {
        row["model"]: row["value"]
        for row in Statistics(sums, models, config).results(["served"])
        if (row["users"], row["metric"], row["k"]) == ("all", "recall", 2)
    }
    assert served_recalls == {"popularity": 2 / 4, "item-knn": 1 / 4}


def test_an_unknown_target_is_a_miss_as_served_even_after_an_unknown_song() -> None:
    popularity = PopularityRecommender(np.array([3, 5, 0, 1]))
    evaluator = PrefixEvaluator([popularity], song_plays=np.array([3, 5, 0, 1]), config=EvaluateConfig(ks=(1,)))
    sums = evaluator(_parse(["a x\ty", "a\tb"]))
    (recall,) = (
        row["value"]
        for row in Statistics(sums, [popularity], evaluator.config).results(["served"])
        if (row["users"], row["metric"], row["k"]) == ("all", "recall", 1)
    )
    assert recall == 1 / 2


class RecordingPopularity(PopularityRecommender):
    """Popularity that records the times of the plays and of the queries of its last call."""

    last_times: tuple[list[int], list[int]] = ([], [])

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        self.last_times = histories.played_at.tolist(), queries.at.tolist()
        return super().score(histories, queries, horizon)


def test_queries_of_prefixes_come_after_the_plays_that_the_models_know() -> None:
    model, last_moment = RecordingPopularity(np.array([3, 5, 0, 1])), 1_700_000_000_000
    evaluator = PrefixEvaluator([model], song_plays=np.ones(4), config=EvaluateConfig(ks=(1,)), begin=last_moment)
    evaluator(_parse(["a b\tc"]))
    assert model.last_times == ([last_moment, last_moment + 180_000], [last_moment + 360_000])
