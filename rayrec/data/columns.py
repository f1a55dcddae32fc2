"""Column names and Arrow schemas of the canonical data set, spelled in this one place."""

import pyarrow as pa

USER = "user_id"
SONG = "song"  # int32 row of the song in songs.parquet
SONG_ID = "song_id"  # string id of the song outside of rayrec
TITLE = "title"
ARTIST = "artist"
ALBUM = "album"
RELEASED = "released"  # day of release
MARKETS = "markets"  # names of the markets in which a song may be played
SONGS = "songs"
PLAYED_AT = "played_at"  # ms since 1970, UTC
CONTEXTS = "contexts"  # bit i set: the play came from the i-th context of dataset.json
SKIPPED = "skipped"
LIKED = "liked"  # in a row: whether the user likes the song; in a history: the liked songs
LIKED_AT = "liked_at"  # ms since 1970, UTC
IS_PLAY = "is_play"
TOTAL = "total"  # number of all plays of the user, if the history holds only the first of them
PLAYLIST = "playlist_id"
SONG_IDS = "song_ids"  # recommended songs, best first
SCORES = "scores"  # one per song
PROBABILITIES = "probabilities"  # that an explored song is shown; null for other songs

# One play, as every reader of an outside format emits it. `contexts` are names until the set of
# all contexts is known; `source` and `line` say where the row came from. If the data has no times,
# `played_at` is the position in the line until the import replaces it by an assumed time. A row with
# `is_play` false (null means true) and `liked` true is a like without a play.
PLAYS = pa.schema(
    [
        pa.field(USER, pa.string(), nullable=False),
        pa.field(SONG_ID, pa.string(), nullable=False),
        pa.field(PLAYED_AT, pa.int64(), nullable=False),
        pa.field(CONTEXTS, pa.list_(pa.string())),
        pa.field(SKIPPED, pa.bool_()),
        pa.field(LIKED, pa.bool_()),
        pa.field(IS_PLAY, pa.bool_()),
        pa.field(TITLE, pa.string()),
        pa.field(ARTIST, pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
    ]
)

# One entry of a playlist, as readers emit it.
PLAYLIST_ENTRIES = pa.schema(
    [
        pa.field(PLAYLIST, pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
        pa.field(SONG_ID, pa.string(), nullable=False),
        pa.field(TITLE, pa.string()),
        pa.field(ARTIST, pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
    ]
)

# A rejected row, with the reason.
REJECTED = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)

# One row per user; the lists are in the order of time. `contexts`, `skipped`, `liked` and `liked_at`
# exist only if the data has them.
HISTORIES = pa.schema(
    [
        pa.field(USER, pa.string(), nullable=False),
        pa.field(SONGS, pa.list_(pa.int32()), nullable=False),
        pa.field(PLAYED_AT, pa.list_(pa.int64()), nullable=False),
        pa.field(CONTEXTS, pa.list_(pa.int32())),
        pa.field(SKIPPED, pa.list_(pa.bool_())),
        pa.field(LIKED, pa.list_(pa.int32())),
        pa.field(LIKED_AT, pa.list_(pa.int64())),
    ]
)

PLAYLISTS = pa.schema(
    [
        pa.field(PLAYLIST, pa.string(), nullable=False),
        pa.field(SONGS, pa.list_(pa.int32()), nullable=False),
    ]
)

SONGS_TABLE = pa.schema(
    [
        pa.field(SONG, pa.int32(), nullable=False),
        pa.field(SONG_ID, pa.string(), nullable=False),
        pa.field(TITLE, pa.string()),
        pa.field(ARTIST, pa.string()),
    ]
)

# Metadata of songs. A song without a row, or a null, means that it is unknown.
DESCRIPTIONS = pa.schema(
    [
        pa.field(SONG_ID, pa.string(), nullable=False),
        pa.field(TITLE, pa.string()),
        pa.field(ARTIST, pa.string()),
        pa.field(ALBUM, pa.string()),
        pa.field(RELEASED, pa.date32()),
        pa.field(MARKETS, pa.list_(pa.string())),
    ]
)


def one_array(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return a column of a table as one array."""
    if not isinstance(values, pa.ChunkedArray):
        return values
    if values.num_chunks == 1:
        return values.chunk(0)
    return pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
