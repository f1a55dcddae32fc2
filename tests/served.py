"""A small world for tests of the server: a data set, its releases, and the application."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import httpx
import numpy as np
from networks import model_config, network
from rankings import fit_rankers
from worlds import random_histories, with_opinions, write_dataset, write_song_vectors

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.model.checkpoint import load_model, save_model
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import TasteModel
from rayrec.model.taste_table import taste_table, tastes_file
from rayrec.model.train_config import PLAY_COUNTS
from rayrec.recommend.index import INDEX_FILE, IndexConfig, SongIndex
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.serving.middleware import Keys
from rayrec.serving.routes import create_app
from rayrec.serving.serve_config import ServeConfig
from rayrec.serving.service import Service, open_service
from rayrec.storage import releases
from rayrec.storage.artifacts import Manifest, load_manifest, publish
from rayrec.storage.workspace import Workspace

NUM_SONGS = 200
BEGIN = 1_700_000_000_000  # ms UTC, before all plays of the world
AT = BEGIN + 40_000_000  # ms UTC, after all plays of the world
WITHOUT_VECTOR = 7  # row of a song without an embedding, which is never recommended
SONGS = ["song-3", "song-50", "song-3", "song-9"]  # a history


def write_world(
    workspace: Workspace, *, users: int = 60, num_songs: int = NUM_SONGS, opinions: bool = False
) -> Histories:
    """Write a data set of random plays with song embeddings; with `opinions` it has skipped plays and liked songs."""
    histories = random_histories(users, min(num_songs, NUM_SONGS))  # few songs, so that they repeat
    histories = histories.take(histories.lengths > 0)
    histories = replace(histories, played_at=histories.played_at + BEGIN)
    histories = with_opinions(histories, num_songs) if opinions else histories
    write_dataset(workspace, histories, num_songs)
    write_song_vectors(workspace, np.ones((num_songs, 8), np.float32), {"dataset": "by-hand"})
    return histories


def write_release(
    workspace: Workspace,
    name: str = "1",
    *,
    seed: int = 0,
    model: TasteModel | None = None,
    ranked: bool = True,
    kind: str = "flat",
    activate: bool = True,
    artists: bool = False,
) -> Manifest:
    """Create a release of `model`, or of an untrained network with the seed `seed`, over the data set of a workspace.

    With `ranked` it has a retrieval and rankers; without them the network answers alone. With `artists` the retrieval
    knows the artists of songs.
    """
    dataset = Dataset(workspace)
    histories = list(dataset.read_all())
    model = model or network(model_config(num_songs=dataset.num_songs), seed)
    inputs = {"dataset": dataset.manifest.id, "songs": "by-hand"}
    model_manifest = _write_model(
        workspace, Manifest(kind="models", id=f"model{name}", inputs=inputs), model, histories
    )
    if ranked:
        codes = dataset.catalog().codes(columns.ARTIST) if artists else None
        _write_rankers(workspace, model_manifest, name, concatenate(histories), codes)
    _write_index(workspace, model_manifest, name, kind)
    encoder = TasteEncoder(load_model(workspace, model_manifest.folder))  # as stored: one song has no vector
    tastes = Manifest(
        kind="tastes", id=f"tastes{name}", inputs={"dataset": dataset.manifest.id, "models": model_manifest.id}
    )
    for bucket in range(dataset.manifest.buckets):
        for batch in dataset.read_bucket(bucket):
            workspace.write_table(tastes_file(tastes.folder, bucket), taste_table(encoder, batch, AT))
    publish(workspace, tastes, [path.removeprefix(tastes.folder + "/") for path in workspace.files(tastes.folder)])
    return releases.create_release(workspace, model_id=model_manifest.id, activate=activate)


def damage(workspace: Workspace, release_id: str) -> None:
    """Flip one bit of the model of a release; a second call repairs it."""
    release = load_manifest(workspace, "releases", release_id)
    path = load_manifest(workspace, "models", release.inputs["models"]).path("model.safetensors")
    content = workspace.read_bytes(path)
    workspace.write_bytes(path, content[:-1] + bytes([content[-1] ^ 1]))


def _write_model(workspace: Workspace, manifest: Manifest, model: TasteModel, histories: list[Histories]) -> Manifest:
    num_songs = model.config.num_songs
    is_known = np.arange(num_songs) != WITHOUT_VECTOR
    files = [*save_model(workspace, manifest.folder, model, is_known), PLAY_COUNTS]
    plays = sum(np.bincount(batch.songs, minlength=num_songs) for batch in histories)
    workspace.write_array(manifest.path(PLAY_COUNTS), np.asarray(plays))
    return publish(workspace, manifest, files)


def _write_rankers(
    workspace: Workspace, model: Manifest, name: str, histories: Histories, artists: np.ndarray | None
) -> None:
    retrieval, rankers = fit_rankers(TasteRecommender.load(workspace, model.id), histories, artists)
    inputs = {"dataset": model.inputs["dataset"]}
    retrieval_manifest = Manifest(kind="retrieval", id=f"retrieval{name}", inputs=inputs)
    publish(workspace, retrieval_manifest, retrieval.save(workspace, retrieval_manifest.folder))
    ranker_manifest = Manifest(
        kind="rankers", id=f"rankers{name}", inputs={**inputs, "models": model.id, "retrieval": retrieval_manifest.id}
    )
    files = [file for kind, ranker in rankers.items() for file in ranker.save(workspace, ranker_manifest.folder, kind)]
    publish(workspace, ranker_manifest, files)


def _write_index(workspace: Workspace, model: Manifest, name: str, kind: str) -> None:
    vectors = workspace.read_array(model.path("song_vectors.npy"))
    index = SongIndex.build(vectors, IndexConfig(kind=kind, nlist=8, queries=50))  # type: ignore[arg-type]
    manifest = Manifest(kind="indexes", id=f"index{name}", inputs={"models": model.id}, metrics=asdict(index.figures))
    index.save(workspace, manifest.path(INDEX_FILE))
    publish(workspace, manifest, [INDEX_FILE])


@contextmanager
def service(workspace: Workspace, keys: Keys | None = None, **settings: Any) -> Iterator[Service]:
    """Run a replica in this process, without Ray, until the block ends."""
    replica = open_service(workspace, ServeConfig(**settings), keys=keys)
    try:
        yield replica
    finally:
        replica.close()


def ms(text: str) -> int:
    """Return ms UTC of a moment in the format of answers, which ends in Z."""
    assert text.endswith("Z")
    return round(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000)


class Client:
    """Sends requests to the application of a service, without a network between them."""

    def __init__(
        self, replica: Service, *, address: str = "127.0.0.1", key: str | None = None, route_prefix: str = ""
    ) -> None:
        self.app = create_app(replica)
        self._transport = httpx.ASGITransport(
            self.app, raise_app_exceptions=False, client=(address, 50_000), root_path=route_prefix
        )
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Return the response to a GET."""
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """Return the response to a POST of JSON."""
        return self.request("POST", path, **({} if body is None else {"json": body}), **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Return the response to any request."""
        return asyncio.run(self.send(method, path, options))

    async def send(self, method: str, path: str, options: dict[str, Any]) -> httpx.Response:
        async with httpx.AsyncClient(
            transport=self._transport, base_url="http://localhost", headers=self._headers
        ) as connection:
            return await connection.request(method, path, **options)


def ask(app: Client, **body: Any) -> dict[str, Any]:
    """Return the answer to a request for recommendations, which must succeed; `body` adds to the history `SONGS`."""
    response = app.post("/v1/recommendations", {"history": SONGS, "at": AT, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ids(answer: dict[str, Any]) -> list[str]:
    """Return the ids of the songs of an answer, in its order."""
    return [song["song_id"] for song in answer["songs"]]
