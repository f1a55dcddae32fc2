"""Answer one request for recommendations, for a user or after given songs; the reasons for each song, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from rayrec.config import Settings
from rayrec.data.catalog import Catalog
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.moments import ASSUMED_GAP_MS, format_iso
from rayrec.errors import InputError, MismatchError
from rayrec.model.train_config import PLAY_COUNTS
from rayrec.recommend.base import BaseRecommender, HorizonName, weight_of_long
from rayrec.recommend.filters import (
    AnswerFilter,
    SongAttributes,
    SongMasks,
    intersect_songs,
    parse_day,
    without_heard,
)
from rayrec.storage.artifacts import Manifest, load_manifest
from rayrec.storage.releases import KIND as RELEASES
from rayrec.storage.workspace import Workspace

if TYPE_CHECKING:
    from rayrec.recommend.reranking import Path, PopularOrder, SelectedSongs

SHOWN_PLAYS = 5  # last plays that an answer shows


class RecommendConfig(Settings):
    """Which songs to recommend, and how many."""

    k: int = Field(20, ge=1, description="Number of recommendations")
    horizon: HorizonName | float = Field(
        "short",
        description="short: next songs; long: later songs; 0 to 1: a mix of both with this weight for long",
    )
    exclude_heard: bool = Field(True, description="Leave out the songs that the user has played")
    released_from: str | None = Field(None, description="Only songs released on that day, YYYY-MM-DD, or later")
    released_to: str | None = Field(None, description="Only songs released on that day, YYYY-MM-DD, or earlier")
    market: str | None = Field(None, description="Only songs that are available in this market")
    diversity: float = Field(
        0.0, ge=0, le=1, description="0: the best songs; towards 1: songs that differ more from each other"
    )
    explore: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the answer drawn at random from songs with fewer than 20 plays; the answer gives the "
        "probability of each of them",
    )
    explain: bool = Field(False, description="Give the reasons for each song")

    @field_validator("horizon", mode="before")
    @classmethod
    def _normalize_horizon(cls, value: object) -> object:
        weight = weight_of_long(value)
        return {0.0: "short", 1.0: "long"}.get(weight, weight)  # one spelling: equal requests share a cached answer

    @property
    def long_weight(self) -> float:
        """The weight of the long horizon, from 0 (only the short horizon) to 1 (only the long one)."""
        return weight_of_long(self.horizon)


@dataclass(frozen=True, kw_only=True)
class NamedSong:
    """A song by its id in the imported data, with title and artist."""

    song_id: str
    title: str | None
    artist: str | None

    @property
    def name(self) -> str:
        """Artist and title; the title alone if no artist is known; the id if there is no title."""
        if not self.title:
            return self.song_id
        return f"{self.artist} – {self.title}" if self.artist else self.title


@dataclass(frozen=True, kw_only=True)
class ScoredSong(NamedSong):
    """One song of an answer."""

    score: float
    reasons: list[str] | None = None  # why it was chosen, in words; None unless requested
    explored: bool | None = None  # True if it was drawn at random; None unless the request explores
    probability: float | None = None  # probability that an explored song is shown; None for other songs


@dataclass(frozen=True, kw_only=True)
class Answer:
    """At most k songs, best first, with the last plays and how they were found; HTTP answers have the same fields."""

    release: str | None  # id of the release that answered; None if the artifacts are not a release
    at: int  # ms UTC, the moment of the request
    source: Literal["taste", "popular"]  # popular: no play is known, so popular songs are recommended
    path: Path  # how songs were retrieved
    plays: int  # number of plays of known songs before the request
    songs: list[ScoredSong]  # (k,), descending by score
    last_plays: list[NamedSong]  # the last plays before the request, oldest first
    unknown_songs: int = 0  # number of given, excluded and allowed songs that are not in the catalog
    unknown_song_ids: list[str] = field(default_factory=list)  # their ids, each once

    @property
    def song_ids(self) -> list[str]:
        """(k,), the ids of the songs in the imported data."""
        return [song.song_id for song in self.songs]

    @property
    def titles(self) -> list[str]:
        """(k,), artist and title of each song; the id of a song without a title."""
        return [song.name for song in self.songs]

    @property
    def scores(self) -> list[float]:
        """(k,), descending."""
        return [song.score for song in self.songs]

    def to_mapping(self) -> dict[str, Any]:
        """Return the answer as a mapping for JSON, with the moment in ISO 8601."""
        return {**asdict(self), "at": format_iso(self.at)}


def answer(
    dataset: Dataset,
    recommender: BaseRecommender,
    config: RecommendConfig,
    *,
    parts: Mapping[str, str],
    at: int,
    user: str | None = None,
    songs: Sequence[str] | None = None,
    artists: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow: Sequence[str] | None = None,
    shown: int = SHOWN_PLAYS,
) -> Answer:
    """Recommend to a user, or to a new user who has just played `songs`, at time `at` (ms UTC), as the server does.

    `parts`, role -> artifact id, are the artifacts of the recommender. `songs` have no times: each counts as
    played three minutes before the next, the last one three minutes before `at`, as in `evaluate --prefixes`. If given,
    `artists` (names) and `allow` (song ids) limit the answer to their songs; the songs of `exclude` (ids) are left out.
    Ids that are not in the catalog are counted and ignored. `shown` is the number of last plays in the answer. If no
    play before `at` is known, for example for an unknown user, the answer holds recently popular songs.
    Raises `InputError` unless exactly one of `user` and `songs` is given, and for an unknown artist or market.
    """
    from rayrec.recommend.reranking import AnswerOptions, choose_for_users  # imports torch: only when needed

    if (user is None) == (songs is None):
        raise InputError("give exactly one of --user ID and --songs ID,ID")
    catalog = dataset.catalog()
    history = (
        histories_of_users(dataset, [user], at) if user is not None else history_of_songs(catalog, songs or (), at)
    )
    options = AnswerOptions(
        k=config.k,
        long_weight=config.long_weight,
        answer_filter=_answer_filter(catalog, history, config, artists, exclude, allow),
        diversity=config.diversity,
        explore=config.explore,
        explain=config.explain,
    )
    (selected,) = choose_for_users(
        recommender, history, at, [options], lambda: load_popular_order(dataset, recommender, parts)
    )
    last_plays = [NamedSong(**names) for names in catalog.names(history.last_songs(shown)[0])]
    given_ids = [*(songs or ()), *exclude, *(allow or ())]
    unknown_ids = [given_ids[index] for index in np.flatnonzero(catalog.find(given_ids) < 0).tolist()]
    return Answer(
        release=parts.get(RELEASES),
        at=at,
        source="popular" if selected.path == "popular" else "taste",
        path=selected.path,
        plays=history.num_plays,
        songs=_scored_songs(catalog, selected, last_plays[-1].title if last_plays else None, config.explain),
        last_plays=last_plays,
        unknown_songs=len(unknown_ids),
        unknown_song_ids=list(dict.fromkeys(unknown_ids)),
    )


def _answer_filter(
    catalog: Catalog,
    history: Histories,
    config: RecommendConfig,
    artists: Sequence[str],
    exclude: Sequence[str],
    allow: Sequence[str] | None,
) -> AnswerFilter:
    """Return the filter for the songs that the answer may hold."""
    attributes = SongAttributes(
        artists=tuple(artists),
        released_from=parse_day(config.released_from, "released_from"),
        released_to=parse_day(config.released_to, "released_to"),
        market=config.market,
    )
    matching_songs = SongMasks(catalog).fitting(attributes) if attributes else None
    allowed_songs = intersect_songs(None if allow is None else catalog.find(allow), matching_songs)
    excluded_rows = catalog.find(exclude)
    answer_filter = AnswerFilter(excluded=excluded_rows[excluded_rows >= 0], allowed=allowed_songs)
    return without_heard(history, [answer_filter])[0] if config.exclude_heard else answer_filter


def _scored_songs(catalog: Catalog, selected: SelectedSongs, last_title: str | None, explain: bool) -> list[ScoredSong]:
    """Return the chosen songs with their names and, if requested, reasons and probabilities."""
    scored_songs = [
        ScoredSong(**names, score=score)
        for names, score in zip(catalog.names(selected.songs), selected.scores.tolist(), strict=True)
    ]
    if explain:
        song_reasons = reasons_of(selected, last_title)
        scored_songs = [replace(song, reasons=texts) for song, texts in zip(scored_songs, song_reasons, strict=True)]
    if selected.probabilities is None:
        return scored_songs
    return [
        replace(song, explored=not np.isnan(probability), probability=None if np.isnan(probability) else probability)
        for song, probability in zip(scored_songs, selected.probabilities.tolist(), strict=True)
    ]


def require_fitting_parts(workspace: Workspace, dataset: Dataset, parts: Mapping[str, str]) -> Manifest | None:
    """Return the manifest of the rankers, None without rankers; only manifests are read.

    Raises `MismatchError` for a model of another data set and for rankers of another model.
    """
    model_id = parts["models"]
    dataset_id = load_manifest(workspace, "models", model_id).inputs.get("dataset")
    if dataset_id is None or not dataset.descends_from(dataset_id):
        raise MismatchError(
            f"model {model_id} was trained on data set {dataset_id}, but the workspace holds {dataset.manifest.id}; "
            "run `rayrec embed`, `rayrec train`, `rayrec taste`, `rayrec index` and `rayrec release create` first"
        )
    if "rankers" not in parts:
        return None
    rankers = load_manifest(workspace, "rankers", parts["rankers"])
    if rankers.inputs["models"] != model_id:
        raise MismatchError(
            f"rankers {rankers.id} were trained with model {rankers.inputs['models']}, not {model_id}; "
            f"run `rayrec rank --model {model_id}` first"
        )
    return rankers


def load_recommender(workspace: Workspace, dataset: Dataset, parts: Mapping[str, str]) -> BaseRecommender:
    """Load the recommender of the artifacts `parts`, role -> id, such as `releases.default_parts` returns.

    The role `models` is required. Songs of `added_songs` are recommended in addition to those of the model. With
    `retrieval` and `rankers` the recommender retrieves and ranks candidates. Without them it returns the songs nearest
    to the taste vector, and searches them with `indexes` if given. Raises `MismatchError` for a model of a data set
    that `dataset` does not descend from, since song rows may differ, and for an index, rankers or added songs of
    another model.
    """
    rankers = require_fitting_parts(workspace, dataset, parts)
    from rayrec.recommend.taste_recommender import TasteRecommender  # imports torch: only when needed
    from rayrec.recommend.two_step import load_two_step

    network = TasteRecommender.load(workspace, parts["models"], parts.get("indexes"), parts.get("added_songs"))
    if rankers is None:
        return network
    retrieval = load_manifest(workspace, "retrieval", parts["retrieval"])
    return load_two_step(
        workspace, network, retrieval.folder, rankers.folder, real_times=dataset.manifest.times == "real"
    )


def load_popular_order(dataset: Dataset, recommender: BaseRecommender, parts: Mapping[str, str]) -> PopularOrder:
    """Return the order of songs for users without known plays; `parts`, role -> id, are the recommender's artifacts."""
    num_songs = dataset.num_songs
    plays = model_play_counts(dataset.workspace, parts["models"])
    return popular_order(
        dataset.workspace, parts, np.pad(plays, (0, num_songs - len(plays))), known_songs(recommender, num_songs)
    )


def popular_order(
    workspace: Workspace, parts: Mapping[str, str], plays: np.ndarray, is_known: np.ndarray
) -> PopularOrder:
    """Return the order of songs for users without known plays: by recent plays.

    `is_known`, bool (N,), is True for songs with a vector; other songs are left out. The recent plays come from the
    retrieval in `parts`; without a retrieval all `plays`, int64 (N,), count.
    """
    from rayrec.recommend.reranking import PopularOrder  # imports torch: only when needed
    from rayrec.recommend.stored_retrieval import read_popularity

    if "retrieval" not in parts:
        return PopularOrder.of(plays, is_known)
    folder = load_manifest(workspace, "retrieval", parts["retrieval"]).folder
    recent_plays, artist_of_song = read_popularity(workspace, folder)
    return PopularOrder.of(plays, is_known, recent_plays=recent_plays, artist_of_song=artist_of_song)


def known_songs(recommender: BaseRecommender, num_songs: int) -> np.ndarray:
    """bool (num_songs,): True for songs with a vector in the network; False for songs that were imported after it."""
    from rayrec.recommend.reranking import network_of

    network = network_of(recommender)  # a retrieval may hold songs that were imported after it
    is_known: np.ndarray = np.arange(num_songs) < network.num_songs
    is_known[network.rows_without_vector[network.rows_without_vector < num_songs]] = False
    return is_known


def model_play_counts(workspace: Workspace, model_id: str) -> np.ndarray:
    """int64 (N,): plays of each song in the fit range of a model, N songs of the data set that it was trained on."""
    return np.asarray(workspace.read_array(load_manifest(workspace, "models", model_id).path(PLAY_COUNTS)))


def histories_of_users(dataset: Dataset, user_ids: Sequence[str], at: int) -> Histories:
    """Return the plays of each user before `at` (ms UTC), in the order of `user_ids`; unknown users have no plays."""
    histories = dataset.histories(user_ids)
    return histories.keep(histories.played_at < at)


def history_of_songs(catalog: Catalog, song_ids: Sequence[str], at: int) -> Histories:
    """Return a history of the given songs, three minutes apart, the last one three minutes before `at` (ms UTC).

    Songs that are not in the catalog are left out; the times of the others do not change.
    """
    rows = catalog.find(song_ids)
    played_at = at - ASSUMED_GAP_MS * np.arange(len(rows), 0, -1, dtype=np.int64)
    return Histories.from_lists([rows[rows >= 0]], [played_at[rows >= 0]])  # type: ignore[list-item]


MOST_REASONS = 3  # maximum reasons per song
POPULAR_REASON = "it is among the most played songs"  # for users without known plays
NEAR_RANK = 0.1  # lowest rank feature, 1 / (1 + rank), of a song among the first ten


def reasons(features: Mapping[str, float], last_title: str | None) -> list[str]:
    """Return at most three reasons for one song, the strongest kind first.

    `features` maps names to values; features that the data does not have, such as those of artists, may be missing.
    `last_title` is the title of the song played last, None if it is not known.
    """

    def value(name: str) -> float:
        return float(features.get(name, 0.0))

    last_song = last_title or "your last play"
    texts: list[str] = []
    if value("user_liked"):
        texts.append("you liked it")
    if value("user_rules_score") > 0:
        texts.append(f"you played it after {last_song} before")
    if value("user_plays") > 0:
        texts.append(f"you played it {_count_text(value('user_plays'))}, {_last_played_text(features)}")
    if value("album_of_last_song"):
        texts.append("same album as your last play")
    elif value("artist_of_last_song"):
        texts.append("same artist as your last play")
    elif value("artist_user_plays") > 0:
        texts.append(f"you played its artist {_count_text(value('artist_user_plays'))}")
    if value("next_rules_rank") >= NEAR_RANK:
        texts.append(f"it was played right after {last_song} {_count_text(value('next_rules_score'))}")
    elif value("rules_rank") >= NEAR_RANK:
        texts.append(f"one of the songs played most often soon after {last_song}")
    elif value("recent_rules_rank") >= NEAR_RANK:
        texts.append("one of the songs played most often soon after your last songs")
    if value("sessions_rank") >= NEAR_RANK:
        texts.append("users with similar sessions played it")
    elif value("history_sessions_rank") >= NEAR_RANK:
        texts.append("users with similar taste play it")
    if value("taste_short_rank") >= NEAR_RANK:
        texts.append("similar to your recent plays")
    if value("taste_long_rank") >= NEAR_RANK:
        texts.append("similar to your plays over time")
    if value("popular_score") > 0:
        texts.append("it is popular this week")
    return texts[:MOST_REASONS] or ["similar to your plays"]


def reasons_of(selected: SelectedSongs, last_title: str | None) -> list[list[str]]:
    """Return the reasons for each song of an answer with features; `last_title` is as in `reasons`."""
    if selected.path == "popular":
        return [[POPULAR_REASON] for _ in selected.songs]
    return [reasons(features, last_title) for features in selected.features]


def _count_text(count: float) -> str:
    return "once" if count == 1 else f"{count:.0f} times"


def _last_played_text(features: Mapping[str, float]) -> str:
    """Return when the song was played last: in hours or days if times are known, otherwise in plays."""
    hours, plays = float(features.get("user_hours_since", 0.0)), float(features.get("user_plays_since", 0.0))
    if hours <= 0:
        return "last just now" if plays < 1 else f"last {plays + 1:.0f} plays ago"
    if hours < 1:
        return "last within the hour"
    if hours < 48:
        return f"last {hours:.0f} {'hour' if round(hours) == 1 else 'hours'} ago"
    return f"last {hours / 24:.0f} days ago"
