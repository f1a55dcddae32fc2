"""Added songs: songs that the network has not learned, with vectors estimated from attributes and first plays.

The attributes of a song are its artist, album and content. A map that is learned on songs with plays estimates the
vector of a song without plays from them. N songs of the catalog, n added songs or songs of a call, D numbers per song
vector, C per content vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import load, save

from rayrec.data import columns
from rayrec.data.catalog import Catalog, Content
from rayrec.data.histories import Histories
from rayrec.storage.workspace import Workspace

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # values to try: the number of songs that the prior mean counts as
PENALTIES = tuple(10.0**power for power in range(-4, 3))  # values to try, relative to the mean square of the inputs
MAP_SONGS = 50_000  # songs that a map is learned on, at most
CHECKED = 5  # one song in five is held out to choose the penalty
SMALLEST_DEVIATION = 1e-6  # standard deviation of a number of content vectors, below which it is not used
ROWS, OUTPUTS, AVERAGED, INPUTS = "rows.npy", "song_vectors.npy", "averaged_vectors.npy", "input_vectors.npy"
ARTIST_ROWS, ALBUM_ROWS = "artist_rows.npy", "album_rows.npy"
OUTPUT_MAP, INPUT_MAP = "song_map.safetensors", "input_map.safetensors"
READ_WITH_PLAYS = ("averaged", "inputs")  # vectors that stay unchanged after plays have been read with them
# Arrays of `AddedSongs` with one entry per song.
OF_SONGS = ("rows", "outputs", *READ_WITH_PLAYS, "artist_rows", "album_rows")
FILES = (ROWS, OUTPUTS, AVERAGED, INPUTS, ARTIST_ROWS, ALBUM_ROWS, OUTPUT_MAP, INPUT_MAP)

AROUND = 5  # plays before and after each play of an added song that its vector is drawn to, weighted 1/distance
PRIOR_PLAYS = 5.0  # number of first plays that the estimate from the attributes counts as


@dataclass(frozen=True, kw_only=True)
class SongContent:
    """The attributes of n songs that are known without plays."""

    artists: np.ndarray  # int64 (n,), code of the artist, -1 if unknown
    albums: np.ndarray  # int64 (n,), code of the album, -1 if unknown
    content: np.ndarray  # float32 (n, C), zeros for songs without content; C may be 0

    @property
    def known(self) -> np.ndarray:
        """bool (n,): True for songs with a known artist or album, or with content."""
        return np.asarray((self.artists >= 0) | (self.albums >= 0) | self.content.any(axis=1))

    def take(self, rows: np.ndarray) -> SongContent:
        """Return the songs at `rows`, int or bool."""
        return SongContent(artists=self.artists[rows], albums=self.albums[rows], content=self.content[rows])


@dataclass(frozen=True, kw_only=True)
class GroupMeans:
    """Sums of song vectors by artist and by album, from which shrunken means are computed."""

    artists: np.ndarray  # int64 (A,), ascending
    artist_sums: np.ndarray  # float64 (A, D)
    artist_counts: np.ndarray  # int64 (A,)
    albums: np.ndarray  # int64 (B,), ascending
    album_sums: np.ndarray  # float64 (B, D)
    album_counts: np.ndarray  # int64 (B,)

    @classmethod
    def of(cls, vectors: np.ndarray, songs: SongContent) -> GroupMeans:
        """Sum `vectors`, float32 (n, D), by the artists and albums of the same songs."""
        artists, artist_sums, artist_counts = _sums(vectors, songs.artists)
        albums, album_sums, album_counts = _sums(vectors, songs.albums)
        return cls(
            artists=artists,
            artist_sums=artist_sums,
            artist_counts=artist_counts,
            albums=albums,
            album_sums=album_sums,
            album_counts=album_counts,
        )

    def shrunk(
        self, songs: SongContent, mean: np.ndarray, strengths: np.ndarray, own: np.ndarray | None = None
    ) -> np.ndarray:
        """float64 (n, D): the mean of each song's album, shrunk towards that of its artist, and this towards `mean`.

        `strengths`, float64 (2,), are the numbers of songs that the priors of artist and album count as. `own`, float32
        (n, D), are the vectors of the songs if the sums include them; each song is then left out of its own means.
        """
        expected = np.broadcast_to(mean, (len(songs.artists), len(mean)))
        for songs_groups, groups, sums, counts, strength in (
            (songs.artists, self.artists, self.artist_sums, self.artist_counts, strengths[0]),
            (songs.albums, self.albums, self.album_sums, self.album_counts, strengths[1]),
        ):
            if not len(groups):
                continue
            place = np.minimum(np.searchsorted(groups, songs_groups), len(groups) - 1)
            in_group = (groups[place] == songs_groups) & (songs_groups >= 0)
            total = np.where(in_group[:, None], sums[place], 0.0)
            count = np.where(in_group, counts[place], 0).astype(np.float64)
            if own is not None:
                total, count = total - np.where(in_group[:, None], own, 0.0), count - in_group
            expected = (total + strength * expected) / (count + strength)[:, None]
        return np.array(expected, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class ContentMap:
    """A map from the artist, album and content of a song to its expected vector.

    The expected vector is the shrunken mean of album and artist. If the song has content, a linear correction is added:
    a ridge regression, solved in closed form, on the content and the mean. The less is known about a song, the shorter
    its vector is, so that the inner product with a taste vector is the expected cosine.
    """

    mean: np.ndarray  # float64 (D,), mean vector of all songs that the map was learned on
    strengths: np.ndarray  # float64 (2,), numbers of songs that the priors of artist and album count as
    content_mean: np.ndarray  # float64 (C,)
    content_scale: np.ndarray  # float64 (C,), 1 / standard deviation; 0 for a number that is not used
    # float64 (C + D + 1, D), of the content, the mean of the groups, and a constant; 0 rows if content is not used
    weights: np.ndarray
    penalty: float  # penalty of squared weights with the smallest error on held-out songs
    explained: float  # share of the squared distance to `mean` that is explained, on held-out songs

    @classmethod
    def fit(cls, vectors: np.ndarray, songs: SongContent) -> ContentMap:
        """Fit the map on the vectors of songs, float32 (n, D), and their attributes.

        Strengths are chosen by the error of predicting each song from the other songs of its groups, the penalty by the
        error on one song in five, which is held out.
        """
        mean = vectors.mean(axis=0, dtype=np.float64) if len(vectors) else np.zeros(vectors.shape[1])
        groups, strengths = GroupMeans.of(vectors, songs), np.array([STRENGTHS[-1], STRENGTHS[-1]])
        for place in range(2):  # first the artist's strength, with the album's at its largest
            errors = []
            for strength in STRENGTHS:
                strengths[place] = strength
                errors.append(_error(vectors, groups.shrunk(songs, mean, strengths, own=vectors)))
            strengths[place] = STRENGTHS[int(np.argmin(errors))]
        base = groups.shrunk(songs, mean, strengths, own=vectors)
        spread, error = _error(vectors, mean), _error(vectors, base)
        scale = songs.content.std(axis=0, dtype=np.float64) if len(vectors) else np.zeros(songs.content.shape[1])
        by_groups = cls(
            mean=mean,
            strengths=strengths,
            content_mean=songs.content.mean(axis=0, dtype=np.float64) if len(vectors) else scale,
            content_scale=np.where(scale > SMALLEST_DEVIATION, 1 / np.maximum(scale, SMALLEST_DEVIATION), 0.0),
            weights=np.zeros((0, vectors.shape[1])),
            penalty=0.0,
            explained=1 - error / spread if spread else 0.0,
        )
        with_content = np.flatnonzero(songs.content.any(axis=1))
        if len(with_content) <= CHECKED:
            return by_groups
        return by_groups._with_weights(vectors[with_content], songs.take(with_content), base[with_content], spread)

    def _with_weights(self, vectors: np.ndarray, songs: SongContent, base: np.ndarray, spread: float) -> ContentMap:
        inputs, left = self._inputs(songs, base), vectors - base
        checked = np.arange(len(vectors)) % CHECKED == 0  # song rows are in no particular order
        values, axes = np.linalg.eigh(inputs[~checked].T @ inputs[~checked])
        towards, checked_inputs = axes.T @ (inputs[~checked].T @ left[~checked]), inputs[checked] @ axes
        size = np.trace(inputs.T @ inputs) / inputs.shape[1]
        errors = {
            penalty: _error(
                left[checked], checked_inputs @ (towards / (np.maximum(values, 0) + penalty * size)[:, None])
            )
            for penalty in PENALTIES
        }
        penalty = min(errors, key=lambda each: errors[each])
        if errors[penalty] >= _error(left[checked], 0.0):
            return self  # the content does not improve on artist and album
        ridge = inputs.T @ inputs + penalty * size * np.eye(inputs.shape[1])
        changed = {
            "weights": np.linalg.solve(ridge, inputs.T @ left),
            "penalty": penalty,
            "explained": 1 - errors[penalty] / spread,
        }
        return ContentMap(**{**{item.name: getattr(self, item.name) for item in fields(self)}, **changed})

    def _inputs(self, songs: SongContent, base: np.ndarray) -> np.ndarray:
        content = (songs.content - self.content_mean) * self.content_scale
        return np.concatenate([content, base - self.mean, np.ones((len(base), 1))], axis=1)

    def vectors(self, songs: SongContent, groups: GroupMeans) -> np.ndarray:
        """float64 (n, D): the expected vectors of songs; zeros for songs with no known group and no usable content.

        `groups` must hold the sums of at least the artists and albums of these songs.
        """
        base = groups.shrunk(songs, self.mean, self.strengths)
        informed = np.isin(songs.artists, groups.artists) | np.isin(songs.albums, groups.albums)
        if len(self.weights):
            with_content = np.flatnonzero(songs.content.any(axis=1))
            base[with_content] += self._inputs(songs.take(with_content), base[with_content]) @ self.weights
            informed[with_content] = True
        return np.where(informed[:, None], base, 0.0)

    def to_bytes(self) -> bytes:
        """Return the map in the safetensors format."""
        return bytes(save({item.name: np.atleast_1d(getattr(self, item.name)) for item in fields(self)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> ContentMap:
        """Load a map that `to_bytes` returned."""
        arrays = load(data)
        penalty, explained = (float(arrays.pop(name)[0]) for name in ("penalty", "explained"))
        return cls(**arrays, penalty=penalty, explained=explained)


def _sums(vectors: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return groups, int64 (G,), ascending, without -1, their sums, float64 (G, D), and numbers of songs, int64."""
    known = np.flatnonzero(groups >= 0)
    order = known[np.argsort(groups[known], kind="stable")]
    names, first, counts = np.unique(groups[order], return_index=True, return_counts=True)
    if not len(names):
        return names, np.zeros((0, vectors.shape[1])), counts
    return names, np.add.reduceat(vectors[order].astype(np.float64), first, axis=0), counts


def _error(vectors: np.ndarray, expected: np.ndarray | float) -> float:
    """Return the mean squared distance between `vectors` and `expected`."""
    return float(np.square(vectors - expected).sum(axis=1).mean()) if len(vectors) else 0.0


def songs_without_vector(outputs: np.ndarray, num_songs: int) -> np.ndarray:
    """int64: the song rows below `num_songs` without a vector in `outputs`, float32 (N, D)."""
    present = np.zeros(num_songs, dtype=bool)
    present[: len(outputs)] = np.asarray(outputs.any(axis=1))[:num_songs]
    return np.flatnonzero(~present)


@dataclass(frozen=True, kw_only=True)
class FirstPlays:
    """The vectors played around the plays of songs that the network has not learned."""

    rows: np.ndarray  # int64 (n,), song rows, ascending
    plays: np.ndarray  # int64 (n,), number of plays of each song with a known song around them
    outputs: np.ndarray  # float64 (n, D), sums over these plays of the mean vector around each
    inputs: np.ndarray  # float64 (n, D), the same for the vectors that the network reads

    @classmethod
    def none(cls, rows: np.ndarray, dim: int) -> FirstPlays:
        """Return the first plays of songs that nobody has played."""
        return cls(
            rows=rows,
            plays=np.zeros(len(rows), np.int64),
            outputs=np.zeros((len(rows), dim)),
            inputs=np.zeros((len(rows), dim)),
        )

    @classmethod
    def read(
        cls, batches: Iterable[Histories], rows: np.ndarray, outputs: np.ndarray, inputs: np.ndarray
    ) -> FirstPlays:
        """Collect the first plays of the songs `rows` from the plays since the network was trained.

        `outputs` and `inputs`, float32 (N, D), are the tables of the network.
        """
        sums_so_far = cls.none(rows, outputs.shape[1])
        for histories in batches:
            played = np.flatnonzero(np.isin(histories.songs, rows))
            if not len(played):
                continue
            user, weights = histories.rows, np.zeros(len(played))
            sums = np.zeros((2, len(played), outputs.shape[1]))
            for distance in (*range(-AROUND, 0), *range(1, AROUND + 1)):
                other = np.clip(played + distance, 0, histories.num_plays - 1)
                song = histories.songs[other]
                near = (other == played + distance) & (user[other] == user[played]) & (song < len(outputs))
                song = np.where(near, song, 0)
                near &= outputs[song].any(axis=1)
                weight = near / abs(distance)
                weights += weight
                for total, table in zip(sums, (outputs, inputs), strict=True):
                    total += weight[:, None] * table[song]
            some = weights > 0
            place = np.searchsorted(rows, histories.songs[played])[some]
            np.add.at(sums_so_far.plays, place, 1)
            for total, part in zip((sums_so_far.outputs, sums_so_far.inputs), sums, strict=True):
                np.add.at(total, place, part[some] / weights[some, None])
        return sums_so_far


@dataclass(frozen=True, kw_only=True)
class AddedSongs:
    """The added songs and their vectors, without the songs that the network knows."""

    rows: np.ndarray  # int64 (n,), song rows, ascending
    outputs: np.ndarray  # float32 (n, D), vectors that taste vectors are compared with, of length 1 at most
    averaged: np.ndarray  # float32 (n, D), `outputs` when plays were first read; zeros if the song had no vector then
    inputs: np.ndarray  # float32 (n, D), vectors that the cells read; zeros if plays were read while it had none
    artist_rows: np.ndarray  # int64 (n,), the first song of the catalog by the same artist; -1 for an unknown artist
    album_rows: np.ndarray  # int64 (n,), the first song of the same album
    output_map: ContentMap
    input_map: ContentMap
    played: int = 0  # number of songs with first plays
    rows_read: int = 0  # rows of the network's tables from which vectors were computed, apart from those of the maps

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def make(
        cls,
        outputs: np.ndarray,
        inputs: np.ndarray,
        catalog: Catalog,
        content: Content,
        *,
        earlier: AddedSongs | None = None,
        songs_then: int = 0,
        first_plays: FirstPlays | None = None,
        seed: int = 0,
    ) -> AddedSongs:
        """Return all songs of the catalog without a vector in `outputs`, float32 (N, D), that can get a vector.

        `inputs`, of the same shape, are the vectors of songs as the network reads them. `first_plays` draw the vectors
        of these songs towards the vectors played around them, the more plays, the closer. The maps of `earlier` are
        reused if its content vectors have the same length. `earlier` was made for the first `songs_then` songs of the
        catalog; the vectors with which plays of these songs are read stay unchanged.
        """
        described = _Described(catalog, content)
        rows = songs_without_vector(outputs, len(catalog))
        present = np.ones(len(catalog), dtype=bool)
        present[rows] = False
        first_plays = first_plays or FirstPlays.none(rows, outputs.shape[1])
        usable = described.of(rows).known | (first_plays.plays > 0)
        rows, plays = rows[usable], first_plays.plays[usable]
        maps = _maps(described, present, outputs, inputs, earlier, seed)
        songs = described.of(rows)
        near = np.flatnonzero(present & described.near(songs))
        expected, read = (
            drawn(prior, plays, around)
            for prior, around in zip(
                _without_plays(maps, (outputs, inputs), songs, near, described.of(near)),
                (first_plays.outputs[usable], first_plays.inputs[usable]),
                strict=True,
            )
        )
        averaged = expected.copy()
        if earlier is not None:
            rows_then = rows[rows < songs_then]
            place = np.minimum(np.searchsorted(earlier.rows, rows_then), max(0, len(earlier) - 1))
            same = earlier.rows[place] == rows_then if len(earlier) else np.zeros(len(rows_then), dtype=bool)
            for vectors, vectors_then in ((averaged, earlier.averaged), (read, earlier.inputs)):
                vectors[: len(rows_then)][~same] = 0.0
                vectors[: len(rows_then)][same] = vectors_then[place[same]]
        some = expected.any(axis=1)
        return cls(
            rows=rows[some],
            outputs=expected[some].astype(np.float32),
            averaged=averaged[some].astype(np.float32),
            inputs=read[some].astype(np.float32),
            artist_rows=described.first_rows(described.artists, rows[some]),
            album_rows=described.first_rows(described.albums, rows[some]),
            output_map=maps[0],
            input_map=maps[1],
            played=int((plays[some] > 0).sum()),
            rows_read=len(near),
        )

    def take(self, kept: np.ndarray) -> AddedSongs:
        """Return the songs where `kept`, bool (n,), is true, or the songs at the places `kept`, int."""
        return replace(self, **{name: getattr(self, name)[kept] for name in OF_SONGS})

    def joined(self, other: AddedSongs) -> AddedSongs:
        """Return these songs and those of `other`; no song may be in both."""
        order = np.argsort(np.concatenate([self.rows, other.rows]), kind="stable")
        both: dict[str, Any] = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])[order] for name in OF_SONGS
        }
        return replace(self, **both)

    def fits(self, base: AddedSongs | None, songs_then: int) -> bool:
        """Return True if plays of the first `songs_then` songs are read the same with these songs as with `base`."""
        now = self.take(self.rows < songs_then)
        if base is None:
            return not any(getattr(now, name).any() for name in READ_WITH_PLAYS)
        then = base.take(base.rows < songs_then)
        known = np.union1d(now.rows, then.rows)
        tables = [np.zeros((len(known), len(READ_WITH_PLAYS), self.inputs.shape[1]), np.float32) for _ in range(2)]
        for table, songs in zip(tables, (now, then), strict=True):
            vectors = np.stack([getattr(songs, name) for name in READ_WITH_PLAYS], axis=1)
            table[np.searchsorted(known, songs.rows)] = vectors
        return bool(np.array_equal(tables[0], tables[1]))

    def save(self, workspace: Workspace, folder: str) -> dict[str, str]:
        """Write FILES to a folder; return the SHA-256 of each file by name."""
        named = zip(FILES, OF_SONGS, strict=False)
        written = {file: workspace.write_array(f"{folder}/{file}", getattr(self, name)) for file, name in named}
        for name, each in ((OUTPUT_MAP, self.output_map), (INPUT_MAP, self.input_map)):
            written[name] = workspace.write_bytes(f"{folder}/{name}", each.to_bytes())
        return written

    @classmethod
    def load(cls, workspace: Workspace, folder: str) -> AddedSongs:
        """Load the songs that `save` wrote."""
        arrays = [np.array(workspace.read_array(f"{folder}/{name}")) for name in FILES[: len(OF_SONGS)]]
        maps = [ContentMap.from_bytes(workspace.read_bytes(f"{folder}/{name}")) for name in FILES[len(OF_SONGS) :]]
        return cls(**dict(zip((*OF_SONGS, "output_map", "input_map"), [*arrays, *maps], strict=True)))  # type: ignore[arg-type]


Maps = tuple[ContentMap, ContentMap]  # the maps to vectors of `outputs` and of `inputs`


@dataclass(frozen=True, kw_only=True)
class LaterSong:
    """The attributes of a song that is added by itself."""

    row: int  # song row
    artist: str | None
    album: str | None
    content: np.ndarray | None  # float32 (C,)


class SongPlacer:
    """Estimates the vectors of songs that are added one after another; `AddedSongs.make` does so for a catalog."""

    def __init__(
        self,
        outputs: np.ndarray,
        inputs: np.ndarray,
        catalog: Catalog,
        content: Content,
        earlier: AddedSongs | None = None,
    ) -> None:
        """The arguments are those of `AddedSongs.make`; without `earlier`, the maps are learned here."""
        self._tables = outputs, inputs
        self._described = _Described(catalog, content)
        self._present = np.ones(len(catalog), dtype=bool)
        self._present[songs_without_vector(outputs, len(catalog))] = False
        self._maps = _maps(self._described, self._present, outputs, inputs, earlier)
        self.content_dim = content.dim
        self._codes: list[tuple[np.ndarray, pa.Array, dict[str, int]]] = [
            (self._described.artists, _names(catalog, columns.ARTIST), {}),
            (self._described.albums, _names(catalog, columns.ALBUM), {}),
        ]
        self._first_rows: tuple[dict[int, int], dict[int, int]] = {}, {}  # by artist and by album

    def place(self, songs: Sequence[LaterSong]) -> AddedSongs:
        """Return all `songs`, sorted by row, with vectors estimated without plays; zeros if no vector can be estimated.

        Content whose length differs from that of the catalog is ignored.
        """
        artists, albums = (
            np.array([self._code(group, getattr(song, name)) for song in songs], dtype=np.int64)
            for group, name in enumerate(("artist", "album"))
        )
        content = np.zeros((len(songs), self.content_dim), dtype=np.float32)
        for place, song in enumerate(songs):
            if song.content is not None and len(song.content) == self.content_dim:
                content[place] = song.content
        known = SongContent(artists=artists, albums=albums, content=content)
        near = np.flatnonzero(self._present & self._described.near(known))
        outputs, inputs = _without_plays(self._maps, self._tables, known, near, self._described.of(near))
        rows = [song.row for song in songs]
        return AddedSongs(
            rows=np.array(rows, dtype=np.int64),
            outputs=outputs,
            averaged=outputs,
            inputs=inputs,
            artist_rows=self._first(0, artists, rows),
            album_rows=self._first(1, albums, rows),
            output_map=self._maps[0],
            input_map=self._maps[1],
            rows_read=len(near),
        ).take(np.argsort(rows))

    def _code(self, group: int, name: str | None) -> int:
        """Return the code of an artist or album: the catalog's, or a new one after the catalog's; -1 for no name."""
        if not name:
            return -1
        _, names, later = self._codes[group]
        place: int | None = pc.index_in(pa.scalar(name, pa.string()), value_set=names).as_py()
        return later.setdefault(name, len(names) + len(later)) if place is None else place

    def _first(self, group: int, codes: np.ndarray, rows: Sequence[int]) -> np.ndarray:
        """int64 (n,): the first song of the same artist or album, from the catalog if possible; -1 for code -1."""
        of_catalog, _, _ = self._codes[group]
        first = self._first_rows[group]
        for code, row in zip(codes.tolist(), rows, strict=True):
            if code >= 0 and code not in first:
                same = of_catalog == code
                first[code] = int(np.argmax(same)) if same.any() else row
        return np.array([first.get(code, -1) for code in codes.tolist()], dtype=np.int64)


def drawn(prior: np.ndarray, plays: np.ndarray, around: np.ndarray) -> np.ndarray:
    """float64 (n, D): the vectors `prior`, (n, D), estimated without plays, drawn to the means around first plays.

    `plays`, int (n,), are the numbers of first plays; `around`, float64 (n, D), are the sums of the means around them.
    """
    return np.asarray((PRIOR_PLAYS * prior + around) / (PRIOR_PLAYS + plays[:, None]))


def _without_plays(
    maps: Maps, tables: tuple[np.ndarray, np.ndarray], songs: SongContent, near: np.ndarray, neighbors: SongContent
) -> list[np.ndarray]:
    """float32 (n, D) for each map: the vectors of songs estimated without plays, of length 1 at most.

    `near`, int64, are the rows of all songs with a vector of the same artists and albums; `neighbors` describes them.
    """
    placed = [
        each.vectors(songs, GroupMeans.of(table[near], neighbors)) for each, table in zip(maps, tables, strict=True)
    ]
    # Content with another scale than that of the learned map gives long vectors, which would come first for all users.
    return [(each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1.0)).astype(np.float32) for each in placed]


def _maps(
    described: _Described,
    present: np.ndarray,
    outputs: np.ndarray,
    inputs: np.ndarray,
    earlier: AddedSongs | None,
    seed: int = 0,
) -> Maps:
    """Return the maps of `earlier` if its content has the same length, else maps learned on songs in `present`."""
    if earlier is not None and len(earlier.output_map.content_mean) == described.content_dim:
        return earlier.output_map, earlier.input_map
    learned = described.sample(np.flatnonzero(present), seed)
    content = described.of(learned)
    return ContentMap.fit(outputs[learned], content), ContentMap.fit(inputs[learned], content)


def _names(catalog: Catalog, name: str) -> pa.Array:
    """Return the distinct values of a string column in the order of `Catalog.codes`; none if the column is missing."""
    if name not in catalog.table.column_names:
        return pa.array([], pa.string())
    return columns.one_array(catalog.table.column(name)).dictionary_encode().dictionary


class _Described:
    """The attributes of the songs of a catalog."""

    def __init__(self, catalog: Catalog, content: Content) -> None:
        self.artists = catalog.codes(columns.ARTIST).astype(np.int64)
        self.albums = catalog.codes(columns.ALBUM).astype(np.int64)
        self._content = content
        self.content_dim = content.dim

    def of(self, rows: np.ndarray) -> SongContent:
        return SongContent(artists=self.artists[rows], albums=self.albums[rows], content=self._content.vectors(rows))

    def near(self, songs: SongContent) -> np.ndarray:
        """bool (N,): the songs of the catalog with the same artists or albums as `songs`."""
        is_near = np.zeros(len(self.artists), dtype=bool)
        for codes, groups in ((self.artists, songs.artists), (self.albums, songs.albums)):
            is_near |= (codes >= 0) & np.isin(codes, groups)
        return is_near

    def sample(self, rows: np.ndarray, seed: int) -> np.ndarray:
        """Sample about MAP_SONGS song rows, by whole artists, since means over part of an artist are less exact."""
        if len(rows) <= MAP_SONGS:
            return rows
        groups = np.where(self.artists[rows] >= 0, self.artists[rows], -1 - rows)
        names, places = np.unique(groups, return_inverse=True)
        order = np.random.default_rng(seed).permutation(len(names))[places]
        return np.sort(rows[np.argsort(order, kind="stable")[:MAP_SONGS]])

    def first_rows(self, codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """int64 (n,): the first song of the catalog with the same code as each song; -1 for songs without a code."""
        groups = np.unique(codes[rows])
        some = np.flatnonzero(np.isin(codes, groups))
        names, first = np.unique(codes[some], return_index=True)
        if not len(names):
            return np.full(len(rows), -1, dtype=np.int64)
        first_of_group = some[first[np.searchsorted(names, codes[rows])]]
        return np.where(codes[rows] >= 0, first_of_group, -1).astype(np.int64)
