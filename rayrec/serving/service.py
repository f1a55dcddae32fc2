"""What the routes answer with: the live release, its engine, keys, limits and metrics of one replica."""

from collections.abc import Sequence

import numpy as np

from rayrec.model.inference import States
from rayrec.recommend.base import Horizon
from rayrec.recommend.choosing import Chosen, Wish, choose_popular
from rayrec.recommend.explain import Explanation
from rayrec.serving.auth import Keys
from rayrec.serving.catalog import Songs
from rayrec.serving.holder import ReleaseHolder
from rayrec.serving.live import LiveRelease
from rayrec.serving.prometheus import Metrics
from rayrec.serving.requests import Asked, histories_of, read_history, read_stored, read_wish
from rayrec.serving.schemas import (
    Asker,
    Reason,
    Recommendations,
    RecommendationsRequest,
    RecommendedSong,
    Taste,
    Tastes,
)
from rayrec.serving.serve_config import ServeConfig
from rayrec.serving.user_states import UserStates

TOGETHER = 32  # users of a batch that are answered at once: others get their turn in between


class Service:
    """One replica's work. Routes take `live` once and hand it to every call that answers their request."""

    def __init__(
        self,
        holder: ReleaseHolder[LiveRelease],
        config: ServeConfig,
        keys: Keys,
        metrics: Metrics,
        states: UserStates,
    ) -> None:
        self.holder, self.config, self.keys, self.metrics, self.states = holder, config, keys, metrics, states

    @property
    def live(self) -> LiveRelease:
        """The release to answer with. Raises `NotReadyError` where none is loaded."""
        return self.holder.live

    def close(self) -> None:
        """Watch no more, take the report of this replica back, and close the store of users."""
        self.holder.stop()
        self.states.close()

    async def recommend(self, live: LiveRelease, requests: Sequence[RecommendationsRequest]) -> list[Recommendations]:
        """The answers to requests."""
        self.metrics.batch(len(requests))
        answers: list[Recommendations] = []
        for begin in range(0, len(requests), TOGETHER):
            answers += await self._recommend(live, requests[begin : begin + TOGETHER])
        return answers

    async def tastes(self, live: LiveRelease, askers: Sequence[Asker]) -> Tastes:
        """The taste vectors of histories."""
        self.metrics.batch(len(askers))
        told: list[Taste] = []
        for begin in range(0, len(askers), TOGETHER):
            told += await self._tastes(live, askers[begin : begin + TOGETHER])
        return Tastes(release=live.id, model=live.model_id, dim=len(told[0].short), tastes=told)

    async def _recommend(self, live: LiveRelease, requests: Sequence[RecommendationsRequest]) -> list[Recommendations]:
        names = sorted({request.user_id for request in requests} - {""})
        stored = dict(zip(names, await self.states.read(live, names), strict=True)) if names else {}
        with self.metrics.stage("read"):
            asked = [
                read_stored(stored[request.user_id], request.at)
                if request.user_id
                else read_history(request.history, request.at, live.songs)
                for request in requests
            ]
            wishes = [read_wish(request, one, live.songs) for request, one in zip(requests, asked, strict=True)]
        chosen = await self.choose(live, asked, [wish for wish, _ in wishes])
        with self.metrics.stage("write"):
            answers = [
                self.told(live, one, found, unknown=one.unknown + unknown)
                for one, found, (_, unknown) in zip(asked, chosen, wishes, strict=True)
            ]
        for request, answer, one, found in zip(requests, answers, asked, chosen, strict=True):
            if request.explain and answer.source == "taste":
                horizon: Horizon = "short" if request.long_weight < 0.5 else "long"
                told = await live.engine.explain(histories_of([one]), one.at, found.songs, horizon)
                add_reasons(answer, told, one.songs, one.played_at, live.songs)
        return answers

    async def choose(self, live: LiveRelease, asked: Sequence[Asked], wishes: Sequence[Wish]) -> list[Chosen]:
        """The songs of each: by taste, or the popular ones where no play is known."""
        played = [row for row, one in enumerate(asked) if len(one.songs)]
        stored = [row for row in played if asked[row].states is not None]
        told = [row for row in played if asked[row].states is None]
        chosen: dict[int, Chosen] = {}
        for rows in (stored, told):
            if rows:
                some = [asked[row] for row in rows]
                answers = await _answer(live, some, [wishes[row] for row in rows])
                chosen |= dict(zip(rows, answers, strict=True))
        # Popular songs only for those who need them: the limits of one answer are a pass over all songs.
        return [
            chosen[row] if row in chosen else choose_popular(live.songs.plays, live.songs.by_plays, wish)
            for row, wish in enumerate(wishes)
        ]

    def told(self, live: LiveRelease, asked: Asked, chosen: Chosen, *, unknown: int) -> Recommendations:
        """An answer in the words of the outside world."""
        self.metrics.path(chosen.path)
        names = live.songs.describe(chosen.songs)
        songs = [
            RecommendedSong(song=song, title=title, artist=artist, score=score)
            for (song, title, artist), score in zip(names, chosen.scores.tolist(), strict=True)
        ]
        return Recommendations.model_construct(
            release=live.id,
            at=asked.at,
            source="popular" if chosen.path == "popular" else "taste",
            path=chosen.path,
            plays=len(asked.songs),
            unknown_songs=unknown,
            songs=songs,
        )

    async def _tastes(self, live: LiveRelease, askers: Sequence[Asker]) -> list[Taste]:
        with self.metrics.stage("read"):
            asked = [read_history(asker.history, asker.at, live.songs) for asker in askers]
        at = np.array([one.at for one in asked], dtype=np.int64)
        states = await live.engine.states(histories_of(asked))
        vectors = await live.engine.vectors(states, at, ("short", "long"))
        return [
            Taste.model_construct(
                at=one.at, plays=len(one.songs), unknown_songs=one.unknown, short=short.tolist(), long=long.tolist()
            )
            for one, short, long in zip(asked, vectors["short"], vectors["long"], strict=True)
        ]


async def _answer(live: LiveRelease, asked: Sequence[Asked], wishes: Sequence[Wish]) -> list[Chosen]:
    """The songs of users who have played: all of them with states, or all without."""
    at = np.array([one.at for one in asked], dtype=np.int64)
    states = [one.states for one in asked if one.states is not None]
    if not states:
        return await live.engine.answer(histories_of(asked), at, wishes)
    joined = States(
        hidden=np.concatenate([one.hidden for one in states]),
        last_played_at=np.concatenate([one.last_played_at for one in states]),
    )
    return await live.engine.answer_states(joined, histories_of(asked), at, wishes)


def add_reasons(
    answer: Recommendations, told: Explanation, songs: np.ndarray, played_at: np.ndarray, catalog: Songs
) -> None:
    """Say in an answer which plays of a history, song rows int32 (P,) at int64 (P,) ms UTC, it owes to."""
    order = told.plays[np.argsort(-told.moved, kind="stable")]
    moved = dict(zip(told.plays.tolist(), told.moved.tolist(), strict=True))
    answer.explanation = [
        Reason(song=song, title=title, artist=artist, played_at=int(played_at[play]), moved=moved[play])
        for play, (song, title, artist) in zip(order.tolist(), catalog.describe(songs[order]), strict=True)
    ]
    speaks = told.because >= 0
    names = catalog.catalog.song_ids(songs[told.because[speaks]])
    for place, name in zip(np.flatnonzero(speaks).tolist(), names, strict=True):
        answer.songs[place].because = name
