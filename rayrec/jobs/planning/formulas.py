"""What stages ask of object storage, leave there and hold in memory; what servers need.

tests/unit/jobs/planning compares each formula with what is counted or measured at two sizes, within 15 %.

A request is what object storage charges for: asking for a file's size (which opening one does), a read of a range, a
write, a listing, a deletion; renaming is two. Private memory is what no file backs: it is there once for each process,
and what is mapped from files once for a node.
"""

from dataclasses import dataclass
from math import ceil

from rayrec.importing.import_plan import bucket_groups
from rayrec.importing.vocabulary import key_ranges
from rayrec.online.state_codec import NUMBER_BYTES
from rayrec.recommend.index import IndexConfig
from rayrec.recommend.range_join import SESSIONS_AT_ONCE

ROW_BYTES = 8.6  # of a play in the shuffle of an import, in blocks of 9,500 plays; docs/scale.md
INPUT_BLOCK = 16 << 20  # bytes of input that are read at once
UNIT_REQUESTS = 3  # of a unit of input beside its blocks: its size, and both ends of its range
SMALL_PARQUET = 4  # to read a small Parquet file: its size, its end, its columns
TASTE_REQUESTS = 26  # of `taste` beside its buckets: manifests, listings, the model, which results are current
HISTORY_BYTES = 8.5  # of a play in the data set, with id and time; contexts and skips add about 1
STORED_SONG_BYTES = 10.0  # of a song in songs.parquet with an id of 12 characters
TEXT_LENGTH_BYTES = 2.0  # of the lengths of a song's title and artist
SONG_TEXT_BYTES = 30.0  # of title and artist of a song, compressed; an assumption
STORED_FLOAT_BYTES = 3.45  # of a number in the Parquet lists of tastes
HEARD_BYTES = 2.1  # of a distinct song in a row of tastes, of 20,000 songs; about one more where there are millions
NEW_SONG_SHARE = 0.85  # of a user's plays that are songs not heard before, measured 0.83 on 2026-11-24
ROW_BYTES_OF_TASTES = 60.0  # of a row of tastes beside its lists
DRIVER_REQUESTS = 25  # of an import, whatever its size
EMBED_REQUESTS = 30  # of `embed` beside its passes
TRAIN_REQUESTS = 95  # of `train` beside its passes: embeddings, checkpoints, the model
RANK_REQUESTS = 70  # of `rank` beside its buckets: network, retrieval, the rankers
RANK_BUCKET_REQUESTS = 11  # of a bucket beside its histories: the examples of each kind written and read
EVALUATE_REQUESTS = 220  # of `evaluate` beside its passes: two recommenders, the report
EVALUATE_PASSES = 3  # over the histories, where two-step and the network alone are compared
RECOMMEND_REQUESTS = 78  # of `recommend --all` beside its buckets: the recommender
STATE_BYTES = 310.0  # of a user in the store of states beside network and plays
STORED_PLAY_BYTES = 5.2  # of a play in the store of states, compressed
RECOMMENDED_SONG_BYTES = 11.0  # of a song in a row of recommendations: id of 12 characters and score
INDEX_REQUESTS = 16  # of `index`, whatever its size
RETRIEVAL_REQUESTS = 10  # of `retrieval` beside its fits: manifests, listings
SHORTER_ROWS = -0.11  # digits of a row of songs on the mean, beside those of the last: a tenth have one less
RETRIEVAL_SONG_BYTES = 48  # of a song in a retrieval: offsets, plays, first day, artist and album
FIT_REQUESTS = 105  # of a fit of a retrieval beside its groups and ranges: the arrays, their checksums

# Private memory, each beside an idle worker; measured as docs/scale.md#bytes-and-requests says.
IDLE_WORKER = 250 << 20  # of a worker that has imported torch: docs/benchmarks.md#growth
TASTE_BYTES = 60_000_000
TASTE_HIDDEN_BYTES = 160_000  # of a number of the hidden state, for the plays of a pass
TASTE_DIM_BYTES = 1_770_000  # of a number of an embedding, of which averages are taken, too
COUNTING_BYTES = 10_000_000
PAIR_BYTES = 80  # of a song and one that follows it
COUNTED_SONG_BYTES = 115  # of a song of the catalog in counts, and of one of a range in their merge
MERGING_BYTES = 5_000_000
MERGED_RULE_BYTES = 120
JOINING_BYTES = 2_000_000
JOINED_RANGE = 1.9  # times the bytes of a range
ORDERED_SESSION_BYTES = 150  # of a session that is put in order, with its songs
JOINED_SONG_BYTES = 170  # of a song of the catalog: its text, play counts and their order
EXAMPLES_BYTES = 33_000_000
EXAMPLE_BYTES = 500_000  # of a query: some hundred features of some hundred candidates
EXAMPLE_SONG_BYTES = 5.5  # of a number of an embedding: the index
RANKING_BYTES = 12_000_000
RANKED_QUERY_BYTES = 92_000
RECOMMENDED_USER_BYTES = 340_000  # of a user of a batch: some hundred features of some hundred candidates
RECOMMENDED_ID_BYTES = 20  # of the id of a song
EVALUATING_BYTES = 30_000_000
EVALUATED_QUERY_BYTES = 110_000
EVALUATED_TABLES = 4
EVALUATED_SONG_BYTES = 34  # ranks, plays, popularity
TRAINED_TABLES = 8  # of a training worker's rows: songs as outputs and as inputs, each with two moments and an average
VALIDATED_TABLES = 4  # of these rows beside them, while it validates: averaged networks, vectors that are scored
BEST_TABLES = 2  # of these rows: the best network so far, in the memory of the host
AVERAGED_ROW_BYTES = 8  # of a row of either table: since when its average stands still
COUNTED_SONG_OF_WORKER = 20  # of every song on every worker: plays (8, mapped), their running sum (8), a prior (4)
TRAINING_BYTES = 260_000_000  # scores of validation among them; single runs differ by some 30 MB
TRAINING_HIDDEN_BYTES = 375_000  # of a number of the hidden state, for a batch of windows
TRAINING_DIM_BYTES = 3_310_000  # of a number of an embedding
EMBEDDING_BYTES = 35_000_000
EMBEDDED_TABLES = 8  # of gensim and of the result
WORD_BYTES = 270  # of a word in gensim's dictionaries
IMPORTING_BYTES = 3_500_000
READ_ROW_BYTES = 260
MERGED_ROW_BYTES = 220
VOCABULARY_BYTES = 200
BUSY = 0.7  # of the time of a replica's CPU
REPLICA_BYTES = 18_000_000
CATALOG_SONG_BYTES = 280  # of a song of the catalog while a release is loaded


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


def songs_bytes(songs: int, text: int) -> int:
    """Of songs.parquet; `text` are the compressed bytes of all titles and artists, 0 where there are none."""
    return int(songs * (STORED_SONG_BYTES + (TEXT_LENGTH_BYTES if text else 0))) + text


def tastes_bytes(users: int, heard: int, *, floats: int) -> int:
    """Of the rows of all users: so many numbers each, in a vector a horizon and a state, and the id.

    `heard` are the songs that users have played, each once a user, over all users.
    """
    return int(users * (floats * STORED_FLOAT_BYTES + ROW_BYTES_OF_TASTES) + heard * HEARD_BYTES)


def retrieval_requests(
    buckets: int, files: int, *, groups: int, ranges: int, row_groups: int, columns: int, fits: int
) -> int:
    """Of `retrieval`: groups of buckets are counted, then ranges of songs merged, in each of so many fits."""
    counting = buckets * histories_requests(files, row_groups, columns) + 2 * groups  # is it there, write it
    merging = ranges * (2 * groups + 2 + 2)  # each piece, the same as a group, and once more to join the ranges
    return RETRIEVAL_REQUESTS + fits * (counting + merging + FIT_REQUESTS)


def table_bytes(songs: int, dim: int) -> int:
    """Of a table of vectors of songs, on disk and in memory, where a node holds one whatever the number of workers."""
    return songs * dim * 4


def model_bytes(songs: int, dim: int) -> int:
    """Of a network: a table that it reads plays with, and one that it scores songs with."""
    return 2 * table_bytes(songs, dim)


def index_bytes(songs: int, dim: int) -> int:
    """Of an index, exact or of inverted lists in half precision, as the catalog's size asks for; ids are int64."""
    exact = IndexConfig().kind_for(songs) == "flat"
    return songs * (dim * (4 if exact else 2) + 8)


def served_files(songs: int, dim: int, retrieval: int) -> int:
    """Of what the replicas of a node map into memory: network, index and a retrieval of so many bytes."""
    return model_bytes(songs, dim) + index_bytes(songs, dim) + retrieval


def corpus_bytes(plays: int, songs: int) -> int:
    """Of word2vec's corpus on the local disk: a play is a song's row in decimal and a space."""
    return int(plays * (len(str(songs - 1)) + SHORTER_ROWS + 1))


def retrieval_bytes(songs: int, *, rules: int, session_songs: int, sessions: int, day_songs: int) -> int:
    """Of a retrieval: rules, songs of sessions, sessions, pairs of a recent day and a song played on it, as kept."""
    return rules * 20 + session_songs * 9 + sessions * 24 + day_songs * 16 + songs * RETRIEVAL_SONG_BYTES


def states_bytes(users: int, plays: int, *, hidden_dim: int, average_floats: int) -> int:
    """Of the store of user states, in SQLite; Redis takes a third more.

    The hidden state and the sums of the averages in three bytes a number, and the plays.
    """
    return int(users * (NUMBER_BYTES * (hidden_dim + average_floats) + STATE_BYTES) + plays * STORED_PLAY_BYTES)


def encoding_memory(hidden_dim: int, dim: int) -> int:
    """Private bytes of a worker of `taste` beside an idle one: a pass through the network, and a batch of users."""
    return TASTE_BYTES + hidden_dim * TASTE_HIDDEN_BYTES + dim * TASTE_DIM_BYTES


def counting_memory(songs: int, pairs: int) -> int:
    """Private bytes of a worker of `retrieval` that counts buckets, beside an idle one.

    `pairs` are those of a song and one up to ten plays later that are summed up at once: all of a batch that is read,
    or the distinct ones of a bucket, whichever are more.
    """
    return COUNTING_BYTES + pairs * PAIR_BYTES + songs * COUNTED_SONG_BYTES


def merging_memory(songs: int, rules: int) -> int:
    """Private bytes of a task of `retrieval` that merges a range of so many songs, beside an idle worker.

    `rules` are the distinct pairs of a song and a follower in the range.
    """
    return MERGING_BYTES + rules * MERGED_RULE_BYTES + songs * COUNTED_SONG_BYTES


def joining_memory(songs: int, range_bytes: int, sessions: int) -> int:
    """Private bytes of the task of `retrieval` that joins the ranges of songs, beside an idle worker.

    `range_bytes` are those of the largest range, as it is kept; `sessions` those of all ranges, each counted in every
    range of which it holds songs.
    """
    ordering = min(sessions, 2 * SESSIONS_AT_ONCE) * ORDERED_SESSION_BYTES
    return JOINING_BYTES + max(int(range_bytes * JOINED_RANGE), ordering, songs * JOINED_SONG_BYTES)


def indexing_memory(songs: int, dim: int) -> int:
    """Private bytes of the task of `index` beside an idle worker: a copy of the table, and the exact index.

    Above the size from which it has inverted lists, these as well.
    """
    lists = 0 if IndexConfig().kind_for(songs) == "flat" else index_bytes(songs, dim)
    return 2 * table_bytes(songs, dim) + songs * 8 + lists


def examples_memory(songs: int, dim: int, queries: int) -> int:
    """Private bytes of a worker of `rank` with so many queries of a bucket: their candidates' features, an index.

    Inverted lists, of catalogs above the size from which an index has them, are mapped from one file a node.
    """
    index = songs * dim * EXAMPLE_SONG_BYTES if IndexConfig().kind_for(songs) == "flat" else 0
    return int(EXAMPLES_BYTES + queries * EXAMPLE_BYTES + index)


def ranking_memory(songs: int, dim: int, queries: int) -> int:
    """Private bytes of the task that grows the rankers from the examples of so many queries."""
    return int(RANKING_BYTES + queries * RANKED_QUERY_BYTES + table_bytes(songs, dim))


def recommending_memory(songs: int, users: int) -> int:
    """Private bytes of a worker of `recommend --all`: the candidates of a batch of so many users, ids of all songs."""
    return int(users * RECOMMENDED_USER_BYTES + songs * RECOMMENDED_ID_BYTES)


def evaluating_memory(queries: int) -> int:
    """Private bytes of a worker of `evaluate` with so many queries of a batch of users."""
    return EVALUATING_BYTES + queries * EVALUATED_QUERY_BYTES


def evaluated_files(songs: int, dim: int, retrieval: int) -> int:
    """Of what the workers of `evaluate` on a node map: tables, an index, a retrieval of so many bytes, song ranks."""
    return retrieval + EVALUATED_TABLES * table_bytes(songs, dim) + songs * EVALUATED_SONG_BYTES


def training_memory(songs: int, dim: int, hidden_dim: int, workers: int) -> int:
    """Bytes of each of so many training workers on CPUs beside an idle one: its share of the tables, and a batch."""
    batch = TRAINING_BYTES + hidden_dim * TRAINING_HIDDEN_BYTES + dim * TRAINING_DIM_BYTES
    tables = TRAINED_TABLES + VALIDATED_TABLES + BEST_TABLES
    return _share_of_tables(songs, dim, workers, tables) + songs * COUNTED_SONG_OF_WORKER + batch


def training_gpu_memory(songs: int, dim: int, workers: int) -> int:
    """Bytes of the GPU of each of so many training workers: its share of the tables; a batch comes on top."""
    return _share_of_tables(songs, dim, workers, TRAINED_TABLES + VALIDATED_TABLES)


def training_host_memory(songs: int, dim: int, workers: int) -> int:
    """Bytes of each of so many training workers with a GPU, in the host's memory: its part of a checkpoint, which holds
    the best network, too."""
    return _share_of_tables(songs, dim, workers, TRAINED_TABLES + BEST_TABLES) + songs * COUNTED_SONG_OF_WORKER


def checkpoint_bytes(songs: int, dim: int) -> int:
    """Of a checkpoint of a training, of all workers."""
    return _share_of_tables(songs, dim, 1, TRAINED_TABLES + BEST_TABLES)


def _share_of_tables(songs: int, dim: int, workers: int, tables: int) -> int:
    """Of a worker's rows of so many tables: of W workers each has every W-th row."""
    rows = ceil(songs / workers)
    return tables * table_bytes(rows, dim) + 2 * rows * AVERAGED_ROW_BYTES


def embedding_memory(songs: int, dim: int) -> int:
    """Private bytes of the task of `embed`: gensim's tables and words."""
    return EMBEDDING_BYTES + EMBEDDED_TABLES * table_bytes(songs, dim) + songs * WORD_BYTES


def reading_memory(rows: int) -> int:
    """Private bytes of a worker of an import that reads so many rows at once."""
    return IMPORTING_BYTES + rows * READ_ROW_BYTES


def bucket_memory(rows: int) -> int:
    """Private bytes of a worker of an import that merges a bucket of so many rows."""
    return IMPORTING_BYTES + rows * MERGED_ROW_BYTES


def vocabulary_memory(songs: int) -> int:
    """Private bytes of the driver of an import: two copies of key, id, title and artist of each song."""
    return songs * VOCABULARY_BYTES


def keys_store(songs: int) -> int:
    """Bytes of the object store of a node while an import merges buckets: a key and a row of each song."""
    return songs * 12


def replicas_for(requests_per_second: float, answers_per_second: float) -> int:
    """Replicas that answer so many requests, each with one CPU that answers so many a second when it does nothing else.

    They are busy for BUSY of the time: above it requests wait for each other.
    """
    return max(1, ceil(requests_per_second / (answers_per_second * BUSY)))


def replica_memory() -> int:
    """Private bytes of a replica of the server beside the mapped files: its process, and what it keeps of requests."""
    return IDLE_WORKER + REPLICA_BYTES


def serving_memory(songs: int, replicas: int, shared: int) -> int:
    """Bytes of a node with so many replicas; `shared` are the mapped files, which it holds once.

    While a release is loaded a process of its own makes the mapped form of the catalog for them.
    """
    return replicas * replica_memory() + IDLE_WORKER + songs * CATALOG_SONG_BYTES + shared
