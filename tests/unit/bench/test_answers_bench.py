"""The release of the answers benchmark, built without Ray: a server finds all that it reads there."""

import pytest
from without_ray import without_ray

from rayrec.bench.answers_bench import build_answers_release
from rayrec.bench.bench_config import AnswersBenchConfig
from rayrec.recommend.answer import load_popular_order, load_recommender
from rayrec.storage.workspace import Workspace

SONGS = 500


def test_the_built_release_recommends_popular_songs_to_a_user_without_plays(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    dataset, release, _ = build_answers_release(workspace, AnswersBenchConfig.quick(), SONGS)
    recommender = load_recommender(dataset.workspace, dataset, release.inputs)
    popular_order = load_popular_order(dataset, recommender, release.inputs)
    assert sorted(popular_order.order) == list(range(SONGS))
