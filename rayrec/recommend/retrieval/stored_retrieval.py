"""What retrievers look up, in one object that is fitted by buckets, merged, saved and memory-mapped; and its
counts of one range of songs as bytes, which a bucket leaves for the merge of that range.

N songs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from rayrec.data.histories import Histories
from rayrec.data.split import FitRange
from rayrec.recommend.retrieval import play_counts, session_postings
from rayrec.recommend.retrieval.play_counts import PlayCounts, RuleCounts
from rayrec.recommend.retrieval.session_postings import NO_GROUP, SessionPostings, SongGroups
from rayrec.storage.workspace import Workspace

PLAYS_PER_RANGE = 20_000_000  # of one range of songs, so that the counts of a range fit into a task's memory
POPULAR = 500  # songs kept in the list of those popular of late
POPULAR_DAYS = 7  # plays of the last days that make a song popular of late
SETTINGS_FILE = "retrieval.json"  # written last
SELECTION_RETRIEVAL = "selection"  # folder in a retrieval artifact: the same without the validation range
WHOLE = ("plays.plays", "plays.first_days")  # of every song in the first range, and there alone
SKIPS = "plays.skips"  # the same, where the data says what was skipped
BY_SONG = ("sessions.song_offsets", "rules.offsets")  # int64 (N + 1,), flat outside the range


@dataclass(frozen=True, kw_only=True)
class RetrievalCounts:
    """What histories say, before anything is cut: parts of it merge exactly, in any order."""

    sessions: SessionPostings
    rules: RuleCounts
    plays: PlayCounts

    @classmethod
    def fit(
        cls,
        histories: Histories,
        *,
        num_songs: int,
        allowed: FitRange | None = None,
        newest: int = session_postings.NEWEST,
    ) -> RetrievalCounts:
        """From histories. Raises `LeakError` for a play that `allowed` forbids."""
        (allowed or FitRange()).require(histories)
        return cls(
            sessions=SessionPostings.fit(histories, num_songs=num_songs, newest=newest),
            rules=RuleCounts.fit(histories, num_songs=num_songs),
            plays=PlayCounts.fit(histories, num_songs=num_songs),
        )

    @classmethod
    def merge(cls, parts: Sequence[RetrievalCounts]) -> RetrievalCounts:
        """The same as `fit` on the histories of all parts together."""
        return cls(
            sessions=SessionPostings.merge([part.sessions for part in parts]),
            rules=RuleCounts.merge([part.rules for part in parts]),
            plays=PlayCounts.merge([part.plays for part in parts]),
        )

    def of_songs(self, first: int, last: int) -> RetrievalCounts:
        """Sessions and rules of the songs from row `first` up to `last`; the play counts whole in the first range.

        Of a range beyond the songs that were counted there is nothing.
        """
        none = PlayCounts.fit(Histories.from_lists([], []), num_songs=self.plays.num_songs)
        return RetrievalCounts(
            sessions=self.sessions.of_songs(first, last),
            rules=self.rules.of_songs(first, last),
            plays=self.plays if first == 0 else none,
        )


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Everything that retrievers look up beside the index: flat arrays, of which a query reads a few entries."""

    sessions: SessionPostings
    rules: RuleCounts  # the strongest of each song
    plays: PlayCounts
    recent_plays: np.ndarray  # int64 (N,), plays of the last 28 days
    popular: np.ndarray  # int32 (at most 500,), songs by plays in the last 7 days, then in all
    artists: SongGroups
    albums: SongGroups
    skip_share: float = 0.0  # of all plays
    has_likes: bool = False  # whether the data has any

    @property
    def num_songs(self) -> int:
        """N."""
        return self.plays.num_songs

    @property
    def counts(self) -> RetrievalCounts:
        """What was counted, to add later plays to it: sessions and plays exactly, of the rules the strongest."""
        return RetrievalCounts(sessions=self.sessions, rules=self.rules, plays=self.plays)

    @classmethod
    def build(
        cls,
        counts: RetrievalCounts,
        *,
        artist_of_song: np.ndarray | None = None,
        album_of_song: np.ndarray | None = None,
        rules_per_song: int = play_counts.KEPT,
        has_likes: bool = False,
    ) -> Retrieval:
        """From merged counts, and the artist and the album of each song, int (N,), -1 where it is not known."""
        plays = counts.plays
        unknown = np.full(plays.num_songs, NO_GROUP, dtype=np.int32)
        order = np.lexsort((np.arange(plays.num_songs), -plays.plays, -plays.recent(POPULAR_DAYS)))
        return cls(
            sessions=counts.sessions,
            rules=counts.rules.strongest(rules_per_song),
            plays=plays,
            recent_plays=plays.recent(play_counts.RECENT_DAYS),
            popular=order[plays.plays[order] > 0][:POPULAR].astype(np.int32),
            artists=SongGroups.build(unknown if artist_of_song is None else artist_of_song, plays.plays),
            albums=SongGroups.build(unknown if album_of_song is None else album_of_song, plays.plays),
            skip_share=0.0 if plays.skips is None else float(plays.skips.sum() / max(1, plays.plays.sum())),
            has_likes=has_likes,
        )

    @classmethod
    def fit(
        cls,
        batches: Iterable[Histories],
        *,
        num_songs: int,
        allowed: FitRange | None = None,
        newest: int = session_postings.NEWEST,
        artist_of_song: np.ndarray | None = None,
        album_of_song: np.ndarray | None = None,
    ) -> Retrieval:
        """In this process, batch by batch. Raises `LeakError` for a play that `allowed` forbids."""
        nothing = Histories.from_lists([], [])
        counts, has_likes = RetrievalCounts.fit(nothing, num_songs=num_songs, newest=newest), False
        for histories in batches:
            has_likes |= histories.likes is not None
            part = RetrievalCounts.fit(histories, num_songs=num_songs, allowed=allowed, newest=newest)
            counts = RetrievalCounts.merge([counts, part])
        return cls.build(counts, artist_of_song=artist_of_song, album_of_song=album_of_song, has_likes=has_likes)

    def with_added(self, rows: np.ndarray, artist_rows: np.ndarray, album_rows: np.ndarray) -> Retrieval:
        """With the artists and albums of songs that came later, as `SongGroups.with_added` takes them."""
        artists, albums = self.artists.with_added(rows, artist_rows), self.albums.with_added(rows, album_rows)
        return replace(self, artists=artists, albums=albums)

    def save(self, workspace: Workspace, folder: str) -> list[str]:
        """Write .npy files and a JSON file of settings into a folder; the names of the files."""
        arrays = {name: value for name, value in _flat(self).items() if isinstance(value, np.ndarray)}
        for name, array in arrays.items():
            workspace.write_array(f"{folder}/{name}.npy", array)
        skips = {"skip_share": self.skip_share} if SKIPS in arrays else {}
        likes = {"has_likes": True} if self.has_likes else {}
        workspace.write_json(f"{folder}/{SETTINGS_FILE}", {"newest": self.sessions.newest, **skips, **likes})
        return [SETTINGS_FILE, *(f"{name}.npy" for name in arrays)]

    @classmethod
    def load(cls, workspace: Workspace, folder: str) -> Retrieval:
        """What `save` wrote; memory-mapped on a local disk."""
        settings: dict[str, Any] = workspace.read_json(f"{folder}/{SETTINGS_FILE}")

        def read(part: type, prefix: str, **others: Any) -> Any:
            names = [field.name for field in fields(part) if field.name not in others]
            return part(**others, **{name: workspace.read_array(f"{folder}/{prefix}.{name}.npy") for name in names})

        return cls(
            sessions=read(SessionPostings, "sessions", newest=int(settings["newest"])),
            rules=read(RuleCounts, "rules"),
            plays=read(PlayCounts, "plays", **({} if "skip_share" in settings else {"skips": None})),
            recent_plays=workspace.read_array(f"{folder}/recent_plays.npy"),
            popular=workspace.read_array(f"{folder}/popular.npy"),
            artists=read(SongGroups, "artists"),
            albums=read(SongGroups, "albums"),
            skip_share=float(settings.get("skip_share", 0.0)),
            has_likes=bool(settings.get("has_likes", False)),
        )


def read_first_days(workspace: Workspace, folder: str) -> np.ndarray:
    """int32 (N,): `PlayCounts.first_days` of what `Retrieval.save` wrote, without the rest of it."""
    return np.asarray(workspace.read_array(f"{folder}/plays.first_days.npy"))


def read_popularity(workspace: Workspace, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """int64 (N,) and int32 (N,): plays of late and the artist of each song, of what `Retrieval.save` wrote."""
    return workspace.read_array(f"{folder}/recent_plays.npy"), workspace.read_array(f"{folder}/artists.of_song.npy")


def _flat(retrieval: Retrieval) -> dict[str, Any]:
    """The arrays by the names of their files."""
    named: dict[str, Any] = {}
    for field in fields(retrieval):
        value = getattr(retrieval, field.name)
        if isinstance(value, np.ndarray | float | bool):
            named[field.name] = value
        else:
            named |= {f"{field.name}.{part.name}": getattr(value, part.name) for part in fields(value)}
    return named


PARTS = {"sessions": SessionPostings, "rules": RuleCounts, "plays": PlayCounts}


def song_ranges(songs: int, plays: int) -> list[tuple[int, int]]:
    """First row and the row after the last of each range of songs, as many as keep their counts in a task's memory."""
    count = max(1, min(songs, -(-plays // PLAYS_PER_RANGE)))
    return list(pairwise(np.linspace(0, songs, count + 1).astype(int).tolist()))


def pack_counts(counts: RetrievalCounts, first: int, last: int) -> bytes:
    """The counts of the songs from row `first` up to `last`, as `RetrievalCounts.of_songs` gives them.

    What is known of every song is stored for the range alone, so that a piece grows with its range and its bucket
    and not with the catalog.
    """
    arrays = {"about": np.array([first, last, counts.plays.num_songs, counts.sessions.newest], dtype=np.int64)}
    for name in PARTS:
        part = getattr(counts, name)
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, np.ndarray):
                key = f"{name}.{field.name}"
                value = value[first : last + 1] if key in BY_SONG else value
                arrays[key] = np.ascontiguousarray(value)
    if first > 0:
        for key in (*WHOLE, SKIPS):
            arrays.pop(key, None)
    return bytes(save(arrays))


def unpack_counts(data: bytes) -> RetrievalCounts:
    """What `pack_counts` stored."""
    arrays = load(data)
    first, last, num_songs, newest = (int(value) for value in arrays.pop("about"))
    for key in BY_SONG:
        offsets = np.empty(num_songs + 1, dtype=np.int64)
        offsets[:first], offsets[first : last + 1], offsets[last + 1 :] = 0, arrays[key], arrays[key][-1]
        arrays[key] = offsets
    nothing = PlayCounts.fit(Histories.from_lists([], []), num_songs=num_songs)
    for key in WHOLE:
        arrays.setdefault(key, getattr(nothing, key.partition(".")[2]))

    def of(name: str) -> dict[str, np.ndarray]:
        return {key.partition(".")[2]: value for key, value in arrays.items() if key.startswith(f"{name}.")}

    return RetrievalCounts(
        sessions=SessionPostings(newest=newest, **of("sessions")),
        rules=RuleCounts(**of("rules")),
        plays=PlayCounts(**of("plays")),
    )
