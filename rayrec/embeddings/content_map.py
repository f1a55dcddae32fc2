"""From what is known of a song without plays, its artist, album and content, to the vector that plays would give it.

N songs, n songs of a call, D numbers per song vector, C per content vector.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from safetensors.numpy import load, save

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # tried: songs that the mean above counts as
PENALTIES = tuple(10.0**power for power in range(-4, 3))  # tried, of squared weights, in mean squares of the inputs
SONGS = 50_000  # that a map is learned on, at most
CHECKED = 5  # one song in so many checks the penalties
SMALLEST_DEVIATION = 1e-6  # of a number of content vectors, below which it says nothing


@dataclass(frozen=True, kw_only=True)
class SongContent:
    """What is known of n songs without their plays."""

    artists: np.ndarray  # int64 (n,), a number of the artist, -1 where it is not known
    albums: np.ndarray  # int64 (n,)
    content: np.ndarray  # float32 (n, C), rows of zeros where there is none; C may be 0

    @property
    def known(self) -> np.ndarray:
        """bool (n,): songs of which anything is known."""
        return np.asarray((self.artists >= 0) | (self.albums >= 0) | self.content.any(axis=1))

    def take(self, rows: np.ndarray) -> SongContent:
        """Some of the songs, int or bool."""
        return SongContent(artists=self.artists[rows], albums=self.albums[rows], content=self.content[rows])


@dataclass(frozen=True, kw_only=True)
class GroupMeans:
    """Sums of the vectors of songs by artist and by album, from which shrunk means come."""

    artists: np.ndarray  # int64 (A,), ascending
    artist_sums: np.ndarray  # float64 (A, D)
    artist_counts: np.ndarray  # int64 (A,)
    albums: np.ndarray  # int64 (B,), ascending
    album_sums: np.ndarray  # float64 (B, D)
    album_counts: np.ndarray  # int64 (B,)

    @classmethod
    def of(cls, vectors: np.ndarray, songs: SongContent) -> GroupMeans:
        """From float32 (n, D) and the groups of the same songs."""
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
        """float64 (n, D): the mean of each song's album, drawn towards that of its artist, and this towards `mean`.

        `strengths`, float64 (2,), say how many songs the priors of artist and album count as. `own`, float32 (n, D),
        are the vectors of the songs where they are in the sums and are to be left out of their own means.
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
    """The expected vector of a song given its artist, album and content.

    It is the shrunk mean of its album and artist, and where it has content a linear correction of it: a ridge
    regression in closed form on the content and the mean. The less is known of a song, the shorter its vector: its
    inner product with a taste vector is then the expected cosine.
    """

    mean: np.ndarray  # float64 (D,), of all songs that the map was learned on
    strengths: np.ndarray  # float64 (2,), songs that the priors of artist and album count as
    content_mean: np.ndarray  # float64 (C,)
    content_scale: np.ndarray  # float64 (C,), 0 for a number that says nothing
    # float64 (C + D + 1, D), of the content, of the mean of the groups, and a constant; 0 rows if C = 0
    weights: np.ndarray
    penalty: float  # of squared weights that predicted the songs held out best
    explained: float  # share of the squared distance to `mean` that is explained, on songs held out

    @classmethod
    def fit(cls, vectors: np.ndarray, songs: SongContent) -> ContentMap:
        """From the vectors of songs, float32 (n, D), and what is known of them without plays.

        Strengths are chosen on each song from the others of its groups, the penalty on one song in five.
        """
        mean = vectors.mean(axis=0, dtype=np.float64) if len(vectors) else np.zeros(vectors.shape[1])
        groups, strengths = GroupMeans.of(vectors, songs), np.array([STRENGTHS[-1], STRENGTHS[-1]])
        for place in range(2):  # the artist's first, with the album's at its largest
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
        checked = np.arange(len(vectors)) % CHECKED == 0  # song rows come in no order
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
            return self  # the content says nothing that artist and album do not
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
        """float32 (n, D): the expected vectors of songs; zeros where nothing is known that tells them from others.

        `groups` are the sums of at least the artists and albums of these songs.
        """
        base = groups.shrunk(songs, self.mean, self.strengths)
        informed = np.isin(songs.artists, groups.artists) | np.isin(songs.albums, groups.albums)
        if len(self.weights):
            with_content = np.flatnonzero(songs.content.any(axis=1))
            base[with_content] += self._inputs(songs.take(with_content), base[with_content]) @ self.weights
            informed[with_content] = True
        return np.where(informed[:, None], base, 0.0).astype(np.float32)

    def to_bytes(self) -> bytes:
        """As safetensors."""
        return bytes(save({item.name: np.atleast_1d(getattr(self, item.name)) for item in fields(self)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> ContentMap:
        """What `to_bytes` made."""
        arrays = load(data)
        penalty, explained = (float(arrays.pop(name)[0]) for name in ("penalty", "explained"))
        return cls(**arrays, penalty=penalty, explained=explained)


def _sums(vectors: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The groups, int64 (G,) ascending, without -1, their sums, float64 (G, D), and their numbers of songs, int64."""
    known = np.flatnonzero(groups >= 0)
    order = known[np.argsort(groups[known], kind="stable")]
    names, first, counts = np.unique(groups[order], return_index=True, return_counts=True)
    if not len(names):
        return names, np.zeros((0, vectors.shape[1])), counts
    return names, np.add.reduceat(vectors[order].astype(np.float64), first, axis=0), counts


def _error(vectors: np.ndarray, expected: np.ndarray | float) -> float:
    """The mean squared distance."""
    return float(np.square(vectors - expected).sum(axis=1).mean()) if len(vectors) else 0.0
