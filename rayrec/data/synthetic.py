"""Generated plays: a planted world whose answers are known, at any size.

The world (ours). Songs belong to artists and artists to genres. A song has a successor in its
artist's album order and another one in a playlist order that runs through its whole genre. A user
has a long-term taste over a few genres. A session starts with a mood, one genre of that taste or
now and then any other, and the mood of each next play is the genre of the play before. Each play
comes from a context, which tends to stay and says how the song was found:

- playlist, album: the successor in that order, with probability `follow`; else as radio
- radio: a song of the mood, by Zipf popularity
- search: a new mood, any genre; a song of it by Zipf popularity
- collection: one of the user's own earlier plays, each as likely

The first play of a session has no song to follow: playlist, album and radio draw from its mood. With `opinions`
each user likes some songs and dislikes as many, which nothing tells but what the user does: a disliked song is
skipped and never comes from the collection again, a liked one is marked as liked when it is played first, and comes
from the collection five times as often. So
the state that decides a play is the taste, the earlier plays and their contexts, and whether the gap
before it starts a session: all but the taste can be read off a history, and `Oracle` computes
from it what a perfect predictor would say.

U users in a block, L plays of the longest history among them, N songs, G genres, C contexts.
"""

# ruff: noqa: SIM905 - lists of words read better as prose

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from pydantic import Field, model_validator
from scipy.special import ndtri

from rayrec.config import Settings
from rayrec.data import columns
from rayrec.data.histories import Histories, Queries, concatenate
from rayrec.data.ragged import offsets_of, ranges

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
ENSEMBLES = (  # one a genre, so that a reader sees in a list of names which songs belong together
    "Quartet Choir Collective Orchestra Brothers Sound System Trio Machine Band Ensemble Sisters Project Family "
    "Society Express Club"
).split()
CONTEXTS = ("playlist", "album", "search", "radio", "collection")
PLAYLIST, ALBUM, SEARCH, RADIO, COLLECTION = range(5)
STAY = np.array([0.85, 0.85, 0.1, 0.85, 0.6])  # probability that the next play of a session has the same context
SWITCH = np.array([0.3, 0.25, 0.15, 0.15, 0.15])  # shares of the contexts where it does not
START = np.array([0.3, 0.15, 0.15, 0.2, 0.2])  # shares of the contexts of a session's first play
TASTE = np.array([0.6, 0.3, 0.1])  # shares of a user's genres, dearest first
LIKED_WEIGHT = 5.0  # of a play of a liked song in a user's collection; that of another is 1, of a disliked one 0
LIKE_AFTER = 1_000  # ms after the play
SKIP_ON_TASTE, SKIP_OFF_TASTE = 0.05, 0.35  # probability of a skip, by whether the genre is in the taste
PLAYS_SIGMA, PLAYS_LIMIT = 0.7, 6  # lognormal spread of the plays of a user, and their limit in means
PLAYLIST_LENGTHS = (10, 40)
PLAYLIST_STEPS = np.array([0.4, 0.3])  # shares of playlist and album steps in a playlist; else a song of the genre
FIRST_MOMENT = 1_704_067_200_000  # 2024-01-01, ms UTC
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000  # ms
SONG_LENGTHS = (2 * MINUTE, 6 * MINUTE)
SKIPPED_AFTER = (5_000, 40_000)  # ms
SESSION_GAP = 30 * MINUTE  # a longer gap starts a session; the world leaves at least an hour
CELLS_PER_BLOCK = 1 << 20  # U × L at once, some 100 MiB of work space
_GOLDEN = 0x9E3779B97F4A7C15
_STREAMS = {"taste": 1, "length": 2, "session": 3, "song": 4, "skip": 5, "time": 6, "playlist": 7, "opinion": 8}


def song_titles(count: int, seed: int) -> np.ndarray:
    """object (count,): titles such as `Velvet Harbour`, all different; after the pairs are used up, `..., Part 2`."""
    pairs = len(FIRST) * len(SECOND)
    order = np.random.default_rng(seed).permutation(pairs)[np.arange(count) % pairs]
    titles = np.array(FIRST, dtype=object)[order // len(SECOND)] + " "
    titles = titles + np.array(SECOND, dtype=object)[order % len(SECOND)]
    return _numbered(titles, np.arange(count) // pairs, ", Part ")


def artist_names(genres: np.ndarray) -> np.ndarray:
    """object (artists,): names such as `Kelimo Quartet`, all different; `genres`, int (artists,), give the last."""
    size = len(SYLLABLES)
    # A step prime to the number of names spreads neighbors apart and still meets every name once.
    number = np.arange(len(genres)) * 7_919 % size**3
    syllables = np.array(SYLLABLES, dtype=object)
    names = syllables[number // size**2] + syllables[number // size % size] + syllables[number % size]
    capital = np.array([name.capitalize() for name in names], dtype=object)
    words = np.array(ENSEMBLES, dtype=object)[genres % len(ENSEMBLES)]
    return _numbered(capital + " " + words, np.arange(len(genres)) // size**3, " ")


def _numbered(names: np.ndarray, repeats: np.ndarray, between: str) -> np.ndarray:
    again = np.array([f"{between}{repeat + 1}" if repeat else "" for repeat in repeats], dtype=object)
    return np.asarray(names + again)


class GenerateConfig(Settings):
    """The size and the character of a generated world."""

    users: int = Field(2_000, ge=1, description="Number of users")
    songs: int = Field(2_000, ge=1, description="Number of songs")
    artists: int = Field(250, ge=1, description="Number of artists, of about equally many songs each")
    genres: int = Field(12, ge=len(TASTE), description="Number of genres, of about equally many artists each")
    plays: float = Field(60.0, ge=1, description="Mean plays per user")
    playlists: int = Field(1_000, ge=0, description="Number of playlists")
    days: float = Field(120.0, gt=0, description="Length of the time range, in days")
    buckets: int = Field(16, ge=1, description="Buckets of users, the unit of work of all later jobs")
    session_plays: float = Field(10.0, ge=1, description="Mean plays per session")
    follow: float = Field(
        0.85, ge=0, le=1, description="Probability that the next song of an album or playlist follows"
    )
    outside: float = Field(
        0.1, ge=0, le=1, description="Probability that a session's genre is outside the user's taste"
    )
    zipf: float = Field(1.0, ge=0, description="Zipf exponent of song popularity within a genre")
    opinions: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Share of the songs that each user likes, and of those that each dislikes: liked songs are marked "
        "and played again more often, disliked ones are skipped and not played again",
    )
    seed: int = Field(0, ge=0, description="Random seed")

    @model_validator(mode="after")
    def _check_sizes(self) -> "GenerateConfig":
        if not self.genres <= self.artists <= self.songs:
            raise ValueError(
                f"genres is {self.genres}, artists {self.artists} and songs {self.songs}; "
                "expected genres <= artists <= songs"
            )
        needed = self.max_plays * (SONG_LENGTHS[1] + 2 * HOUR / self.session_plays) / DAY
        if self.days < needed:
            raise ValueError(
                f"days is {self.days:g}; expected at least {int(needed) + 1} for users with up to {self.max_plays} "
                "plays; give more days or fewer plays"
            )
        return self

    @property
    def max_plays(self) -> int:
        """The longest history that a user can have."""
        return max(1, round(PLAYS_LIMIT * self.plays))


class World:
    """The songs and rules of one config. Users and playlists are made when asked for.

    Each user has random numbers of its own, so any set of users can be made alone, in any order
    and in any number of processes, and has the same plays.
    """

    genre: np.ndarray  # int32 (N,), of each song row
    artist: np.ndarray  # int32 (N,)
    share: np.ndarray  # float64 (N,), Zipf probability of a song among those of its genre
    album_next: np.ndarray  # int32 (N,), the song that follows in the artist's order; the first follows the last
    playlist_next: np.ndarray  # int32 (N,), the same in the genre's playlist order
    song_ms: np.ndarray  # int64 (N,), length of each song
    context_shares: np.ndarray  # float64 (C + 1, C): of the next context, by the last one; row C: a session's first
    genre_shares: np.ndarray  # float64 (G,), how dear the genres are to all users together

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        rng = np.random.default_rng([config.seed, 1])
        count = config.songs
        # Song rows are shuffled, so that a row's number says nothing about its artist or rank.
        place = rng.permutation(count)
        self.artist = (place * config.artists // count).astype(np.int32)
        self.genre = (self.artist * config.genres // config.artists).astype(np.int32)
        self._ranked = np.lexsort((rng.random(count), self.genre)).astype(np.int32)
        self._genre_starts = np.searchsorted(self.genre[self._ranked], np.arange(config.genres + 1))
        self.share, self._cumulative = self._popularity()
        self.album_next = _followers(np.lexsort((place, self.artist)), self.artist)
        self.playlist_next = _followers(np.lexsort((rng.random(count), self.genre)), self.genre)
        self.song_ms = rng.integers(*SONG_LENGTHS, size=count)
        moves = np.diag(STAY) + (1 - STAY)[:, None] * SWITCH
        self.context_shares = np.vstack([moves, START])
        weights = 1 / np.sqrt(1 + rng.permutation(config.genres))
        self.genre_shares = weights / weights.sum()

    def _popularity(self) -> tuple[np.ndarray, np.ndarray]:
        """Each song's share of its genre, and genre + cumulative share in the order of `_ranked`."""
        genre = self.genre[self._ranked]
        weights = (1.0 + np.arange(len(genre)) - self._genre_starts[genre]) ** -self.config.zipf
        weights /= np.add.reduceat(weights, self._genre_starts[:-1])[genre]
        running = np.cumsum(weights)
        share = np.empty(len(genre))
        share[self._ranked] = weights
        return share, running - np.concatenate([[0.0], running])[self._genre_starts[genre]] + genre

    def user_ids(self, users: np.ndarray) -> np.ndarray:
        """object (U,): the ids of users by index, such as `user-000123`."""
        return np.array([f"user-{user:06d}" for user in np.asarray(users).tolist()], dtype=object)

    def user_index(self, user_ids: np.ndarray) -> np.ndarray:
        """int64 (U,): the inverse of `user_ids`."""
        return np.array([int(user_id.removeprefix("user-")) for user_id in user_ids], dtype=np.int64)

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
        """int64 (U, 3): the genres of each user's long-term taste, dearest first; their shares are `TASTE`."""
        keys = _keys(self.config.seed, "taste", users)
        # Gumbel top-k (Vieira 2014): a draw without replacement by genre_shares, all users at once.
        noise = -np.log(-np.log(_uniform(keys[:, None], np.arange(self.config.genres)) + 1e-300))
        return np.asarray(np.argsort(-(np.log(self.genre_shares) + noise), axis=1)[:, : len(TASTE)])

    def collection_weights(self, users: np.ndarray, songs: np.ndarray) -> np.ndarray:
        """float64 (P,): how much a play counts in the collection, for users by index and song rows, int (P,) each.

        0 where the user dislikes the song, 5 where the user likes it, else 1.
        """
        if not self.config.opinions:
            return np.ones(songs.shape)
        keys = _keys(self.config.seed, "opinion", users)
        drawn = (_mix(keys + songs.astype(np.uint64) * np.uint64(_GOLDEN)) >> np.uint64(11)) * 2.0**-53
        liked = np.where(drawn >= 1 - self.config.opinions, LIKED_WEIGHT, 1.0)
        return np.asarray(np.where(drawn < self.config.opinions, 0.0, liked))

    def histories(self, users: np.ndarray) -> Histories:
        """The histories of users by index, int (U,), in that order; every user has at least one play."""
        return concatenate(list(self.blocks(users)))

    def blocks(self, users: np.ndarray, most: int = 5_000) -> Iterator[Histories]:
        """The same, in batches of at most `most` users and of bounded memory."""
        users = np.asarray(users, dtype=np.int64)
        size = max(1, min(most, CELLS_PER_BLOCK // self.config.max_plays))
        for start in range(0, len(users), size):
            yield self._block(users[start : start + size])

    def playlists(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Playlists by index, int (R,): songs int32 (P,) and offsets int64 (R + 1,); each a walk within one genre."""
        keys = _keys(self.config.seed, "playlist", np.asarray(indices, dtype=np.int64))
        low, high = PLAYLIST_LENGTHS
        lengths = (low + _uniform(keys, 0) * (high - low + 1)).astype(np.int64)
        genre = np.searchsorted(np.cumsum(self.genre_shares)[:-1], _uniform(keys, 1), side="right")
        walk = np.zeros((len(keys), high), dtype=np.int32)
        for step in range(high):
            choice = np.searchsorted(np.cumsum(PLAYLIST_STEPS), _uniform(keys, 2 + 2 * step), side="right")
            song = self._draw(genre, _uniform(keys, 3 + 2 * step))
            if step:
                last = walk[:, step - 1]
                song = np.where(choice == 0, self.playlist_next[last], song)
                song = np.where(choice == 1, self.album_next[last], song)
            walk[:, step] = song
        return walk[np.arange(high) < lengths[:, None]], offsets_of(lengths)

    def _draw(self, genre: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """int32: a song of each genre, by its share."""
        at = np.searchsorted(self._cumulative, genre + uniform, side="right")
        return np.asarray(self._ranked[np.minimum(at, self._genre_starts[genre + 1] - 1)])

    def _block(self, users: np.ndarray) -> Histories:
        lengths = self._lengths(users)
        # The longest first: the users who still play at a step are then a slice, not a mask.
        order = np.argsort(-lengths, kind="stable")
        users, lengths = users[order], lengths[order]
        played = np.arange(lengths.max(initial=0)) < lengths[:, None]
        starts = self._session_starts(users, played.shape[1])
        tastes = self.tastes(users)
        songs, contexts = self._songs(users, lengths, starts, tastes)
        skipped = self._skips(users, songs, tastes)
        if self.config.opinions:
            weights = self.collection_weights(np.repeat(users, songs.shape[1]), songs.reshape(-1)).reshape(songs.shape)
            skipped |= weights == 0
        block = Histories(
            user_ids=self.user_ids(users),
            offsets=offsets_of(lengths),
            songs=songs[played],
            played_at=self._times(users, songs, skipped, starts, played)[played],
            contexts=(1 << contexts[played]).astype(np.int32),
            skipped=skipped[played],
        )
        if self.config.opinions:
            block = replace(block, likes=_likes(block, weights[played] == LIKED_WEIGHT))
        return block.take(np.argsort(order))

    def _lengths(self, users: np.ndarray) -> np.ndarray:
        """int64 (U,): plays of each user, lognormal with the configured mean."""
        normal = ndtri(np.clip(_uniform(_keys(self.config.seed, "length", users), 0), 1e-12, None))
        plays = self.config.plays * np.exp(PLAYS_SIGMA * normal - PLAYS_SIGMA**2 / 2)
        return np.asarray(np.clip(np.rint(plays), 1, self.config.max_plays), dtype=np.int64)

    def _session_starts(self, users: np.ndarray, steps: int) -> np.ndarray:
        """bool (U, L): the plays that start a session."""
        keys = _keys(self.config.seed, "session", users)
        starts = _uniform(keys[:, None], np.arange(steps)) < 1 / self.config.session_plays
        starts[:, :1] = True
        return np.asarray(starts)

    def _songs(
        self, users: np.ndarray, lengths: np.ndarray, starts: np.ndarray, tastes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Songs int32 and contexts int64 (U, L), one step of all users at a time; users by length, longest first."""
        keys = _keys(self.config.seed, "song", users)
        shares = np.cumsum(self.context_shares, axis=1)[:, :-1]
        songs = np.zeros(starts.shape, dtype=np.int32)
        contexts = np.zeros(starts.shape, dtype=np.int64)
        collected = np.zeros(starts.shape if self.config.opinions else (0, 0))  # weights of the plays up to each
        for step in range(starts.shape[1]):
            playing = slice(0, int(np.searchsorted(-lengths, -step)))
            start, last = starts[playing, step], songs[playing, step - 1]
            state = np.where(start, len(CONTEXTS), contexts[playing, step - 1])
            draws = [_uniform(keys[playing], 6 * step + channel) for channel in range(6)]
            context = (draws[0][:, None] >= shares[state]).sum(axis=1)
            mood = np.where(start, self._moods(tastes[playing], draws[1], draws[2]), self.genre[last])
            mood = np.where(context == SEARCH, self._any_genre(draws[2]), mood)
            song = self._draw(mood, draws[3])
            following = ~start & (draws[4] < self.config.follow)
            song = np.where(following & (context == ALBUM), self.album_next[last], song)
            song = np.where(following & (context == PLAYLIST), self.playlist_next[last], song)
            if step:
                place, any_left = (draws[5] * step).astype(np.int64), np.ones(len(start), dtype=bool)
                if self.config.opinions:
                    up_to = collected[playing, :step]
                    place = (up_to <= (draws[5] * up_to[:, -1])[:, None]).sum(axis=1)
                    any_left = place < step
                heard = songs[np.arange(len(start)), np.minimum(place, step - 1)]
                song = np.where((context == COLLECTION) & any_left, heard, song)
            songs[playing, step], contexts[playing, step] = song, context
            if self.config.opinions:
                weights = self.collection_weights(users[playing], song)
                collected[playing, step] = weights + (collected[playing, step - 1] if step else 0)
        return songs, contexts

    def _moods(self, tastes: np.ndarray, which: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The genre that a session starts with, from two uniforms per user."""
        outside = which < self.config.outside
        inside = (which - self.config.outside) / max(1 - self.config.outside, 1e-9)
        place = np.searchsorted(np.cumsum(TASTE)[:-1], inside, side="right")
        return np.where(outside, self._any_genre(other), tastes[np.arange(len(tastes)), place])

    def _any_genre(self, uniform: np.ndarray) -> np.ndarray:
        return np.asarray((uniform * self.config.genres).astype(np.int64))

    def _skips(self, users: np.ndarray, songs: np.ndarray, tastes: np.ndarray) -> np.ndarray:
        """bool (U, L)."""
        on_taste = (self.genre[songs][:, :, None] == tastes[:, None, :]).any(axis=2)
        chance = np.where(on_taste, SKIP_ON_TASTE, SKIP_OFF_TASTE)
        keys = _keys(self.config.seed, "skip", users)
        return np.asarray(_uniform(keys[:, None], np.arange(songs.shape[1])) < chance)

    def _times(
        self, users: np.ndarray, songs: np.ndarray, skipped: np.ndarray, starts: np.ndarray, played: np.ndarray
    ) -> np.ndarray:
        """int64 (U, L), ms UTC: a song's length within a session, else an hour and a random share of what is left."""
        keys = _keys(self.config.seed, "time", users)
        most, steps = self.config.max_plays, np.arange(songs.shape[1])
        low, high = SKIPPED_AFTER
        heard = np.where(skipped, low + _uniform(keys[:, None], steps) * (high - low), self.song_ms[songs])
        apart = starts & played & (steps > 0)
        gaps = apart * HOUR + np.concatenate([np.zeros((len(users), 1)), heard[:, :-1]], axis=1).astype(np.int64)
        # Summed in the order of time, so that the padding of a block changes no last digit.
        waits = np.cumsum(apart * -np.log1p(-_uniform(keys[:, None], most + steps)), axis=1)
        first, share = (_uniform(keys, 2 * most + channel) for channel in (0, 1))
        spare = np.maximum(self.config.days * DAY - (gaps * played).sum(axis=1), 0.0)
        # Most users begin early and play until near the end; some come late, some leave.
        first = spare * 0.9 * first**3
        scale = (spare - first) * (1 - share**3) / np.maximum(waits[:, -1], 1e-9)
        return np.asarray(
            FIRST_MOMENT + np.cumsum(gaps, axis=1) + (first[:, None] + waits * scale[:, None]).astype(np.int64)
        )


def _likes(histories: Histories, liked: np.ndarray) -> Histories:
    """A like after the first play of each song that its user likes; `liked`, bool (P,)."""
    keys = histories.rows * (int(histories.songs.max(initial=0)) + 1) + histories.songs
    first: np.ndarray = np.zeros(len(keys), dtype=bool)
    first[np.unique(keys, return_index=True)[1]] = True
    marked = replace(histories, contexts=None, skipped=None).keep(first & liked)
    return replace(marked, played_at=marked.played_at + LIKE_AFTER)


def _followers(order: np.ndarray, group: np.ndarray) -> np.ndarray:
    """int32 (N,): the song after each in `order`, which is sorted by group; a group's last is followed by its first."""
    members = group[order]
    firsts = np.searchsorted(members, members)
    last = np.append(members[1:] != members[:-1], True)
    after = np.where(last, order[firsts], np.roll(order, -1))
    followers = np.empty(len(order), dtype=np.int32)
    followers[order] = after
    return followers


def _keys(seed: int, stream: str, indices: np.ndarray) -> np.ndarray:
    """uint64: the start of each user's (or playlist's) own sequence of random numbers in one stream."""
    world = np.random.SeedSequence([seed, _STREAMS[stream]]).generate_state(1, np.uint64)[0]
    return _mix(_mix(indices.astype(np.uint64)) ^ world)


def _uniform(keys: np.ndarray, counters: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1): number `counters` of each sequence. SplitMix64 (Steele, Lea, Flood 2014), read by counter."""
    steps = np.asarray(counters, dtype=np.uint64).reshape(-1) * np.uint64(_GOLDEN)
    return np.asarray((_mix(keys + (steps if np.ndim(counters) else steps[0])) >> np.uint64(11)) * 2.0**-53)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values + np.uint64(_GOLDEN)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


CHANCES_PER_CHUNK = 1 << 22  # float64 probabilities held at once: 32 MiB


class Oracle:
    """The true probabilities of the next song."""

    def __init__(self, world: World, *, know_contexts: bool = True) -> None:
        self.world = world
        self.know_contexts = know_contexts

    def probabilities(self, histories: Histories, queries: Queries) -> np.ndarray:
        """float32 (Q, N): the probability of each song to be played at the moment of each query."""
        world, config = self.world, self.world.config
        states = _QueryStates(world, histories, queries)
        contexts = self._next_contexts(histories, queries, states.starts)
        heard = _heard(world, histories, queries)
        nothing = _weight_before(world, histories, queries) == 0
        genres = states.moods[:, world.genre] * world.share
        answer = heard.multiply(contexts[:, [COLLECTION]]).toarray()
        # Who has heard nothing yet, or nothing but disliked songs, has no collection: the song comes from the mood.
        from_mood = contexts[:, [PLAYLIST, ALBUM, RADIO]].sum(axis=1)
        from_mood += np.where(nothing, contexts[:, COLLECTION], 0.0)
        followed = np.where(states.starts, 0.0, config.follow)
        rows = np.arange(len(queries))
        for context, successor in ((PLAYLIST, world.playlist_next), (ALBUM, world.album_next)):
            weight = contexts[:, context] * followed
            answer[rows, successor[states.last]] += weight
            from_mood -= weight
        answer += genres * from_mood[:, None]
        answer += contexts[:, [SEARCH]] * (world.share / config.genres)
        return np.asarray(answer, dtype=np.float32)

    def best_recall(self, k: int, users: np.ndarray | None = None, *, first_play: int = 0) -> float:
        """The recall@k that no predictor with this knowledge can pass, over all plays of some users.

        The mean over plays, from each user's `first_play` on, of the k largest probabilities.
        `users`, int (U,), are 200 by default.
        """
        users = np.arange(min(200, self.world.config.users)) if users is None else users
        total, count = 0.0, 0
        for histories in self.world.blocks(users):
            queries = every_play(histories, first_play)
            step = max(1, CHANCES_PER_CHUNK // self.world.config.songs)
            for start in range(0, len(queries), step):
                chance = self.probabilities(histories, queries.take(slice(start, start + step)))
                best = np.partition(chance, -k, axis=1)[:, -k:] if k < chance.shape[1] else chance
                total += float(best.sum(dtype=np.float64))
            count += len(queries)
        return total / max(1, count)

    def _next_contexts(self, histories: Histories, queries: Queries, starts: np.ndarray) -> np.ndarray:
        """float64 (Q, C): the probability of each context for the play to come."""
        if self.know_contexts:
            known = _context_numbers(histories)[_last_play(histories, queries)]
            return np.asarray(self.world.context_shares[np.where(starts, len(CONTEXTS), known)])
        inferred = infer_contexts(self.world, histories)[_last_play(histories, queries)]
        moves, first = self.world.context_shares[:-1], self.world.context_shares[-1]
        return np.asarray(np.where(starts[:, None], first, inferred @ moves))


class _QueryStates:
    """What the rules look at before each query's play."""

    starts: np.ndarray  # bool (Q,), whether it starts a session
    last: np.ndarray  # int32 (Q,), the song before; 0 where there is none
    moods: np.ndarray  # float64 (Q, G), the mood's distribution: the last song's genre, or the taste

    def __init__(self, world: World, histories: Histories, queries: Queries) -> None:
        before = _last_play(histories, queries)
        none = queries.seen == 0
        self.starts = none | (queries.at - histories.played_at[before] >= SESSION_GAP)
        self.last = np.where(none, 0, histories.songs[before])
        config = world.config
        tastes = world.tastes(world.user_index(histories.user_ids))[queries.rows]
        self.moods = np.full((len(queries), config.genres), config.outside / config.genres)
        np.put_along_axis(self.moods, tastes, self.moods[:, :1] + (1 - config.outside) * TASTE, axis=1)
        following = np.flatnonzero(~self.starts)
        self.moods[following] = 0.0
        self.moods[following, world.genre[self.last[following]]] = 1.0


def every_play(histories: Histories, first_play: int = 0) -> Queries:
    """One query before every play, from each user's `first_play` on."""
    place = np.arange(histories.num_plays) - histories.offsets[histories.rows]
    return Queries.before_plays(histories, np.flatnonzero(place >= first_play))


def infer_contexts(world: World, histories: Histories) -> np.ndarray:
    """float64 (P, C): the probability of each play's context, given the songs up to and with that play.

    The forward pass of a hidden Markov model (Rabiner 1989): contexts are hidden, songs observed.
    """
    queries = every_play(histories)
    states = _QueryStates(world, histories, queries)
    likely = _likelihoods(world, histories, queries, states)
    moves, first = world.context_shares[:-1], world.context_shares[-1]
    inferred = np.zeros((histories.num_plays, len(CONTEXTS)))
    for step in range(histories.lengths.max(initial=0)):
        plays = histories.offsets[:-1][histories.lengths > step] + step
        before = np.where(states.starts[plays, None], first, inferred[plays - (step > 0)] @ moves)
        joint = before * likely[plays]
        inferred[plays] = joint / joint.sum(axis=1, keepdims=True)
    return inferred


def _likelihoods(world: World, histories: Histories, queries: Queries, states: _QueryStates) -> np.ndarray:
    """float64 (P, C): the probability of each played song, had it come from each context."""
    songs = histories.songs
    share, genre = world.share[songs], world.genre[songs]
    likely = np.empty((len(songs), len(CONTEXTS)))
    likely[:, RADIO] = states.moods[np.arange(len(songs)), genre] * share
    likely[:, SEARCH] = share / world.config.genres
    for context, successor in ((PLAYLIST, world.playlist_next), (ALBUM, world.album_next)):
        follow = np.where(states.starts, 0.0, world.config.follow)
        likely[:, context] = follow * (successor[states.last] == songs) + (1 - follow) * likely[:, RADIO]
    before = _weight_before(world, histories, queries)
    earlier = _earlier_plays_of_song(histories) * _weights(world, histories)
    likely[:, COLLECTION] = np.where(before == 0, likely[:, RADIO], earlier / np.where(before == 0, 1, before))
    return likely


def _weights(world: World, histories: Histories) -> np.ndarray:
    """float64 (P,): how much each play counts in its user's collection."""
    return world.collection_weights(world.user_index(histories.user_ids)[histories.rows], histories.songs)


def _weight_before(world: World, histories: Histories, queries: Queries) -> np.ndarray:
    """float64 (Q,): of the plays before each query together."""
    sums = np.concatenate([[0], np.cumsum(_weights(world, histories))])
    starts = histories.offsets[queries.rows]
    return np.asarray(sums[starts + queries.seen] - sums[starts])


def _earlier_plays_of_song(histories: Histories) -> np.ndarray:
    """int64 (P,): how often the user had played the song before each play."""
    keys = histories.rows * (int(histories.songs.max(initial=0)) + 1) + histories.songs
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    counts = np.empty(len(keys), dtype=np.int64)
    counts[order] = np.arange(len(keys)) - np.searchsorted(ranked, ranked)
    return counts


def _last_play(histories: Histories, queries: Queries) -> np.ndarray:
    """int64 (Q,): position of the play before each query in the flat arrays; where there is none, of some play."""
    return np.asarray(np.maximum(histories.offsets[queries.rows] + queries.seen - 1, 0))


def _context_numbers(histories: Histories) -> np.ndarray:
    if histories.contexts is None:
        raise ValueError("an oracle that knows contexts was given histories without contexts")
    return np.asarray(np.log2(histories.contexts), dtype=np.int64)


def _heard(world: World, histories: Histories, queries: Queries) -> sp.csr_array:
    """float64 (Q, N), sparse: each song's share of the collection before each query."""
    starts = histories.offsets[queries.rows]
    offsets = offsets_of(queries.seen)
    plays = ranges(starts, queries.seen)
    before = _weight_before(world, histories, queries)
    weights = _weights(world, histories)[plays] * np.repeat(1 / np.where(before == 0, 1, before), queries.seen)
    shape = (len(queries), world.config.songs)
    return sp.csr_array((weights, histories.songs[plays], offsets), shape=shape)
