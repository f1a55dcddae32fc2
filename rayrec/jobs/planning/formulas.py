"""What stages ask of object storage and leave there; tests/unit/jobs/planning/test_formulas.py compares it with counts.

A request is what object storage charges for: asking for a file's size (which opening one does), a read of a range, a
write, a listing, a deletion; renaming is two.
"""

from dataclasses import dataclass

from rayrec.importing.import_plan import bucket_groups
from rayrec.importing.vocabulary import key_ranges

ROW_BYTES = 8.6  # of a play in the shuffle of an import, in blocks of 9,500 plays; docs/scale.md
SONG_BYTES = 9.0  # of a distinct song of a piece in the shuffle, with ids of 12 characters; docs/scale.md
INPUT_BLOCK = 16 << 20  # bytes of input that are read at once
UNIT_REQUESTS = 3  # of a unit of input beside its blocks: its size, and both ends of its range
SMALL_PARQUET = 4  # to read a small Parquet file: its size, its end, its columns
TASTE_REQUESTS = 26  # of `taste` beside its buckets: manifests, listings, the model, which results are current
HISTORY_BYTES = 8.5  # of a play in the data set, with id and time; contexts and skips add about 1
STORED_SONG_BYTES = 10.0  # of a song in songs.parquet with an id of 12 characters
DESCRIBED_SONG_BYTES = 40.0  # the same with title and artist
STORED_FLOAT_BYTES = 5.2  # of a number in the Parquet lists of tastes: 1,314 bytes for 256 measured on 2026-11-24
HEARD_BYTES = 3.0  # of a distinct song in a row of tastes, measured on 2026-11-24
NEW_SONG_SHARE = 0.85  # of a user's plays that are songs not heard before, measured 0.83 on 2026-11-24
ROW_BYTES_OF_TASTES = 40.0  # of a row of tastes beside its lists
DRIVER_REQUESTS = 25  # of an import, whatever its size
EMBED_REQUESTS = 30  # of `embed` beside its passes
TRAIN_REQUESTS = 95  # of `train` beside its passes: embeddings, checkpoints, the model
RANK_REQUESTS = 51  # of `rank` beside its buckets: network, retrieval, the rankers
RANK_BUCKET_REQUESTS = 4  # of a bucket beside its histories: is it there, its examples written and read
EVALUATE_REQUESTS = 220  # of `evaluate` beside its passes: two recommenders, the report
EVALUATE_PASSES = 3  # over the histories, where two-step and the network alone are compared
RECOMMEND_REQUESTS = 78  # of `recommend --all` beside its buckets: the recommender
STATE_BYTES = 310.0  # of a user in the store of states beside network and plays
STORED_PLAY_BYTES = 5.2  # of a play in the store of states, compressed
RECOMMENDED_SONG_BYTES = 11.0  # of a song in a row of recommendations: id of 12 characters and score
INDEX_REQUESTS = 16  # of `index`, whatever its size
RETRIEVAL_REQUESTS = 10  # of `retrieval` beside its fits: manifests, listings
FIT_REQUESTS = 105  # of a fit of a retrieval beside its groups and ranges: the arrays, their checksums


@dataclass(frozen=True, kw_only=True)
class ImportSize:
    """How an import is cut up."""

    pieces: int
    buckets: int

    @property
    def shuffle_reads(self) -> int:
        """Ranges that the second pass reads: one of each piece for each group of buckets."""
        return self.pieces * len(bucket_groups(self.pieces, self.buckets))

    @property
    def song_reads(self) -> int:
        """Ranges that the vocabulary reads: one of each piece for each range of keys."""
        return self.pieces * key_ranges(self.buckets)


def input_requests(input_bytes: int, unit_bytes: int) -> int:
    """To read text files of so many bytes, in units of so many."""
    units = -(-input_bytes // unit_bytes)
    return int(units * UNIT_REQUESTS + units * -(-min(unit_bytes, input_bytes) // INPUT_BLOCK))


def import_requests(size: ImportSize) -> int:
    """Of an import of plays without least counts, beside reading the files."""
    first_pass = 3 * size.pieces  # rows, songs, result
    songs = 2 * size.song_reads + key_ranges(size.buckets) * (1 + SMALL_PARQUET)
    second_pass = 2 * size.shuffle_reads + 3 * size.buckets  # histories, users, result
    publishing = 2 * 2 * size.buckets
    return first_pass + songs + second_pass + publishing + DRIVER_REQUESTS


def append_requests(size: ImportSize, overlapping_files: int) -> int:
    """Of `import --append`, beside reading the files.

    `overlapping_files` are those, over all buckets, of earlier parts whose time range meets the new plays'.
    """
    users = SMALL_PARQUET * size.buckets
    return import_requests(size) + users + SMALL_PARQUET * overlapping_files


def shuffle_bytes(plays: int, songs_of_pieces: int) -> int:
    """Bytes that an import reads beside its input. `songs_of_pieces` are the distinct songs of each piece, added up."""
    return int(plays * ROW_BYTES + songs_of_pieces * SONG_BYTES)


def taste_requests(buckets: int, files: int, *, row_groups: int, columns: int) -> int:
    """Of `taste`: each bucket has so many files of histories, each with so many row groups of so many columns."""
    return TASTE_REQUESTS + buckets * (histories_requests(files, row_groups, columns) + 1)


def histories_requests(files: int, row_groups: int, columns: int) -> int:
    """To read a bucket's histories: of each file its size, its end, its columns."""
    return files * (1 + 1 + row_groups * columns)


def embed_requests(buckets: int, reading: int, *, fits: int) -> int:
    """Of `embed`; `reading` is `histories_requests` of a bucket."""
    return EMBED_REQUESTS + fits * buckets * reading


def train_requests(buckets: int, reading: int, *, fits: int, epochs: int) -> int:
    """Of `train`: a pass an epoch in each fit, one for the counts and one for the validation range."""
    return TRAIN_REQUESTS + buckets * reading * (fits * epochs + fits)


def rank_requests(buckets: int, reading: int) -> int:
    """Of `rank`."""
    return RANK_REQUESTS + buckets * (reading + RANK_BUCKET_REQUESTS)


def evaluate_requests(buckets: int, reading: int, *, counted: int) -> int:
    """Of `evaluate` of two-step and network; `counted` buckets are read once more where queries are sampled."""
    return EVALUATE_REQUESTS + (EVALUATE_PASSES * buckets + counted) * reading


def recommend_requests(buckets: int, reading: int) -> int:
    """Of `recommend --all`."""
    return RECOMMEND_REQUESTS + buckets * (reading + 2)  # is it there, write it


def recommendations_bytes(users: int, k: int) -> int:
    """Of the k best songs of each user."""
    return int(users * (k * RECOMMENDED_SONG_BYTES + 20))


def histories_bytes(plays: int) -> int:
    """Of the plays in the data set."""
    return int(plays * HISTORY_BYTES)


def songs_bytes(songs: int, *, described: bool) -> int:
    """Of songs.parquet, with titles and artists or with ids alone."""
    return int(songs * (DESCRIBED_SONG_BYTES if described else STORED_SONG_BYTES))


def tastes_bytes(users: int, plays: int, *, dim: int, hidden_dim: int, horizons: int) -> int:
    """Of the rows of all users: a vector a horizon, the state, the songs heard, each once, and the id."""
    floats = users * (horizons * dim + hidden_dim) * STORED_FLOAT_BYTES
    return int(floats + plays * NEW_SONG_SHARE * HEARD_BYTES + users * ROW_BYTES_OF_TASTES)


def shared_memory(songs: int, dim: int) -> int:
    """Bytes of a song table in memory: one a node, whatever the number of workers."""
    return songs * dim * 4


def retrieval_requests(
    buckets: int, files: int, *, groups: int, ranges: int, row_groups: int, columns: int, fits: int
) -> int:
    """Of `retrieval`: groups of buckets are counted, then ranges of songs merged, in each of so many fits."""
    counting = buckets * histories_requests(files, row_groups, columns) + 2 * groups  # is it there, write it
    merging = ranges * (2 * groups + 2 + 2)  # each piece, the same as a group, and once more to join the ranges
    return RETRIEVAL_REQUESTS + fits * (counting + merging + FIT_REQUESTS)


def states_bytes(users: int, plays: int, *, hidden_dim: int, average_floats: int) -> int:
    """Of the store of user states, in SQLite; Redis takes a sixth more.

    The hidden state in half precision, the sums of the averages in single, and the plays.
    """
    return int(users * (2 * hidden_dim + 4 * average_floats + STATE_BYTES) + plays * STORED_PLAY_BYTES)
