"""Answer one request for recommendations: whose plays, at which moment, in whose words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
from pydantic import Field

from rayrec.config import Settings
from rayrec.data.catalog import Catalog
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.moments import iso_moment
from rayrec.errors import InputError, MismatchError
from rayrec.recommend.base import NO_SONG, BaseRecommender, Horizon
from rayrec.recommend.filters import Limits, SongMasks, Wanted, parse_day, without_heard
from rayrec.recommend.reasons import LAST_PLAYS, reasons
from rayrec.storage.artifacts import load
from rayrec.storage.workspace import Workspace

ASSUMED_GAP_MS = 3 * 60 * 1000  # between songs that are given without times: about the length of one


class RecommendConfig(Settings):
    """What to recommend."""

    k: int = Field(20, ge=1, description="Number of recommendations")
    horizon: Horizon = Field("short", description="short: the next songs; long: songs for later")
    exclude_heard: bool = Field(True, description="Leave out the songs that the user has played")
    released_from: str | None = Field(None, description="Only songs released on that day, YYYY-MM-DD, or later")
    released_to: str | None = Field(None, description="Only songs released on that day, YYYY-MM-DD, or earlier")
    market: str | None = Field(None, description="Only songs that are available in this market")
    diversity: float = Field(0.0, ge=0, le=1, description="0: the best songs; up to 1: songs less like each other")
    explore: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the songs that have fewer than 20 plays and are drawn by chance, for each of which the "
        "answer holds its probability",
    )
    explain: bool = Field(False, description="Give the reasons for each song")


@dataclass(frozen=True, kw_only=True)
class NamedSong:
    """A song as the outside world knows it."""

    song_id: str
    title: str | None
    artist: str | None

    @property
    def name(self) -> str:
        """Artist and title, the title alone where no artist is known, the id where there is no title."""
        if not self.title:
            return self.song_id
        return f"{self.artist} – {self.title}" if self.artist else self.title


@dataclass(frozen=True, kw_only=True)
class ScoredSong(NamedSong):
    """One song of an answer."""

    score: float
    reasons: list[str] | None = None  # why it was chosen, in words, where they were asked for
    explored: bool = False
    probability: float | None = None  # with which an explored song is shown


@dataclass(frozen=True, kw_only=True)
class Answer:
    """k songs, best first, and what they were chosen from."""

    songs: list[ScoredSong]  # (k,), descending by score
    at: int  # ms UTC, the moment of the request
    last_plays: list[NamedSong]  # the last plays before it, the latest last
    plays: int  # plays before the request, all of them

    @property
    def song_ids(self) -> list[str]:
        """(k,), as the outside world knows the songs."""
        return [song.song_id for song in self.songs]

    @property
    def titles(self) -> list[str]:
        """(k,), artist and title, the id where there is none."""
        return [song.name for song in self.songs]

    @property
    def scores(self) -> list[float]:
        """(k,), descending."""
        return [song.score for song in self.songs]

    def to_mapping(self) -> dict[str, Any]:
        """As JSON holds it, with the moment in ISO 8601."""
        return {**asdict(self), "at": iso_moment(self.at)}


def answer(
    dataset: Dataset,
    recommender: BaseRecommender,
    config: RecommendConfig,
    *,
    at: int,
    user: str | None = None,
    songs: list[str] | None = None,
    artists: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow: Sequence[str] | None = None,
    shown: int = LAST_PLAYS,
) -> Answer:
    """Recommend to a user of the data set, or to whoever has just played `songs`, at time `at` (ms UTC).

    Songs come without times: the last is taken as played at `at`, each earlier one three minutes
    before the next. `artists`, names, and `allow`, song ids, keep to their songs; those of `exclude` are left out.
    Raises `InputError` unless exactly one of user and songs is given, for an unknown user, song, artist or market,
    and for a user without plays before `at`.
    """
    if (user is None) == (songs is None):
        raise InputError("recommendations are for a user or for songs; give --user ID or --songs ID,ID, one of them")
    catalog = dataset.catalog()
    history = history_of_songs(catalog, songs or [], at) if user is None else histories_of_users(dataset, [user], at)
    limits = _limits(catalog, history, config, artists, exclude, allow)
    rows, scores, probabilities = _best(recommender, history, at, config, limits)
    last_plays = [NamedSong(**names) for names in catalog.names(history.last_songs(shown)[0])]
    reasons_of_songs: list[list[str] | None] = [None] * len(rows)
    if config.explain:
        features = recommender.explain(history, at, rows, long_weight=float(config.horizon == "long"))
        reasons_of_songs = [reasons(each, last_plays[-1].title) for each in features]
    chosen = [
        ScoredSong(
            **names,
            score=round(float(score), 6),
            reasons=words,
            explored=not np.isnan(probability),
            probability=None if np.isnan(probability) else round(float(probability), 6),
        )
        for names, score, words, probability in zip(
            catalog.names(rows), scores, reasons_of_songs, probabilities, strict=True
        )
    ]
    return Answer(songs=chosen, at=at, last_plays=last_plays, plays=history.num_plays)


def _limits(
    catalog: Catalog,
    history: Histories,
    config: RecommendConfig,
    artists: Sequence[str],
    exclude: Sequence[str],
    allow: Sequence[str] | None,
) -> Limits:
    """The songs that may come."""
    attributes = Wanted(
        artists=tuple(artists),
        released_from=parse_day(config.released_from, "released_from"),
        released_to=parse_day(config.released_to, "released_to"),
        market=config.market,
    )
    allowed = SongMasks(catalog).mask(attributes) if attributes else None
    if allow is not None:
        listed = np.isin(np.arange(len(catalog)), catalog.rows(list(allow)))
        allowed = listed if allowed is None else listed & allowed
    limits = Limits(banned=catalog.rows(list(exclude)), allowed=allowed)
    return without_heard(history, [limits])[0] if config.exclude_heard else limits


def _best(
    recommender: BaseRecommender, history: Histories, at: int, config: RecommendConfig, limits: Limits
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Song rows int32, scores float32 and probabilities of explored songs, float64, at most k each.

    With diversity in the order of choice.
    """
    from rayrec.recommend.exploring import POOL, with_explored  # brings torch, as below
    from rayrec.recommend.selection import diversify, network_of, pool_size

    count = pool_size(config.k) if config.diversity else config.k
    k = count + (POOL if config.explore else 0)
    ranking = recommender.rank(history, at, k, horizon=config.horizon, limits=[limits])
    real = ranking.songs[0] != NO_SONG
    rows, scores = ranking.songs[0][real], ranking.scores[0][real]
    taken = np.arange(min(config.k, len(rows)))
    if config.diversity:
        taken = diversify(network_of(recommender).song_vectors[rows[:count]], config.k, config.diversity)
    if not config.explore:
        return rows[taken], scores[taken], np.full(len(taken), np.nan)
    explored = with_explored(recommender, history, at, (rows, scores), taken, config.explore)
    return explored.songs, explored.scores, explored.probabilities


def load_recommender(workspace: Workspace, dataset: Dataset, parts: Mapping[str, str]) -> BaseRecommender:
    """What answers with some parts, role -> id, as `releases.default_parts` gives them.

    `models` is needed. `added_songs` are recommended beside those of the model. With `retrieval` and `rankers`
    candidates are retrieved and ranked, without them the songs nearest to the taste vector come first, searched through
    `indexes` where that is given. Raises `MismatchError` for a model of a data set that this one does not descend from,
    whose song rows may differ, and for an index, rankers or added songs of another model.
    """
    model_id = parts["models"]
    manifest = load(workspace, "models", model_id)
    made_of = manifest.inputs.get("dataset")
    if made_of is None or not dataset.descends_from(made_of):
        raise MismatchError(
            f"model {model_id} was made of data set {made_of}, the workspace holds data set {dataset.manifest.id}; "
            "run `rayrec embed`, `rayrec train`, `rayrec taste`, `rayrec index` and `rayrec release create` first"
        )
    from rayrec.recommend.taste_recommender import TasteRecommender  # brings torch: only once it is needed
    from rayrec.recommend.two_step import load_two_step

    network = TasteRecommender.load(workspace, model_id, parts.get("indexes"), parts.get("added_songs"))
    if "rankers" not in parts:
        return network
    rankers = load(workspace, "rankers", parts["rankers"])
    if rankers.inputs["models"] != model_id:
        raise MismatchError(
            f"rankers {rankers.id} were learned with model {rankers.inputs['models']}, not with {model_id}; "
            f"run `rayrec rank --model {model_id}` first"
        )
    retrieval = load(workspace, "retrieval", parts["retrieval"])
    return load_two_step(workspace, network, retrieval.folder, rankers, real_times=dataset.manifest.times == "real")


def histories_of_users(dataset: Dataset, user_ids: Sequence[str], at: int) -> Histories:
    """The plays of users before `at` (ms UTC), in their order. Raises `InputError` for a user without any."""
    histories = dataset.histories(user_ids)
    known = histories.keep(histories.played_at < at)
    for row in np.flatnonzero(known.lengths == 0).tolist():
        first = datetime.fromtimestamp(int(histories.played_at[histories.offsets[row]]) / 1000, timezone.utc)
        raise InputError(
            f"user {user_ids[row]!r} has no plays before the time of the request; the first is at {first.isoformat()}"
        )
    return known


def history_of_songs(catalog: Catalog, song_ids: list[str], at: int) -> Histories:
    """Songs as if just played, three minutes apart, the last at `at` (ms UTC). Raises `InputError` for unknown ones."""
    if not song_ids:
        raise InputError("no songs were given; give at least one song id, such as --songs 12,7")
    rows = catalog.rows(song_ids)
    played_at = at - ASSUMED_GAP_MS * np.arange(len(rows) - 1, -1, -1, dtype=np.int64)
    return Histories.from_lists([rows], [played_at])  # type: ignore[list-item]
