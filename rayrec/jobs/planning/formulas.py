"""Formulas for the object storage requests, the stored bytes and the memory of the stages and of the server.

The tests in tests/unit/jobs/planning compare each formula with counts or measurements, which it must match within 15 %.

A request is one operation that object storage charges for: asking for the size of a file (opening a file does this),
reading a range of bytes, writing, listing, deleting; renaming a file takes two. Private memory is memory that no file
backs. Every process has its own, while all processes of a node share the memory that is mapped from files. The memory
formulas of the stages leave out what a worker holds while it is idle, `IDLE_WORKER`.
"""

from dataclasses import dataclass
from math import ceil

from rayrec.importing.import_plan import bucket_groups
from rayrec.importing.vocabulary import key_ranges
from rayrec.online.state_codec import NUMBER_BYTES
from rayrec.recommend.index import IndexConfig
from rayrec.recommend.range_join import SESSIONS_AT_ONCE

ROW_BYTES = 8.6  # bytes per play in the shuffle of an import, in blocks of 9,500 plays; docs/scale.md
INPUT_BLOCK = 16 << 20  # bytes of input per read
UNIT_REQUESTS = 3  # requests per unit of input, apart from its blocks: the file size and both ends of its range
SMALL_PARQUET = 4  # requests to read a small Parquet file: its size, its footer, its columns
TASTE_REQUESTS = 26  # requests of `taste`, apart from its buckets: manifests, listings, the model, current.json
HISTORY_BYTES = 8.5  # bytes per play in the histories, with song and time; contexts and skips add about 1
STORED_SONG_BYTES = 10.0  # bytes per song in songs.parquet, with an id of 12 characters
TEXT_LENGTH_BYTES = 2.0  # bytes per song in songs.parquet for the lengths of its title and artist
SONG_TEXT_BYTES = 30.0  # bytes per song for its title and artist, compressed; an assumption
STORED_FLOAT_BYTES = 3.45  # bytes per number in the Parquet lists of tastes
HEARD_SONG_BYTES = (
    2.1  # bytes per distinct song of a user in tastes, with 20,000 songs; about 1 more with millions of songs
)
NEW_SONG_SHARE = 0.85  # share of a user's plays that are the user's first play of the song; 0.83 measured on 2026-11-24
ROW_BYTES_OF_TASTES = 60.0  # bytes per row of tastes, apart from its lists
DRIVER_REQUESTS = 25  # requests of the driver of an import of any size
EMBED_REQUESTS = 30  # requests of `embed`, apart from its passes over the histories
TRAIN_REQUESTS = 95  # requests of `train`, apart from its passes over the histories: embeddings, checkpoints, the model
RANK_REQUESTS = 70  # requests of `rank`, apart from its buckets: network, retrieval, the rankers
RANK_BUCKET_REQUESTS = 11  # requests per bucket, apart from its histories: write and read the examples of each kind
EVALUATE_REQUESTS = 220  # requests of `evaluate`, apart from its passes: two recommenders, the report
EVALUATE_PASSES = 3  # passes over the histories, to compare two-step with the network alone
RECOMMEND_REQUESTS = 52  # requests of `recommend --all`, apart from its buckets: the recommender
STATE_BYTES = 310.0  # bytes per user in the store of user states, apart from network state and plays
STORED_PLAY_BYTES = 5.2  # bytes per play in the store of user states, compressed
RECOMMENDED_SONG_BYTES = 11.0  # bytes per recommended song of a user: an id of 12 characters and the score
INDEX_REQUESTS = 16  # requests of `index` for a catalog of any size
RETRIEVAL_REQUESTS = 10  # requests of `retrieval`, apart from its fits: manifests, listings
SHORTER_ROWS = -0.11  # mean digits of all song rows minus the digits of the last row: a tenth have one digit less
RETRIEVAL_SONG_BYTES = 48  # bytes per song in a retrieval: offsets, plays, first day, artist and album
FIT_REQUESTS = 105  # requests per fit of a retrieval, apart from its groups and ranges: the arrays, their checksums

# Private memory in bytes, measured as docs/scale.md#bytes-and-requests says. That of an idle worker comes on top.
IDLE_WORKER = 250 << 20  # bytes of a worker that has imported torch: docs/benchmarks.md#growth
TASTE_BYTES = 30_000_000
TASTE_HIDDEN_BYTES = 270_000  # per dimension of the hidden state, for the plays of one pass
TASTE_DIM_BYTES = 1_150_000  # per embedding dimension; the averages of embeddings are included
COUNTING_BYTES = 10_000_000
PAIR_BYTES = 80  # per pair of a song and a song that follows it
COUNTED_SONG_BYTES = 115  # per song of the catalog while counting, per song of the range while merging
MERGING_BYTES = 5_000_000
MERGED_RULE_BYTES = 120
JOINING_BYTES = 2_000_000
JOINED_RANGE = 1.9  # bytes per byte of a stored range
ORDERED_SESSION_BYTES = 150  # per session that is sorted, with its songs
JOINED_SONG_BYTES = 170  # per song of the catalog: its text, its play counts and their order
EXAMPLES_BYTES = 33_000_000
EXAMPLE_BYTES = 500_000  # per query: the features of several hundred candidates
EXAMPLE_SONG_BYTES = 5.5  # per number of the song embeddings, for the index
RANKING_BYTES = 12_000_000
RANKED_QUERY_BYTES = 92_000
RECOMMENDED_USER_BYTES = 340_000  # per user of a batch: the features of several hundred candidates
RECOMMENDED_ID_BYTES = 20  # per song id
EVALUATING_BYTES = 30_000_000
EVALUATED_QUERY_BYTES = 110_000
EVALUATED_TABLES = 4  # tables of song vectors that a node maps
EVALUATED_SONG_BYTES = 34  # per song, mapped: ranks, plays, popularity
TRAINED_TABLES = 8  # a worker's rows of the output and the input table, each with two Adam moments and an average
VALIDATED_TABLES = 4  # additional tables of these rows during validation: averaged networks, scored vectors
BEST_TABLES = 2  # additional tables of these rows, in host memory: the best network so far
AVERAGED_ROW_BYTES = 8  # per row of either table: when its average was last updated
COUNTED_SONG_OF_WORKER = 20  # per song of the catalog, on every worker: plays (8, mapped), running sum (8), prior (4)
TRAINING_BYTES = 260_000_000  # includes the scores of validation; single runs differ by some 30 MB
TRAINING_HIDDEN_BYTES = 375_000  # per dimension of the hidden state, for a batch of windows
TRAINING_DIM_BYTES = 3_310_000  # per embedding dimension
EMBEDDING_BYTES = 35_000_000
EMBEDDED_TABLES = 8  # tables of song vectors: those of gensim and the result
WORD_BYTES = 270  # per word in gensim's dictionaries
IMPORTING_BYTES = 3_500_000
READ_ROW_BYTES = 260
MERGED_ROW_BYTES = 220
VOCABULARY_BYTES = 200
BUSY = 0.7  # share of the time that a replica's CPU may be busy
REPLICA_BYTES = 18_000_000
CATALOG_SONG_BYTES = 280  # per song of the catalog, while a release is loaded


@dataclass(frozen=True, kw_only=True)
class ImportSize:
    """The numbers of input pieces and of user buckets of an import."""

    pieces: int
    buckets: int

    @property
    def shuffle_reads(self) -> int:
        """Number of byte ranges that the second pass reads: one per piece and group of buckets."""
        return self.pieces * len(bucket_groups(self.pieces, self.buckets))

    @property
    def song_reads(self) -> int:
        """Number of byte ranges that the merge of the song vocabulary reads: one per piece and range of song keys."""
        return self.pieces * key_ranges(self.buckets)


def input_requests(input_bytes: int, unit_bytes: int) -> int:
    """Requests to read text files of `input_bytes` in units of `unit_bytes`."""
    units = -(-input_bytes // unit_bytes)
    return int(units * UNIT_REQUESTS + units * -(-min(unit_bytes, input_bytes) // INPUT_BLOCK))


def import_requests(size: ImportSize) -> int:
    """Requests of an import of plays without minimum play counts, apart from reading the input files."""
    first_pass = 3 * size.pieces  # rows, songs, result
    song_requests = 2 * size.song_reads + key_ranges(size.buckets) * (1 + SMALL_PARQUET)
    second_pass = 2 * size.shuffle_reads + 3 * size.buckets  # histories, users, result
    publishing = 2 * 2 * size.buckets
    return first_pass + song_requests + second_pass + publishing + DRIVER_REQUESTS


def taste_requests(buckets: int, bucket_requests: int) -> int:
    """Requests of `taste`; `bucket_requests` are the `histories_requests` of one bucket."""
    return TASTE_REQUESTS + buckets * (bucket_requests + 1)


def histories_requests(files: int, row_groups: int, columns: int) -> int:
    """Requests to read the histories of one bucket: size, footer and column chunks of each file."""
    return files * (1 + 1 + row_groups * columns)


def embed_requests(buckets: int, bucket_requests: int, *, fits: int) -> int:
    """Requests of `embed`: each fit reads all histories once.

    `bucket_requests` are the `histories_requests` of one bucket.
    """
    return EMBED_REQUESTS + fits * buckets * bucket_requests


def train_requests(buckets: int, bucket_requests: int, *, fits: int, epochs: int) -> int:
    """Requests of `train`: one pass over the histories per epoch of each fit, one for play counts, one for validation.

    Without a validation range there is one fit and no pass for validation.
    """
    return TRAIN_REQUESTS + buckets * bucket_requests * (fits * epochs + fits)


def rank_requests(buckets: int, bucket_requests: int) -> int:
    """Requests of `rank`."""
    return RANK_REQUESTS + buckets * (bucket_requests + RANK_BUCKET_REQUESTS)


def evaluate_requests(buckets: int, bucket_requests: int, *, counted: int) -> int:
    """Requests of `evaluate` for two-step and the network alone.

    `counted` is the number of buckets that are read once more to count queries, 0 if queries are not sampled.
    """
    return EVALUATE_REQUESTS + (EVALUATE_PASSES * buckets + counted) * bucket_requests


def recommend_requests(buckets: int, bucket_requests: int) -> int:
    """Requests of `recommend --all`."""
    return RECOMMEND_REQUESTS + buckets * (bucket_requests + 2)  # check whether the file exists, write it


def recommendations_bytes(users: int, k: int) -> int:
    """Bytes of the recommendations artifact: the `k` best songs of each user."""
    return int(users * (k * RECOMMENDED_SONG_BYTES + 20))


def histories_bytes(plays: int) -> int:
    """Bytes of the histories in the data set."""
    return int(plays * HISTORY_BYTES)


def songs_bytes(songs: int, text_bytes: int) -> int:
    """Bytes of songs.parquet. `text_bytes` is the compressed size of titles and artists, 0 if there are none."""
    return int(songs * (STORED_SONG_BYTES + (TEXT_LENGTH_BYTES if text_bytes else 0))) + text_bytes


def tastes_bytes(users: int, heard_songs: int, *, floats: int) -> int:
    """Bytes of the tastes artifact: one row per user.

    A row holds the user id, the songs that the user has played, and `floats` numbers: one taste vector per horizon and
    the network's state. `heard_songs` is the number of distinct songs per user, summed over all users.
    """
    return int(users * (floats * STORED_FLOAT_BYTES + ROW_BYTES_OF_TASTES) + heard_songs * HEARD_SONG_BYTES)


def retrieval_requests(
    buckets: int, files: int, *, groups: int, ranges: int, row_groups: int, columns: int, fits: int
) -> int:
    """Requests of `retrieval`: each fit counts `groups` groups of buckets, then merges `ranges` ranges of songs.

    `files`, `row_groups` and `columns` are those of the histories of one bucket.
    """
    # Per group: check whether its piece exists, write it.
    counting_requests = buckets * histories_requests(files, row_groups, columns) + 2 * groups
    # Per range: read its part of each group's piece, check whether it exists, write it, read it to join the ranges.
    merging_requests = ranges * (2 * groups + 2 + 2)
    return RETRIEVAL_REQUESTS + fits * (counting_requests + merging_requests + FIT_REQUESTS)


def table_bytes(songs: int, dim: int) -> int:
    """Bytes of a table of song vectors, float32 (songs, dim), on disk and in memory; all workers of a node share it."""
    return songs * dim * 4


def model_bytes(songs: int, dim: int) -> int:
    """Bytes of a network: the input table for played songs, and the output table with which it scores songs."""
    return 2 * table_bytes(songs, dim)


def index_bytes(songs: int, dim: int) -> int:
    """Bytes of an index with int64 ids: exact in float32, or inverted lists in float16 for a large catalog."""
    is_exact = IndexConfig().kind_for(songs) == "flat"
    return songs * (dim * (4 if is_exact else 2) + 8)


def served_files(songs: int, dim: int, retrieval_size: int) -> int:
    """Bytes of files that the replicas of a node map: network, index and a retrieval of `retrieval_size` bytes."""
    return model_bytes(songs, dim) + index_bytes(songs, dim) + retrieval_size


def corpus_bytes(plays: int, songs: int) -> int:
    """Bytes of word2vec's corpus on the local disk: each play is a decimal song row and a space."""
    return int(plays * (len(str(songs - 1)) + SHORTER_ROWS + 1))


def retrieval_bytes(songs: int, *, rules: int, session_songs: int, sessions: int, day_songs: int) -> int:
    """Bytes of a retrieval, from the numbers of the entries that it keeps.

    `session_songs` is the number of songs in all sessions together, `day_songs` the number of pairs of a recent day
    and a song that was played on it.
    """
    return rules * 20 + session_songs * 9 + sessions * 24 + day_songs * 16 + songs * RETRIEVAL_SONG_BYTES


def states_bytes(users: int, plays: int, *, hidden_dim: int, average_floats: int) -> int:
    """Bytes of the store of user states in SQLite; Redis takes a third more.

    The store holds all `plays`, and for each user the hidden state and the sums behind the averages of song vectors,
    with 3 bytes per number.
    """
    return int(users * (NUMBER_BYTES * (hidden_dim + average_floats) + STATE_BYTES) + plays * STORED_PLAY_BYTES)


def encoding_memory(hidden_dim: int, dim: int) -> int:
    """Private bytes of a `taste` worker on top of an idle worker: a pass through the network, and a batch of users."""
    return TASTE_BYTES + hidden_dim * TASTE_HIDDEN_BYTES + dim * TASTE_DIM_BYTES


def counting_memory(songs: int, pairs: int) -> int:
    """Private bytes of a `retrieval` worker that counts buckets, on top of an idle worker.

    `pairs` is the number of pairs of a song and a song up to ten plays later that are in memory at once: all pairs of
    a batch of histories or the distinct pairs of a bucket, whichever is larger.
    """
    return COUNTING_BYTES + pairs * PAIR_BYTES + songs * COUNTED_SONG_BYTES


def merging_memory(songs: int, rules: int) -> int:
    """Private bytes of a `retrieval` task that merges a range of `songs` songs, on top of an idle worker.

    `rules` is the number of distinct pairs of a song and a follower in the range.
    """
    return MERGING_BYTES + rules * MERGED_RULE_BYTES + songs * COUNTED_SONG_BYTES


def joining_memory(songs: int, range_bytes: int, sessions: int) -> int:
    """Private bytes of the `retrieval` task that joins the ranges of songs, on top of an idle worker.

    `range_bytes` is the stored size of the largest range. `sessions` is the sum of the sessions of all ranges; a
    session is in every range for which it holds a song.
    """
    ordering_bytes = min(sessions, 2 * SESSIONS_AT_ONCE) * ORDERED_SESSION_BYTES
    return JOINING_BYTES + max(int(range_bytes * JOINED_RANGE), ordering_bytes, songs * JOINED_SONG_BYTES)


def indexing_memory(songs: int, dim: int) -> int:
    """Private bytes of the `index` task on top of an idle worker.

    The task holds a copy of the song vectors, the exact index and, for a large catalog, the inverted lists too.
    """
    list_bytes = 0 if IndexConfig().kind_for(songs) == "flat" else index_bytes(songs, dim)
    return 2 * table_bytes(songs, dim) + songs * 8 + list_bytes


def examples_memory(songs: int, dim: int, queries: int) -> int:
    """Private bytes of a `rank` worker on top of an idle worker, for `queries` queries of a bucket.

    The worker holds the features of their candidates and the exact index. For a large catalog the index has inverted
    lists instead, which are not private: a node maps them from one file.
    """
    exact_index_bytes = songs * dim * EXAMPLE_SONG_BYTES if IndexConfig().kind_for(songs) == "flat" else 0
    return int(EXAMPLES_BYTES + queries * EXAMPLE_BYTES + exact_index_bytes)


def ranking_memory(songs: int, dim: int, queries: int) -> int:
    """Private bytes of the `rank` task that grows the trees of a ranker from the examples of `queries` queries."""
    return int(RANKING_BYTES + queries * RANKED_QUERY_BYTES + table_bytes(songs, dim))


def recommending_memory(songs: int, users: int) -> int:
    """Private bytes of a `recommend --all` worker: the candidates of a batch of `users` users, and all song ids."""
    return int(users * RECOMMENDED_USER_BYTES + songs * RECOMMENDED_ID_BYTES)


def evaluating_memory(queries: int) -> int:
    """Private bytes of an `evaluate` worker for a batch of users with `queries` queries."""
    return EVALUATING_BYTES + queries * EVALUATED_QUERY_BYTES


def evaluated_files(songs: int, dim: int, retrieval_size: int) -> int:
    """Bytes of files that the `evaluate` workers of a node map.

    The files are song tables, an index, a retrieval of `retrieval_size` bytes and figures per song, such as its rank.
    """
    return retrieval_size + EVALUATED_TABLES * table_bytes(songs, dim) + songs * EVALUATED_SONG_BYTES


def training_memory(songs: int, dim: int, hidden_dim: int, workers: int) -> int:
    """Bytes of each training worker on CPUs, on top of an idle worker: its share of the song tables, and a batch."""
    batch_bytes = TRAINING_BYTES + hidden_dim * TRAINING_HIDDEN_BYTES + dim * TRAINING_DIM_BYTES
    table_count = TRAINED_TABLES + VALIDATED_TABLES + BEST_TABLES
    return _worker_table_bytes(songs, dim, workers, table_count) + songs * COUNTED_SONG_OF_WORKER + batch_bytes


def training_gpu_memory(songs: int, dim: int, workers: int) -> int:
    """Bytes of GPU memory of each training worker for its share of the song tables, without the batch."""
    return _worker_table_bytes(songs, dim, workers, TRAINED_TABLES + VALIDATED_TABLES)


def training_host_memory(songs: int, dim: int, workers: int) -> int:
    """Bytes of host memory of each training worker that has a GPU.

    The worker holds its part of a checkpoint, which includes the best network, and the play counts.
    """
    return _worker_table_bytes(songs, dim, workers, TRAINED_TABLES + BEST_TABLES) + songs * COUNTED_SONG_OF_WORKER


def checkpoint_bytes(songs: int, dim: int) -> int:
    """Bytes of a training checkpoint, of all workers together."""
    return _worker_table_bytes(songs, dim, 1, TRAINED_TABLES + BEST_TABLES)


def _worker_table_bytes(songs: int, dim: int, workers: int, table_count: int) -> int:
    """Bytes of one worker's rows of `table_count` song tables: each of W workers holds every W-th row."""
    rows = ceil(songs / workers)
    return table_count * table_bytes(rows, dim) + 2 * rows * AVERAGED_ROW_BYTES


def embedding_memory(songs: int, dim: int) -> int:
    """Private bytes of the `embed` task: gensim's tables and dictionaries."""
    return EMBEDDING_BYTES + EMBEDDED_TABLES * table_bytes(songs, dim) + songs * WORD_BYTES


def reading_memory(rows: int) -> int:
    """Private bytes of an import worker that reads `rows` rows at once."""
    return IMPORTING_BYTES + rows * READ_ROW_BYTES


def bucket_memory(rows: int) -> int:
    """Private bytes of an import worker that merges a bucket of `rows` rows."""
    return IMPORTING_BYTES + rows * MERGED_ROW_BYTES


def vocabulary_memory(songs: int) -> int:
    """Private bytes of the driver of an import: two copies of the key, id, title and artist of each song."""
    return songs * VOCABULARY_BYTES


def keys_store(songs: int) -> int:
    """Bytes in the object store of each node while an import merges buckets: the key and the row of each song."""
    return songs * 12


def replicas_for(requests_per_second: float, answers_per_second: float) -> int:
    """Number of replicas that a load of `requests_per_second` needs.

    A replica has one CPU. `answers_per_second` is its rate when the CPU is always busy; it is planned to be
    busy for a share `BUSY` of the time, since requests wait for each other above that.
    """
    return max(1, ceil(requests_per_second / (answers_per_second * BUSY)))


def replica_memory() -> int:
    """Private bytes of a server replica, apart from mapped files: its process and the data it keeps for requests."""
    return IDLE_WORKER + REPLICA_BYTES


def serving_memory(songs: int, replicas: int, shared_bytes: int) -> int:
    """Bytes of memory of a node with `replicas` replicas and `shared_bytes` of mapped files, which it holds once.

    While a release is loaded, one more process prepares the mapped catalog for all replicas.
    """
    return replicas * replica_memory() + IDLE_WORKER + songs * CATALOG_SONG_BYTES + shared_bytes
