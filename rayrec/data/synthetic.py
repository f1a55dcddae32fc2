"""Generated plays of any number, by rules from which the true probability of each next song is known.

The world (ours). Songs belong to artists, and artists to genres. A song has one successor in the album order of its
artist, and another one in a playlist order that runs through its whole genre. A user has a long-term taste for a few
genres. A session starts with a mood: one genre of that taste or, sometimes, any genre. The mood of each next play is
the genre of the previous play. Each play has a context, which says how the song was found and often stays the same for
the next play:

- playlist, album: the successor in that order, with probability `follow`; otherwise as in radio
- radio: a song of the mood, by Zipf popularity
- search: a new mood, any genre; a song of it by Zipf popularity
- collection: one of the user's own earlier plays, all equally likely

The first play of a session follows no song: playlist, album and radio draw a song of its mood. With `opinions`, each
user likes some songs and dislikes equally many. Only the user's actions show it: a disliked song is skipped and never
drawn from the collection; a liked song is marked as liked when it is first played, and is drawn from the collection
five times as often.

A play thus depends on the taste, on the earlier plays and their contexts, and on whether the gap before it starts a
session. All of these but the taste can be read from a history. tests/oracle.py computes from them the probabilities
that a perfect predictor would give.

U users in a block, L plays of the longest history among them, N songs, G genres, C contexts.
"""

# ruff: noqa: SIM905 - lists of words read better as prose

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from scipy.special import ndtri

from rayrec.config import Settings
from rayrec.data import columns
from rayrec.data.histories import GOLDEN_STEP, Histories, concatenate, mix_bits, uniform_draws
from rayrec.data.ragged import offsets_of

FIRST = (
    "Amber Blue Broken Burning Coastal Crooked Distant Drifting Electric Empty Endless Fading Foreign Frozen Gentle "
    "Golden Hidden Hollow Honest Hungry Invisible Lazy Lonely Lost Lucky Midnight Morning Naked Northern Paper "
    "Quiet Restless Rolling Secret Silver Sleeping Southern Stolen Summer Velvet Wandering Winter"
).split()
SECOND = (
    "Avenue Bridges Carousel Cathedral Circles Compass Curtains Diamonds Engine Feathers Fever Fires Garden Gravity "
    "Harbour Highway Horses Island Kites Lanterns Letters Machine Mirrors Mountains Ocean Orchard Promises Radio "
    "Rain Rivers Rooms Satellites Shadows Signals Stairs Stations Strangers Telephones Tides Trains Umbrellas "
    "Weather Windows"
).split()
SYLLABLES = "ba de fi go ha ja ke li mo na or pa qui ra sa to ul va we xi ya zo".split()
ENSEMBLES = (  # one per genre, so that a list of names shows which songs belong together
    "Quartet Choir Collective Orchestra Brothers Sound System Trio Machine Band Ensemble Sisters Project Family "
    "Society Express Club"
).split()
CONTEXTS = ("playlist", "album", "search", "radio", "collection")
PLAYLIST, ALBUM, SEARCH, RADIO, COLLECTION = range(5)
STAY = np.array([0.85, 0.85, 0.1, 0.85, 0.6])  # probability that the next play of a session has the same context
SWITCH = np.array([0.3, 0.25, 0.15, 0.15, 0.15])  # otherwise the next context is drawn with these shares
START = np.array([0.3, 0.15, 0.15, 0.2, 0.2])  # shares of the contexts of a session's first play
TASTE = np.array([0.6, 0.3, 0.1])  # shares of a user's genres, favorite first
LIKED_WEIGHT = 5.0  # weight in a user's collection of a play of a liked song; of a disliked song 0, of others 1
LIKE_AFTER = 1_000  # ms from a play to the like
SKIP_ON_TASTE, SKIP_OFF_TASTE = 0.05, 0.35  # probability of a skip, by whether the genre is in the taste
PLAYS_SIGMA, PLAYS_LIMIT = 0.7, 6  # lognormal sigma of the plays per user, and their maximum in multiples of the mean
PLAYLIST_LENGTHS = (10, 40)
PLAYLIST_STEPS = np.array([0.4, 0.3])  # shares of playlist and album successors in a playlist; others: any of the genre
FIRST_MOMENT = 1_704_067_200_000  # 2024-01-01, ms UTC
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000  # ms
SONG_LENGTHS = (2 * MINUTE, 6 * MINUTE)
SKIPPED_AFTER = (5_000, 40_000)  # ms from the start of a song to its skip
CELLS_PER_BLOCK = 1 << 20  # maximum U × L of a block, about 100 MiB of working memory
_STREAMS = {"taste": 1, "length": 2, "session": 3, "song": 4, "skip": 5, "time": 6, "playlist": 7, "opinion": 8}


def song_titles(count: int, seed: int) -> np.ndarray:
    """object (count,): different titles such as `Velvet Harbour`; once all pairs are used, with `, Part 2` added."""
    pair_count = len(FIRST) * len(SECOND)
    order = np.random.default_rng(seed).permutation(pair_count)[np.arange(count) % pair_count]
    titles = np.array(FIRST, dtype=object)[order // len(SECOND)] + " "
    titles = titles + np.array(SECOND, dtype=object)[order % len(SECOND)]
    return _with_numbers(titles, np.arange(count) // pair_count, ", Part ")


def artist_names(genres: np.ndarray) -> np.ndarray:
    """object (artists,): different names such as `Kelimo Quartet`; `genres`, int (artists,), decide the last word."""
    size = len(SYLLABLES)
    # A step that is coprime to the number of names makes neighbors differ and still uses every name once.
    numbers = np.arange(len(genres)) * 7_919 % size**3
    syllables = np.array(SYLLABLES, dtype=object)
    names = syllables[numbers // size**2] + syllables[numbers // size % size] + syllables[numbers % size]
    capitalized = np.array([name.capitalize() for name in names], dtype=object)
    last_words = np.array(ENSEMBLES, dtype=object)[genres % len(ENSEMBLES)]
    return _with_numbers(capitalized + " " + last_words, np.arange(len(genres)) // size**3, " ")


def _with_numbers(names: np.ndarray, repeats: np.ndarray, separator: str) -> np.ndarray:
    suffixes = np.array([f"{separator}{repeat + 1}" if repeat else "" for repeat in repeats], dtype=object)
    return np.asarray(names + suffixes)


class GenerateConfig(Settings):
    """The size of generated data and the rules of its plays."""

    users: int = Field(2_000, ge=1, description="Number of users")
    songs: int = Field(2_000, ge=1, description="Number of songs")
    artists: int = Field(250, ge=1, description="Number of artists, each with about the same number of songs")
    genres: int = Field(12, ge=len(TASTE), description="Number of genres, each with about the same number of artists")
    plays: float = Field(60.0, ge=1, description="Mean plays per user")
    playlists: int = Field(1_000, ge=0, description="Number of playlists")
    days: float = Field(120.0, gt=0, description="Length of the time range, in days")
    buckets: int = Field(16, ge=1, description="Number of buckets of users; later jobs process one bucket at a time")
    session_plays: float = Field(10.0, ge=1, description="Mean plays per session")
    follow: float = Field(
        0.85, ge=0, le=1, description="Probability that a song of an album or playlist is followed by the next one"
    )
    outside: float = Field(
        0.1, ge=0, le=1, description="Probability that a session's genre is outside the user's taste"
    )
    zipf: float = Field(1.0, ge=0, description="Zipf exponent of song popularity within a genre")
    opinions: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Share of songs that each user likes, and the same share that each user dislikes; liked songs are "
        "marked as liked and played again more often, disliked songs are skipped and not played again",
    )
    seed: int = Field(0, ge=0, description="Random seed")

    @model_validator(mode="after")
    def _check_sizes(self) -> "GenerateConfig":
        if not self.genres <= self.artists <= self.songs:
            raise ValueError(
                f"genres is {self.genres}, artists {self.artists} and songs {self.songs}; "
                "expected genres <= artists <= songs"
            )
        needed_days = self.max_plays * (SONG_LENGTHS[1] + 2 * HOUR / self.session_plays) / DAY
        if self.days < needed_days:
            raise ValueError(
                f"days is {self.days:g}; expected at least {int(needed_days) + 1} for users with up to "
                f"{self.max_plays} plays; give more days or fewer plays"
            )
        return self

    @property
    def max_plays(self) -> int:
        """The longest history that a user can have."""
        return max(1, round(PLAYS_LIMIT * self.plays))


class World:
    """The songs and rules of one config. Users and playlists are generated on request.

    Each user has separate random numbers, so that any set of users can be generated alone, in any order
    and in any number of processes, and always has the same plays.
    """

    genre: np.ndarray  # int32 (N,), genre of each song row
    artist: np.ndarray  # int32 (N,), artist of each song row
    share: np.ndarray  # float64 (N,), Zipf probability of a song among the songs of its genre
    album_next: np.ndarray  # int32 (N,), the song that follows in the artist's order; the first follows the last
    playlist_next: np.ndarray  # int32 (N,), the same in the genre's playlist order
    song_ms: np.ndarray  # int64 (N,), length of each song
    context_shares: np.ndarray  # float64 (C + 1, C): next context given the last one; row C: a session's first context
    genre_shares: np.ndarray  # float64 (G,), popularity of each genre over all users

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        rng = np.random.default_rng([config.seed, 1])
        count = config.songs
        # Song rows are shuffled, so that a row's number says nothing about its artist or rank.
        positions = rng.permutation(count)
        self.artist = (positions * config.artists // count).astype(np.int32)
        self.genre = (self.artist * config.genres // config.artists).astype(np.int32)
        self._songs_by_rank = np.lexsort((rng.random(count), self.genre)).astype(np.int32)
        self._genre_starts = np.searchsorted(self.genre[self._songs_by_rank], np.arange(config.genres + 1))
        self.share, self._cumulative_shares = self._popularity()
        self.album_next = _successors(np.lexsort((positions, self.artist)), self.artist)
        self.playlist_next = _successors(np.lexsort((rng.random(count), self.genre)), self.genre)
        self.song_ms = rng.integers(*SONG_LENGTHS, size=count)
        transitions = np.diag(STAY) + (1 - STAY)[:, None] * SWITCH
        self.context_shares = np.vstack([transitions, START])
        weights = 1 / np.sqrt(1 + rng.permutation(config.genres))
        self.genre_shares = weights / weights.sum()

    def _popularity(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each song's share of its genre, and genre + cumulative share in the order of `_ranked`."""
        genre = self.genre[self._songs_by_rank]
        weights = (1.0 + np.arange(len(genre)) - self._genre_starts[genre]) ** -self.config.zipf
        weights /= np.add.reduceat(weights, self._genre_starts[:-1])[genre]
        cumulative = np.cumsum(weights)
        share = np.empty(len(genre))
        share[self._songs_by_rank] = weights
        return share, cumulative - np.concatenate([[0.0], cumulative])[self._genre_starts[genre]] + genre

    def user_ids(self, users: np.ndarray) -> np.ndarray:
        """object (U,): the ids of users by index, such as `user-000123`."""
        return np.array([f"user-{user:06d}" for user in np.asarray(users).tolist()], dtype=object)

    def songs_table(self) -> pa.Table:
        """The song table, columns.SONGS_TABLE."""
        count = self.config.songs
        genre_of_artist = np.arange(self.config.artists) * self.config.genres // self.config.artists
        data = {
            columns.SONG: pa.array(np.arange(count, dtype=np.int32)),
            columns.SONG_ID: pa.array([f"song-{song:06d}" for song in range(count)]),
            columns.TITLE: pa.array(song_titles(count, self.config.seed)),
            columns.ARTIST: pa.array(artist_names(genre_of_artist)[self.artist]),
        }
        return pa.table(data, schema=columns.SONGS_TABLE)

    def tastes(self, users: np.ndarray) -> np.ndarray:
        """int64 (U, 3): the genres of each user's long-term taste, favorite first; their shares are `TASTE`."""
        keys = _keys(self.config.seed, "taste", users)
        # Gumbel top-k (Vieira 2014): a draw without replacement by genre_shares, all users at once.
        noise = -np.log(-np.log(_uniform(keys[:, None], np.arange(self.config.genres)) + 1e-300))
        return np.asarray(np.argsort(-(np.log(self.genre_shares) + noise), axis=1)[:, : len(TASTE)])

    def collection_weights(self, users: np.ndarray, songs: np.ndarray) -> np.ndarray:
        """float64 (P,): the weight of each play in its user's collection; user indices and song rows are int (P,).

        0 if the user dislikes the song, 5 if the user likes it, otherwise 1.
        """
        if not self.config.opinions:
            return np.ones(songs.shape)
        keys = _keys(self.config.seed, "opinion", users)
        draws = uniform_draws(keys, songs + 1)
        weights = np.where(draws >= 1 - self.config.opinions, LIKED_WEIGHT, 1.0)
        return np.asarray(np.where(draws < self.config.opinions, 0.0, weights))

    def histories(self, users: np.ndarray) -> Histories:
        """Return the histories of users by index, int (U,), in that order; every user has at least one play."""
        return concatenate(list(self.blocks(users)))

    def blocks(self, users: np.ndarray, most: int = 5_000) -> Iterator[Histories]:
        """Yield the result of `histories` in batches of at most `most` users and of bounded memory."""
        users = np.asarray(users, dtype=np.int64)
        size = max(1, min(most, CELLS_PER_BLOCK // self.config.max_plays))
        for start in range(0, len(users), size):
            yield self._generate_block(users[start : start + size])

    def playlists(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return playlists by index, int (R,), each within one genre: songs int32 (P,) and offsets int64 (R + 1,)."""
        keys = _keys(self.config.seed, "playlist", np.asarray(indices, dtype=np.int64))
        min_length, max_length = PLAYLIST_LENGTHS
        lengths = (min_length + _uniform(keys, 0) * (max_length - min_length + 1)).astype(np.int64)
        genre = np.searchsorted(np.cumsum(self.genre_shares)[:-1], _uniform(keys, 1), side="right")
        songs = np.zeros((len(keys), max_length), dtype=np.int32)
        for step in range(max_length):
            choices = np.searchsorted(np.cumsum(PLAYLIST_STEPS), _uniform(keys, 2 + 2 * step), side="right")
            song = self._draw_songs(genre, _uniform(keys, 3 + 2 * step))
            if step:
                last_songs = songs[:, step - 1]
                song = np.where(choices == 0, self.playlist_next[last_songs], song)
                song = np.where(choices == 1, self.album_next[last_songs], song)
            songs[:, step] = song
        return songs[np.arange(max_length) < lengths[:, None]], offsets_of(lengths)

    def _draw_songs(self, genre: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """int32: one song of each value of `genre`, drawn by its share with a random number of `uniform`."""
        positions = np.searchsorted(self._cumulative_shares, genre + uniform, side="right")
        return np.asarray(self._songs_by_rank[np.minimum(positions, self._genre_starts[genre + 1] - 1)])

    def _generate_block(self, users: np.ndarray) -> Histories:
        lengths = self._lengths(users)
        # Longest history first, so that the users who still play at a step are a slice.
        order = np.argsort(-lengths, kind="stable")
        users, lengths = users[order], lengths[order]
        is_played = np.arange(lengths.max(initial=0)) < lengths[:, None]
        session_starts = self._session_starts(users, is_played.shape[1])
        tastes = self.tastes(users)
        songs, contexts = self._songs_and_contexts(users, lengths, session_starts, tastes)
        is_skipped = self._is_skipped(users, songs, tastes)
        if self.config.opinions:
            weights = self.collection_weights(np.repeat(users, songs.shape[1]), songs.reshape(-1)).reshape(songs.shape)
            is_skipped |= weights == 0
        block = Histories(
            user_ids=self.user_ids(users),
            offsets=offsets_of(lengths),
            songs=songs[is_played],
            played_at=self._play_times(users, songs, is_skipped, session_starts, is_played)[is_played],
            contexts=(1 << contexts[is_played]).astype(np.int32),
            skipped=is_skipped[is_played],
        )
        if self.config.opinions:
            block = replace(block, likes=_likes(block, weights[is_played] == LIKED_WEIGHT))
        return block.take(np.argsort(order))

    def _lengths(self, users: np.ndarray) -> np.ndarray:
        """int64 (U,): number of plays of each user, lognormal with the configured mean."""
        normal = ndtri(np.clip(_uniform(_keys(self.config.seed, "length", users), 0), 1e-12, None))
        plays = self.config.plays * np.exp(PLAYS_SIGMA * normal - PLAYS_SIGMA**2 / 2)
        return np.asarray(np.clip(np.rint(plays), 1, self.config.max_plays), dtype=np.int64)

    def _session_starts(self, users: np.ndarray, steps: int) -> np.ndarray:
        """bool (U, L): the plays that start a session."""
        keys = _keys(self.config.seed, "session", users)
        starts = _uniform(keys[:, None], np.arange(steps)) < 1 / self.config.session_plays
        starts[:, :1] = True
        return np.asarray(starts)

    def _songs_and_contexts(
        self, users: np.ndarray, lengths: np.ndarray, session_starts: np.ndarray, tastes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return songs int32 and contexts int64 (U, L), computed step by step for all users, longest history first."""
        keys = _keys(self.config.seed, "song", users)
        cumulative_shares = np.cumsum(self.context_shares, axis=1)[:, :-1]
        songs = np.zeros(session_starts.shape, dtype=np.int32)
        contexts = np.zeros(session_starts.shape, dtype=np.int64)
        # Cumulative weights of the plays.
        weight_sums = np.zeros(session_starts.shape if self.config.opinions else (0, 0))
        for step in range(session_starts.shape[1]):
            active = slice(0, int(np.searchsorted(-lengths, -step)))
            starts_session, last_songs = session_starts[active, step], songs[active, step - 1]
            state = np.where(starts_session, len(CONTEXTS), contexts[active, step - 1])
            draws = [_uniform(keys[active], 6 * step + channel) for channel in range(6)]
            context = (draws[0][:, None] >= cumulative_shares[state]).sum(axis=1)
            mood = np.where(
                starts_session, self._session_moods(tastes[active], draws[1], draws[2]), self.genre[last_songs]
            )
            mood = np.where(context == SEARCH, self._random_genre(draws[2]), mood)
            song = self._draw_songs(mood, draws[3])
            is_successor = ~starts_session & (draws[4] < self.config.follow)
            song = np.where(is_successor & (context == ALBUM), self.album_next[last_songs], song)
            song = np.where(is_successor & (context == PLAYLIST), self.playlist_next[last_songs], song)
            if step:
                positions, has_collection = (draws[5] * step).astype(np.int64), np.ones(len(starts_session), dtype=bool)
                if self.config.opinions:
                    earlier_sums = weight_sums[active, :step]
                    positions = (earlier_sums <= (draws[5] * earlier_sums[:, -1])[:, None]).sum(axis=1)
                    has_collection = positions < step
                collection_songs = songs[np.arange(len(starts_session)), np.minimum(positions, step - 1)]
                song = np.where((context == COLLECTION) & has_collection, collection_songs, song)
            songs[active, step], contexts[active, step] = song, context
            if self.config.opinions:
                weights = self.collection_weights(users[active], song)
                weight_sums[active, step] = weights + (weight_sums[active, step - 1] if step else 0)
        return songs, contexts

    def _session_moods(self, tastes: np.ndarray, outside_draws: np.ndarray, genre_draws: np.ndarray) -> np.ndarray:
        """Return the genre that each user's session starts with, from two uniform random numbers per user."""
        is_outside = outside_draws < self.config.outside
        taste_draws = (outside_draws - self.config.outside) / max(1 - self.config.outside, 1e-9)
        taste_indices = np.searchsorted(np.cumsum(TASTE)[:-1], taste_draws, side="right")
        return np.where(is_outside, self._random_genre(genre_draws), tastes[np.arange(len(tastes)), taste_indices])

    def _random_genre(self, uniform: np.ndarray) -> np.ndarray:
        return np.asarray((uniform * self.config.genres).astype(np.int64))

    def _is_skipped(self, users: np.ndarray, songs: np.ndarray, tastes: np.ndarray) -> np.ndarray:
        """bool (U, L): the plays that are skipped."""
        is_on_taste = (self.genre[songs][:, :, None] == tastes[:, None, :]).any(axis=2)
        probabilities = np.where(is_on_taste, SKIP_ON_TASTE, SKIP_OFF_TASTE)
        keys = _keys(self.config.seed, "skip", users)
        return np.asarray(_uniform(keys[:, None], np.arange(songs.shape[1])) < probabilities)

    def _play_times(
        self,
        users: np.ndarray,
        songs: np.ndarray,
        is_skipped: np.ndarray,
        session_starts: np.ndarray,
        is_played: np.ndarray,
    ) -> np.ndarray:
        """int64 (U, L): the time of each play, ms UTC.

        A play starts when the song before it ends or is skipped. Before a new session there are another hour and a
        random share of the time that the plays of the user leave free.
        """
        keys = _keys(self.config.seed, "time", users)
        max_plays, steps = self.config.max_plays, np.arange(songs.shape[1])
        min_ms, max_ms = SKIPPED_AFTER
        listened_ms = np.where(
            is_skipped, min_ms + _uniform(keys[:, None], steps) * (max_ms - min_ms), self.song_ms[songs]
        )
        is_new_session = session_starts & is_played & (steps > 0)
        gaps = is_new_session * HOUR + np.concatenate([np.zeros((len(users), 1)), listened_ms[:, :-1]], axis=1).astype(
            np.int64
        )
        # A cumulative sum adds in the order of time, so that the padding of a block does not change the rounding.
        waits = np.cumsum(is_new_session * -np.log1p(-_uniform(keys[:, None], max_plays + steps)), axis=1)
        delay, unused_share = (_uniform(keys, 2 * max_plays + channel) for channel in (0, 1))
        spare_ms = np.maximum(self.config.days * DAY - (gaps * is_played).sum(axis=1), 0.0)
        # Most users begin early and play until near the end; some come late, some leave.
        delay = spare_ms * 0.9 * delay**3
        scale = (spare_ms - delay) * (1 - unused_share**3) / np.maximum(waits[:, -1], 1e-9)
        return np.asarray(
            FIRST_MOMENT + np.cumsum(gaps, axis=1) + (delay[:, None] + waits * scale[:, None]).astype(np.int64)
        )


def _likes(histories: Histories, is_liked: np.ndarray) -> Histories:
    """Return a like after each user's first play of each liked song; `is_liked`, bool (P,): plays of such songs."""
    keys = histories.rows * (int(histories.songs.max(initial=0)) + 1) + histories.songs
    is_first: np.ndarray = np.zeros(len(keys), dtype=bool)
    is_first[np.unique(keys, return_index=True)[1]] = True
    likes = replace(histories, contexts=None, skipped=None).keep(is_first & is_liked)
    return replace(likes, played_at=likes.played_at + LIKE_AFTER)


def _successors(order: np.ndarray, group: np.ndarray) -> np.ndarray:
    """int32 (N,): the song after each song in `order`, which is sorted by group; a group's first follows its last."""
    ordered_groups = group[order]
    group_starts = np.searchsorted(ordered_groups, ordered_groups)
    is_last = np.append(ordered_groups[1:] != ordered_groups[:-1], True)
    next_songs = np.where(is_last, order[group_starts], np.roll(order, -1))
    successors = np.empty(len(order), dtype=np.int32)
    successors[order] = next_songs
    return successors


def _keys(seed: int, stream: str, indices: np.ndarray) -> np.ndarray:
    """uint64: the start of the separate random sequence of each user (or playlist) in one stream."""
    stream_seed = np.random.SeedSequence([seed, _STREAMS[stream]]).generate_state(1, np.uint64)[0]
    starts = mix_bits(indices.astype(np.uint64) + GOLDEN_STEP) ^ stream_seed
    return mix_bits(starts + GOLDEN_STEP)


def _uniform(keys: np.ndarray, counters: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1): the numbers at positions `counters`, from 0, of each sequence."""
    return uniform_draws(keys, np.atleast_1d(counters) + 1)
