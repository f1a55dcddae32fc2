"""What stages ask of object storage: each formula is compared with counts in tests/unit/jobs/planning/test_formulas.py.

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
DRIVER_REQUESTS = 25  # of an import, whatever its size


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


def taste_driver_requests(buckets: int) -> int:
    """Of the driver of `taste`: manifests and a listing, whatever the number of users."""
    return DRIVER_REQUESTS + buckets // 1_000
