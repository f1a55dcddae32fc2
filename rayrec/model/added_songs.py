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
from rayrec.data.ragged import sum_groups
from rayrec.storage.workspace import Workspace

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # values to try: the number of songs that the prior mean counts as
PENALTIES = tuple(10.0**power for power in range(-4, 3))  # values to try, relative to the mean square of the inputs
MAP_SONGS = 50_000  # songs that a map is learned on, at most
HELD_OUT_EVERY = 5  # one song in five is held out to choose the penalty
SMALLEST_DEVIATION = 1e-6  # standard deviation of a number of content vectors, below which it is not used
ROWS, OUTPUTS, AVERAGED, INPUTS = "rows.npy", "song_vectors.npy", "averaged_vectors.npy", "input_vectors.npy"
ARTIST_ROWS, ALBUM_ROWS = "artist_rows.npy", "album_rows.npy"
OUTPUT_MAP, INPUT_MAP = "song_map.safetensors", "input_map.safetensors"
READ_WITH_PLAYS = ("averaged", "inputs")  # vectors that stay unchanged after plays have been read with them
# Arrays of `AddedSongs` with one entry per song.
OF_SONGS = ("rows", "outputs", *READ_WITH_PLAYS, "artist_rows", "album_rows")
FILES = (ROWS, OUTPUTS, AVERAGED, INPUTS, ARTIST_ROWS, ALBUM_ROWS, OUTPUT_MAP, INPUT_MAP)

NEIGHBOR_PLAYS = 5  # plays before and after each play of an added song that its vector is drawn to, weighted 1/distance
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
        artists, artist_sums, artist_counts = _sums_by_group(vectors, songs.artists)
        albums, album_sums, album_counts = _sums_by_group(vectors, songs.albums)
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
        for song_groups, groups, sums, counts, strength in (
            (songs.artists, self.artists, self.artist_sums, self.artist_counts, strengths[0]),
            (songs.albums, self.albums, self.album_sums, self.album_counts, strengths[1]),
        ):
            if not len(groups):
                continue
            positions = np.minimum(np.searchsorted(groups, song_groups), len(groups) - 1)
            is_in_group = (groups[positions] == song_groups) & (song_groups >= 0)
            total = np.where(is_in_group[:, None], sums[positions], 0.0)
            count = np.where(is_in_group, counts[positions], 0).astype(np.float64)
            if own is not None:
                total, count = total - np.where(is_in_group[:, None], own, 0.0), count - is_in_group
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
        for index in range(2):  # first the artist's strength, with the album's at its largest
            errors = []
            for strength in STRENGTHS:
                strengths[index] = strength
                errors.append(_error(vectors, groups.shrunk(songs, mean, strengths, own=vectors)))
            strengths[index] = STRENGTHS[int(np.argmin(errors))]
        group_means = groups.shrunk(songs, mean, strengths, own=vectors)
        spread, error = _error(vectors, mean), _error(vectors, group_means)
        scale = songs.content.std(axis=0, dtype=np.float64) if len(vectors) else np.zeros(songs.content.shape[1])
        group_map = cls(
            mean=mean,
            strengths=strengths,
            content_mean=songs.content.mean(axis=0, dtype=np.float64) if len(vectors) else scale,
            content_scale=np.where(scale > SMALLEST_DEVIATION, 1 / np.maximum(scale, SMALLEST_DEVIATION), 0.0),
            weights=np.zeros((0, vectors.shape[1])),
            penalty=0.0,
            explained=1 - error / spread if spread else 0.0,
        )
        content_rows = np.flatnonzero(songs.content.any(axis=1))
        if len(content_rows) <= HELD_OUT_EVERY:
            return group_map
        return group_map._with_weights(
            vectors[content_rows], songs.take(content_rows), group_means[content_rows], spread
        )

    def _with_weights(
        self, vectors: np.ndarray, songs: SongContent, group_means: np.ndarray, spread: float
    ) -> ContentMap:
        inputs, residuals = self._inputs(songs, group_means), vectors - group_means
        is_held_out = np.arange(len(vectors)) % HELD_OUT_EVERY == 0  # song rows are in no particular order
        eigenvalues, eigenvectors = np.linalg.eigh(inputs[~is_held_out].T @ inputs[~is_held_out])
        projected_residuals = eigenvectors.T @ (inputs[~is_held_out].T @ residuals[~is_held_out])
        held_out_inputs = inputs[is_held_out] @ eigenvectors
        input_scale = np.trace(inputs.T @ inputs) / inputs.shape[1]
        errors = {
            penalty: _error(
                residuals[is_held_out],
                held_out_inputs @ (projected_residuals / (np.maximum(eigenvalues, 0) + penalty * input_scale)[:, None]),
            )
            for penalty in PENALTIES
        }
        penalty = min(errors, key=lambda candidate: errors[candidate])
        if errors[penalty] >= _error(residuals[is_held_out], 0.0):
            return self  # the content does not improve on artist and album
        ridge = inputs.T @ inputs + penalty * input_scale * np.eye(inputs.shape[1])
        fitted = {
            "weights": np.linalg.solve(ridge, inputs.T @ residuals),
            "penalty": penalty,
            "explained": 1 - errors[penalty] / spread,
        }
        return ContentMap(**{**{item.name: getattr(self, item.name) for item in fields(self)}, **fitted})

    def _inputs(self, songs: SongContent, group_means: np.ndarray) -> np.ndarray:
        content = (songs.content - self.content_mean) * self.content_scale
        return np.concatenate([content, group_means - self.mean, np.ones((len(group_means), 1))], axis=1)

    def vectors(self, songs: SongContent, groups: GroupMeans) -> np.ndarray:
        """float64 (n, D): the expected vectors of songs; zeros for songs with no known group and no usable content.

        `groups` must hold the sums of at least the artists and albums of these songs.
        """
        expected = groups.shrunk(songs, self.mean, self.strengths)
        is_informed = np.isin(songs.artists, groups.artists) | np.isin(songs.albums, groups.albums)
        if len(self.weights):
            content_rows = np.flatnonzero(songs.content.any(axis=1))
            expected[content_rows] += self._inputs(songs.take(content_rows), expected[content_rows]) @ self.weights
            is_informed[content_rows] = True
        return np.where(is_informed[:, None], expected, 0.0)

    def to_bytes(self) -> bytes:
        """Return the map in the safetensors format."""
        return bytes(save({item.name: np.atleast_1d(getattr(self, item.name)) for item in fields(self)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> ContentMap:
        """Load a map that `to_bytes` returned."""
        arrays = load(data)
        penalty, explained = (float(arrays.pop(name)[0]) for name in ("penalty", "explained"))
        return cls(**arrays, penalty=penalty, explained=explained)


def _sums_by_group(vectors: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return groups, int64 (G,), ascending, without -1, their sums, float64 (G, D), and numbers of songs, int64."""
    grouped_rows = np.flatnonzero(groups >= 0)
    order = grouped_rows[np.argsort(groups[grouped_rows], kind="stable")]
    group_codes, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    return group_codes, sum_groups(vectors[order].astype(np.float64), starts), counts


def _error(vectors: np.ndarray, expected: np.ndarray | float) -> float:
    """Return the mean squared distance between `vectors` and `expected`."""
    return float(np.square(vectors - expected).sum(axis=1).mean()) if len(vectors) else 0.0


def songs_without_vector(outputs: np.ndarray, num_songs: int) -> np.ndarray:
    """int64: the song rows below `num_songs` without a vector in `outputs`, float32 (N, D)."""
    has_vector = np.zeros(num_songs, dtype=bool)
    has_vector[: len(outputs)] = np.asarray(outputs.any(axis=1))[:num_songs]
    return np.flatnonzero(~has_vector)


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
        first_plays = cls.none(rows, outputs.shape[1])
        for histories in batches:
            positions = np.flatnonzero(np.isin(histories.songs, rows))
            if not len(positions):
                continue
            user_rows, weights = histories.rows, np.zeros(len(positions))
            sums = np.zeros((2, len(positions), outputs.shape[1]))
            for distance in (*range(-NEIGHBOR_PLAYS, 0), *range(1, NEIGHBOR_PLAYS + 1)):
                neighbor_positions = np.clip(positions + distance, 0, histories.num_plays - 1)
                neighbor_songs = histories.songs[neighbor_positions]
                is_near = (
                    (neighbor_positions == positions + distance)
                    & (user_rows[neighbor_positions] == user_rows[positions])
                    & (neighbor_songs < len(outputs))
                )
                neighbor_songs = np.where(is_near, neighbor_songs, 0)
                is_near &= outputs[neighbor_songs].any(axis=1)
                weight = is_near / abs(distance)
                weights += weight
                for total, table in zip(sums, (outputs, inputs), strict=True):
                    total += weight[:, None] * table[neighbor_songs]
            has_neighbors = weights > 0
            song_indices = np.searchsorted(rows, histories.songs[positions])[has_neighbors]
            np.add.at(first_plays.plays, song_indices, 1)
            for total, part in zip((first_plays.outputs, first_plays.inputs), sums, strict=True):
                np.add.at(total, song_indices, part[has_neighbors] / weights[has_neighbors, None])
        return first_plays


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
        earlier_num_songs: int = 0,
        first_plays: FirstPlays | None = None,
    ) -> AddedSongs:
        """Return all songs of the catalog without a vector in `outputs`, float32 (N, D), that can get a vector.

        `inputs`, of the same shape, are the vectors of songs as the network reads them. `first_plays` draw the vectors
        of these songs towards the vectors played around them, the more plays, the closer. The maps of `earlier` are
        reused if its content vectors have the same length. `earlier` was made for the first `earlier_num_songs` songs
        of the catalog; the vectors with which plays of these songs are read stay unchanged.
        """
        attributes = _CatalogAttributes(catalog, content)
        rows = songs_without_vector(outputs, len(catalog))
        has_vector = np.ones(len(catalog), dtype=bool)
        has_vector[rows] = False
        first_plays = first_plays or FirstPlays.none(rows, outputs.shape[1])
        is_usable = attributes.of(rows).known | (first_plays.plays > 0)
        rows, plays = rows[is_usable], first_plays.plays[is_usable]
        maps = _choose_maps(attributes, has_vector, outputs, inputs, earlier)
        songs = attributes.of(rows)
        near_rows = np.flatnonzero(has_vector & attributes.near_mask(songs))
        estimated_outputs, estimated_inputs = (
            drawn(prior, plays, neighbor_sums)
            for prior, neighbor_sums in zip(
                _estimate_without_plays(maps, (outputs, inputs), songs, near_rows, attributes.of(near_rows)),
                (first_plays.outputs[is_usable], first_plays.inputs[is_usable]),
                strict=True,
            )
        )
        averaged = estimated_outputs.copy()
        if earlier is not None:
            earlier_rows = rows[rows < earlier_num_songs]
            positions = np.minimum(np.searchsorted(earlier.rows, earlier_rows), max(0, len(earlier) - 1))
            is_in_earlier = (
                earlier.rows[positions] == earlier_rows if len(earlier) else np.zeros(len(earlier_rows), dtype=bool)
            )
            for vectors, earlier_vectors in ((averaged, earlier.averaged), (estimated_inputs, earlier.inputs)):
                vectors[: len(earlier_rows)][~is_in_earlier] = 0.0
                vectors[: len(earlier_rows)][is_in_earlier] = earlier_vectors[positions[is_in_earlier]]
        has_estimate = estimated_outputs.any(axis=1)
        return cls(
            rows=rows[has_estimate],
            outputs=estimated_outputs[has_estimate].astype(np.float32),
            averaged=averaged[has_estimate].astype(np.float32),
            inputs=estimated_inputs[has_estimate].astype(np.float32),
            artist_rows=attributes.first_rows(attributes.artists, rows[has_estimate]),
            album_rows=attributes.first_rows(attributes.albums, rows[has_estimate]),
            output_map=maps[0],
            input_map=maps[1],
            played=int((plays[has_estimate] > 0).sum()),
            rows_read=len(near_rows),
        )

    def take(self, selected: np.ndarray) -> AddedSongs:
        """Return the songs where `selected`, bool (n,), is true, or the songs at the positions `selected`, int."""
        return replace(self, **{name: getattr(self, name)[selected] for name in OF_SONGS})

    def union(self, other: AddedSongs) -> AddedSongs:
        """Return these songs and those of `other`; no song may be in both."""
        order = np.argsort(np.concatenate([self.rows, other.rows]), kind="stable")
        merged: dict[str, Any] = {
            name: np.concatenate([getattr(self, name), getattr(other, name)])[order] for name in OF_SONGS
        }
        return replace(self, **merged)

    def fits(self, base: AddedSongs | None, earlier_num_songs: int) -> bool:
        """Return True if plays of the first `earlier_num_songs` songs are read the same here as with `base`."""
        current = self.take(self.rows < earlier_num_songs)
        if base is None:
            return not any(getattr(current, name).any() for name in READ_WITH_PLAYS)
        earlier = base.take(base.rows < earlier_num_songs)
        all_rows = np.union1d(current.rows, earlier.rows)
        tables = [np.zeros((len(all_rows), len(READ_WITH_PLAYS), self.inputs.shape[1]), np.float32) for _ in range(2)]
        for table, songs in zip(tables, (current, earlier), strict=True):
            vectors = np.stack([getattr(songs, name) for name in READ_WITH_PLAYS], axis=1)
            table[np.searchsorted(all_rows, songs.rows)] = vectors
        return bool(np.array_equal(tables[0], tables[1]))

    def save(self, workspace: Workspace, folder: str) -> dict[str, str]:
        """Write FILES to a folder; return the SHA-256 of each file by name."""
        pairs = zip(FILES, OF_SONGS, strict=False)
        checksums = {file: workspace.write_array(f"{folder}/{file}", getattr(self, name)) for file, name in pairs}
        for name, content_map in ((OUTPUT_MAP, self.output_map), (INPUT_MAP, self.input_map)):
            checksums[name] = workspace.write_bytes(f"{folder}/{name}", content_map.to_bytes())
        return checksums

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
        self._attributes = _CatalogAttributes(catalog, content)
        self._has_vector = np.ones(len(catalog), dtype=bool)
        self._has_vector[songs_without_vector(outputs, len(catalog))] = False
        self._maps = _choose_maps(self._attributes, self._has_vector, outputs, inputs, earlier)
        self.content_dim = content.dim
        self._codes: list[tuple[np.ndarray, pa.Array, dict[str, int]]] = [
            (self._attributes.artists, _distinct_names(catalog, columns.ARTIST), {}),
            (self._attributes.albums, _distinct_names(catalog, columns.ALBUM), {}),
        ]
        self._first_rows: tuple[dict[int, int], dict[int, int]] = {}, {}  # by artist and by album

    def estimate(self, songs: Sequence[LaterSong]) -> AddedSongs:
        """Return all `songs`, sorted by row, with vectors estimated without plays; zeros if no vector can be estimated.

        Content whose length differs from that of the catalog is ignored.
        """
        artists, albums = (
            np.array([self._code_of(group, getattr(song, name)) for song in songs], dtype=np.int64)
            for group, name in enumerate(("artist", "album"))
        )
        content = np.zeros((len(songs), self.content_dim), dtype=np.float32)
        for position, song in enumerate(songs):
            if song.content is not None and len(song.content) == self.content_dim:
                content[position] = song.content
        song_content = SongContent(artists=artists, albums=albums, content=content)
        near_rows = np.flatnonzero(self._has_vector & self._attributes.near_mask(song_content))
        outputs, inputs = _estimate_without_plays(
            self._maps, self._tables, song_content, near_rows, self._attributes.of(near_rows)
        )
        rows = [song.row for song in songs]
        return AddedSongs(
            rows=np.array(rows, dtype=np.int64),
            outputs=outputs,
            averaged=outputs,
            inputs=inputs,
            artist_rows=self._first_rows_of(0, artists, rows),
            album_rows=self._first_rows_of(1, albums, rows),
            output_map=self._maps[0],
            input_map=self._maps[1],
            rows_read=len(near_rows),
        ).take(np.argsort(rows))

    def _code_of(self, group: int, name: str | None) -> int:
        """Return the code of an artist or album: the catalog's, or a new one after the catalog's; -1 for no name."""
        if not name:
            return -1
        _, names, new_codes = self._codes[group]
        position: int | None = pc.index_in(pa.scalar(name, pa.string()), value_set=names).as_py()
        return new_codes.setdefault(name, len(names) + len(new_codes)) if position is None else position

    def _first_rows_of(self, group: int, codes: np.ndarray, rows: Sequence[int]) -> np.ndarray:
        """int64 (n,): the first song of the same artist or album, from the catalog if possible; -1 for code -1."""
        catalog_codes, _, _ = self._codes[group]
        first_rows = self._first_rows[group]
        for code, row in zip(codes.tolist(), rows, strict=True):
            if code >= 0 and code not in first_rows:
                is_same = catalog_codes == code
                first_rows[code] = int(np.argmax(is_same)) if is_same.any() else row
        return np.array([first_rows.get(code, -1) for code in codes.tolist()], dtype=np.int64)


def drawn(prior: np.ndarray, plays: np.ndarray, neighbor_sums: np.ndarray) -> np.ndarray:
    """float64 (n, D): the vectors `prior`, (n, D), estimated without plays, drawn to the means around first plays.

    `plays`, int (n,), are the numbers of first plays; `neighbor_sums`, float64 (n, D), are the sums of the means around
    them.
    """
    return np.asarray((PRIOR_PLAYS * prior + neighbor_sums) / (PRIOR_PLAYS + plays[:, None]))


def _estimate_without_plays(
    maps: Maps, tables: tuple[np.ndarray, np.ndarray], songs: SongContent, near_rows: np.ndarray, neighbors: SongContent
) -> list[np.ndarray]:
    """float32 (n, D) for each map: the vectors of songs estimated without plays, of length 1 at most.

    `near_rows`, int64, are the rows of all songs with a vector of the same artists and albums; `neighbors` describes
    them.
    """
    estimates = [
        each.vectors(songs, GroupMeans.of(table[near_rows], neighbors))
        for each, table in zip(maps, tables, strict=True)
    ]
    # Content with another scale than that of the learned map gives long vectors, which would come first for all users.
    return [
        (each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1.0)).astype(np.float32) for each in estimates
    ]


def _choose_maps(
    attributes: _CatalogAttributes,
    has_vector: np.ndarray,
    outputs: np.ndarray,
    inputs: np.ndarray,
    earlier: AddedSongs | None,
) -> Maps:
    """Return the maps of `earlier` if its content has the same length, else maps learned on songs in `has_vector`."""
    if earlier is not None and len(earlier.output_map.content_mean) == attributes.content_dim:
        return earlier.output_map, earlier.input_map
    sampled_rows = attributes.sample(np.flatnonzero(has_vector))
    content = attributes.of(sampled_rows)
    return ContentMap.fit(outputs[sampled_rows], content), ContentMap.fit(inputs[sampled_rows], content)


def _distinct_names(catalog: Catalog, column: str) -> pa.Array:
    """Return the distinct values of a string column in the order of `Catalog.codes`; none if the column is missing."""
    if column not in catalog.table.column_names:
        return pa.array([], pa.string())
    return columns.one_array(catalog.table.column(column)).dictionary_encode().dictionary


class _CatalogAttributes:
    """The attributes of the songs of a catalog."""

    def __init__(self, catalog: Catalog, content: Content) -> None:
        self.artists = catalog.codes(columns.ARTIST).astype(np.int64)
        self.albums = catalog.codes(columns.ALBUM).astype(np.int64)
        self._content = content
        self.content_dim = content.dim

    def of(self, rows: np.ndarray) -> SongContent:
        return SongContent(artists=self.artists[rows], albums=self.albums[rows], content=self._content.vectors(rows))

    def near_mask(self, songs: SongContent) -> np.ndarray:
        """bool (N,): the songs of the catalog with the same artists or albums as `songs`."""
        is_near = np.zeros(len(self.artists), dtype=bool)
        for codes, groups in ((self.artists, songs.artists), (self.albums, songs.albums)):
            is_near |= (codes >= 0) & np.isin(codes, groups)
        return is_near

    def sample(self, rows: np.ndarray) -> np.ndarray:
        """Sample about MAP_SONGS song rows, by whole artists, since means over part of an artist are less exact."""
        if len(rows) <= MAP_SONGS:
            return rows
        groups = np.where(self.artists[rows] >= 0, self.artists[rows], -1 - rows)
        group_codes, group_positions = np.unique(groups, return_inverse=True)
        order = np.random.default_rng(0).permutation(len(group_codes))[group_positions]
        return np.sort(rows[np.argsort(order, kind="stable")[:MAP_SONGS]])

    def first_rows(self, codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """int64 (n,): the first song of the catalog with the same code as each song; -1 for songs without a code."""
        groups = np.unique(codes[rows])
        candidates = np.flatnonzero(np.isin(codes, groups))
        group_codes, first_positions = np.unique(codes[candidates], return_index=True)
        if not len(group_codes):
            return np.full(len(rows), -1, dtype=np.int64)
        first_of_group = candidates[first_positions[np.searchsorted(group_codes, codes[rows])]]
        return np.where(codes[rows] >= 0, first_of_group, -1).astype(np.int64)
