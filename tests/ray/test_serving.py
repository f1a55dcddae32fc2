"""The application on a real Ray Serve, over HTTP."""

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from served import AT, NUM_SONGS, SONGS, WITHOUT_VECTOR
from serving_apps import running

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Queries
from rayrec.data.top_k import top_k
from rayrec.evaluation.protocol import HeardSongs, target_songs
from rayrec.evaluation.ranks import rank_targets
from rayrec.recommend.answer import history_of_songs, load_recommender
from rayrec.recommend.base import HorizonName
from rayrec.recommend.two_step import TwoStepRecommender
from rayrec.storage import releases
from rayrec.storage.workspace import Workspace


@pytest.fixture(scope="module")
def url(world: Workspace, cluster: None) -> Iterator[str]:
    with running(world) as url:
        yield url


@pytest.mark.parametrize("horizon", ["short", "long"])
def test_over_http_the_answer_is_what_evaluate_ranks(url: str, world: Workspace, horizon: HorizonName) -> None:
    parts = releases.default_parts(world)
    recommender = load_recommender(world, Dataset(world), parts)
    assert isinstance(recommender, TwoStepRecommender)
    history = history_of_songs(Dataset(world).catalog(), SONGS, AT)
    scores = recommender.score(history, Queries.at_end(history, AT), horizon)
    rows, best_scores = top_k(scores, 50)
    body = {"history": SONGS, "at": AT, "k": 50, "horizon": horizon, "exclude_heard": False}
    answer = httpx.post(f"{url}/v1/recommendations", json=body, timeout=60).json()
    assert [song["song_id"] for song in answer["songs"]] == [f"song-{row}" for row in rows[0]]
    np.testing.assert_allclose([song["score"] for song in answer["songs"]], best_scores[0], rtol=1e-4)


@pytest.mark.parametrize("horizon", ["short", "long"])
def test_over_http_a_song_stands_where_evaluate_ranks_it(url: str, world: Workspace, horizon: HorizonName) -> None:
    """Each query is at the moment of a play, from the plays before it; the song of that play is ranked."""
    histories = next(iter(Dataset(world).read_all()))
    plays = np.flatnonzero((histories.places > 3) & (histories.songs != WITHOUT_VECTOR))[::20][:6]
    queries = Queries.before_plays(histories, plays)
    recommender = load_recommender(world, Dataset(world), releases.default_parts(world))
    targets = {"next": target_songs(histories, queries, "next", HeardSongs(histories))}
    is_known = np.ones(NUM_SONGS, dtype=np.bool_)
    expected = rank_targets(
        recommender, histories, queries, targets, is_known, depth=NUM_SONGS, horizons={"next": horizon}
    )
    ranks = []
    for row, play, at in zip(queries.rows, plays, queries.at, strict=True):
        user_span, song = slice(histories.offsets[row], play), histories.songs[play]
        history = [
            {"song_id": f"song-{song}", "played_at": int(played_at)}
            for song, played_at in zip(histories.songs[user_span], histories.played_at[user_span], strict=True)
        ]
        body = {"history": history, "at": int(at), "k": NUM_SONGS, "horizon": horizon, "exclude_heard": False}
        answer = httpx.post(f"{url}/v1/recommendations", json=body, timeout=60).json()
        ranks.append(1 + [entry["song_id"] for entry in answer["songs"]].index(f"song-{song}"))
    assert ranks == expected.ranks["next"].tolist()


def test_errors_are_problems_through_serve_too(url: str) -> None:
    for response, status in (
        (httpx.get(f"{url}/v1/nothing", timeout=60), 404),
        (httpx.get(f"{url}/v1/recommendations", timeout=60), 405),
        (httpx.post(f"{url}/v1/recommendations", content=b"{", timeout=60), 415),
        (httpx.post(f"{url}/v1/recommendations", json={"history": [], "k": 0}, timeout=60), 422),
    ):
        assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
        assert response.json()["status"] == status
