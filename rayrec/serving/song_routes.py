"""Songs by name, songs like a song, and songs on a map."""

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from rayrec.serving.live import LiveRelease
from rayrec.serving.problems import documented, problem
from rayrec.serving.schemas import RecommendedSong, Request, SongId, as_json
from rayrec.serving.serve_config import MAX_ID, MAX_K
from rayrec.serving.service import Service

MAX_QUERY = 200  # characters
MAX_FOUND = 100  # songs

Words = Annotated[str, Query(min_length=1, max_length=MAX_QUERY, description="Words of a title or an artist.")]
Limit = Annotated[int, Query(ge=1, le=MAX_FOUND, description="How many songs.")]
Song = Annotated[str, Path(min_length=1, max_length=MAX_ID, description="Id of a song.")]
Count = Annotated[int, Query(ge=1, le=MAX_K, description="How many songs.")]


class FoundSong(BaseModel):
    """A song of the catalog."""

    song: str
    title: str | None
    artist: str | None


class FoundSongs(BaseModel):
    """Songs that hold all words of a query: the same first, then those that begin so, then the most played."""

    release: str
    count: int = Field(description="How many there are, of which these are the first.")
    songs: list[FoundSong]


class SimilarSongs(BaseModel):
    """Songs like a song, the nearest first."""

    release: str
    song: str
    path: str
    songs: list[RecommendedSong] = Field(description="With the cosine of the songs' vectors as score.")


class MapRequest(Request):
    """Songs to place."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"songs": ["song-12", "song-7", "song-3"]}]})

    songs: list[SongId] = Field(min_length=1, max_length=2 * MAX_K)


class Point(BaseModel):
    """A song's place, both numbers within -1 and 1."""

    song: str
    x: float
    y: float


class SongMap(BaseModel):
    """Songs on the plane in which their vectors differ most; songs like each other lie together."""

    release: str
    points: list[Point]
    unknown_songs: int = Field(description="Songs that the release does not know, or has no vector of.")


def songs(service: Service) -> APIRouter:
    """What can be asked about songs."""
    router = APIRouter(prefix="/v1", tags=["songs"], responses=documented(401, 403, 422, 500, 503))

    @router.get("/songs", response_model=FoundSongs)
    async def find(query: Words, limit: Limit = 20) -> Response:
        """Songs by words of their title or artist."""
        live = service.live
        rows, count = await run_in_threadpool(live.songs.search.find, query, limit)
        found = [FoundSong(song=song, title=title, artist=artist) for song, title, artist in live.songs.describe(rows)]
        return as_json(FoundSongs(release=live.id, count=count, songs=found))

    @router.get("/songs/{song}/similar", response_model=SimilarSongs, responses=documented(404))
    async def similar(song: Song, k: Count = 20) -> Response:
        """Songs like a song."""
        live = service.live
        row = live.songs.rows.get(song, -1)
        if row < 0:
            return problem(404, f"song {song!r} is not in the catalog; find ids with /v1/songs?query=")
        if not _placed(live, np.array([row])).any():
            return as_json(SimilarSongs(release=live.id, song=song, path="exact", songs=[]))
        chosen = await live.engine.similar(row, k)
        service.metrics.path(chosen.path)
        named = zip(live.songs.describe(chosen.songs), chosen.scores.tolist(), strict=True)
        found = [
            RecommendedSong(song=i, title=title, artist=artist, score=score) for (i, title, artist), score in named
        ]
        return as_json(SimilarSongs(release=live.id, song=song, path=chosen.path, songs=found))

    @router.post("/map", response_model=SongMap, responses=documented(400, 413))
    async def place(request: MapRequest) -> Response:
        """Songs on a map."""
        live = service.live
        ids = list(dict.fromkeys(request.songs))
        rows = live.songs.find(ids)
        placed = _placed(live, rows)
        points = await live.engine.layout(rows[placed])
        names = (song for song, there in zip(ids, placed.tolist(), strict=True) if there)
        told = [Point(song=song, x=x, y=y) for song, (x, y) in zip(names, points.tolist(), strict=True)]
        return as_json(SongMap(release=live.id, points=told, unknown_songs=int((~placed).sum())))

    return router


def _placed(live: LiveRelease, rows: np.ndarray) -> np.ndarray:
    """bool (n,): which of the song rows, int (n,), the network has a vector of; row -1 is none."""
    placed: np.ndarray = (rows >= 0) & live.songs.known[np.maximum(rows, 0)]
    return placed
