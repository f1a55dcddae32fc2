"""The workers of an import: the first pass reads one piece of input; the second pass turns the fragments of one bucket
into sorted histories or playlists."""

import tempfile
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.columns import one_array
from rayrec.data.dataset import (
    NO_FORGOTTEN_USERS,
    Dataset,
    ForgottenUsers,
    find_users,
    read_files,
    read_overlap,
    read_users,
    with_columns,
)
from rayrec.data.histories import Histories
from rayrec.data.moments import ASSUMED_GAP_MS, LINE_GAP_MS
from rayrec.data.ragged import offsets_of
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.readers.reader import Unit
from rayrec.importing.staging import LINE, ORDER, OWNER, UNIT, BucketGroup, PieceResult, Staging, write_histories
from rayrec.importing.vocabulary import KEY, SongMerger, SongRows
from rayrec.storage.artifacts import DatasetManifest
from rayrec.storage.workspace import Workspace, histories_file, playlists_file, rejected_rows_file, users_file

FORGOTTEN_USER = "user was deleted"  # reject reason of a deleted user's plays from before the deletion
LIKE_WITHOUT_PLAYS = "like of a user without plays"
MAX_CONTEXTS = 31  # bits of an int32 without its sign
USERS_PER_READ = 5_000
PARTS_BEFORE_COMPACT = 8  # with more parts, reading takes noticeably more requests
Spans = list[tuple[int, int]]  # first and last part of each set of files


@dataclass(frozen=True, kw_only=True)
class MergedRows:
    """R rows of one bucket, sorted by owner and then by order; ties stay in the order of import."""

    owners: np.ndarray  # object (O,), strings, ascending
    owner: np.ndarray  # int64 (R,), index in `owners`, ascending
    order: np.ndarray  # int64 (R,), ms UTC or position
    key: np.ndarray  # uint64 (R,)
    contexts: pa.Array  # list<string> (R,)
    skipped: np.ndarray  # bool (R,), false if not known
    source: np.ndarray  # int64 (R,), number of the file
    line: np.ndarray  # int64 (R,), line of the file

    def __len__(self) -> int:
        return len(self.owner)

    def keep(self, mask: np.ndarray) -> "MergedRows":
        """The rows where `mask`, bool (R,), is true."""
        if mask.all():
            return self
        return MergedRows(
            owners=self.owners,
            owner=self.owner[mask],
            order=self.order[mask],
            key=self.key[mask],
            contexts=self.contexts.filter(pa.array(mask)),
            skipped=self.skipped[mask],
            source=self.source[mask],
            line=self.line[mask],
        )

    def counts(self) -> np.ndarray:
        """int64 (O,): number of rows of each owner."""
        return np.bincount(self.owner, minlength=len(self.owners))


@dataclass(frozen=True, kw_only=True)
class PlaysAndLikes:
    """The rows of one bucket from all pieces of input. Plays and likes have the same `owners`."""

    plays: MergedRows
    liked_plays: MergedRows  # the plays whose rows say that the user likes the song
    likes: MergedRows  # likes in rows that are no plays
    merged: int = 0  # exact duplicates that were left out

    def __len__(self) -> int:
        return len(self.plays) + len(self.likes)

    def without_forgotten(self, forgotten: ForgottenUsers) -> "PlaysAndLikes":
        """Return the rows without those from before their owner was deleted.

        Positions count as before any deletion: all rows of a deleted user without times are left out.
        """
        if not forgotten:
            return self
        deletion_times = forgotten.until(self.plays.owners)
        plays, liked_plays, likes = (
            rows.keep(rows.order > deletion_times[rows.owner]) for rows in (self.plays, self.liked_plays, self.likes)
        )
        return replace(self, plays=plays, liked_plays=liked_plays, likes=likes)


def sort_rows(
    parts: Iterable[tuple[Sequence[int], Sequence[int], pa.Table]], *, in_lines: bool = False
) -> PlaysAndLikes:
    """Sort the rows of pieces of input, and merge exact duplicates (same owner, order and song).

    `parts` has one item per piece, in the order of import: the file number of each unit of the piece, the number of
    lines before each unit in its file, and the rows of the piece. The first of several duplicates is kept. If
    `in_lines` is true, the order of a row is its place in a line: the lines of an owner stay in the order of import,
    and no row is a duplicate.
    """
    filled_parts = [(files, offsets, rows) for files, offsets, rows in parts if rows.num_rows]
    if not filled_parts:
        no_rows = _no_rows(np.zeros(0, object))
        return PlaysAndLikes(plays=no_rows, liked_plays=no_rows, likes=no_rows)
    table = pa.concat_tables([rows for _, _, rows in filled_parts]).combine_chunks()
    source, line = (
        np.concatenate(values) for values in zip(*(_files_and_lines(*part) for part in filled_parts), strict=True)
    )
    encoded = one_array(table.column(OWNER)).dictionary_encode()
    owner_ids = encoded.dictionary.to_numpy(zero_copy_only=False)
    sorted_owners = np.argsort(owner_ids)
    ranks = np.empty(len(owner_ids), dtype=np.int64)
    ranks[sorted_owners] = np.arange(len(owner_ids))
    owner = ranks[encoded.indices.to_numpy()]
    order_values = table.column(ORDER).to_numpy()
    row_order = np.lexsort((order_values, line, source, owner) if in_lines else (order_values, owner))
    skipped = pc.fill_null(one_array(table.column(columns.SKIPPED)), False).to_numpy(zero_copy_only=False)
    rows = MergedRows(
        owners=owner_ids[sorted_owners],
        owner=owner[row_order],
        order=order_values[row_order],
        key=table.column(KEY).to_numpy()[row_order],
        contexts=one_array(table.column(columns.CONTEXTS)).take(pa.array(row_order)),
        skipped=skipped[row_order],
        source=source[row_order],
        line=line[row_order],
    )
    no_rows = _no_rows(rows.owners)
    if in_lines:
        return PlaysAndLikes(plays=rows, liked_plays=no_rows, likes=no_rows)
    if table.column(columns.LIKED).null_count == len(table):
        plays = _distinct(rows)
        return PlaysAndLikes(plays=plays, liked_plays=no_rows, likes=no_rows, merged=len(rows) - len(plays))
    liked, is_play = (
        pc.fill_null(one_array(table.column(name)), default).to_numpy(zero_copy_only=False)[row_order]
        for name, default in ((columns.LIKED, False), (columns.IS_PLAY, True))
    )
    plays, liked_plays, likes = (_distinct(rows.keep(mask)) for mask in (is_play, is_play & liked, ~is_play & liked))
    return PlaysAndLikes(plays=plays, liked_plays=liked_plays, likes=likes, merged=len(rows) - len(plays) - len(likes))


def _distinct(rows: MergedRows) -> MergedRows:
    return rows.keep(_is_first_of_each(rows)) if len(rows) else rows


def _files_and_lines(files: Sequence[int], offsets: Sequence[int], rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the file number and the line of each row, two int64 (R,) arrays; zeros if lines were not kept."""
    if rows.column(LINE).null_count:
        return np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    units = rows.column(UNIT).to_numpy()
    return np.asarray(files, dtype=np.int64)[units], np.asarray(offsets)[units] + rows.column(LINE).to_numpy()


def _is_first_of_each(rows: MergedRows) -> np.ndarray:
    """bool (R,): True for rows that are not duplicates of earlier ones."""
    song_order = np.lexsort((rows.key, rows.order, rows.owner))
    owner, order, key = rows.owner[song_order], rows.order[song_order], rows.key[song_order]
    is_repeated = (owner[1:] == owner[:-1]) & (order[1:] == order[:-1]) & (key[1:] == key[:-1])
    is_first = np.ones(len(rows), dtype=bool)
    is_first[song_order[1:]] = ~is_repeated
    return is_first


def to_positions(rows: MergedRows) -> MergedRows:
    """Replace the places of rows in lines by positions, in ms: an owner's first row is at 0, each next row of the line
    is 3 minutes later, and the first row of the owner's next line is 63 minutes after the row before it."""
    is_same_owner = rows.owner[1:] == rows.owner[:-1]
    is_same_line = is_same_owner & (rows.source[1:] == rows.source[:-1]) & (rows.line[1:] == rows.line[:-1])
    steps = np.zeros(len(rows), dtype=np.int64)
    steps[1:] = np.where(is_same_line, ASSUMED_GAP_MS, LINE_GAP_MS) * is_same_owner
    times = np.cumsum(steps)
    first_rows = np.searchsorted(rows.owner, rows.owner)
    return replace(rows, order=times - times[first_rows])


def _no_rows(owners: np.ndarray) -> MergedRows:
    no_integers, no_keys = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    return MergedRows(
        owners=owners,
        owner=no_integers,
        order=no_integers,
        key=no_keys,
        contexts=pa.array([], pa.list_(pa.string())),
        skipped=np.zeros(0, bool),
        source=no_integers,
        line=no_integers,
    )


def song_counts(rows: MergedRows, min_rows: int, is_known: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the songs of owners with at least `min_rows` rows: their keys, uint64, and numbers of rows, int64.

    Owners with `is_known`, bool (O,), already have plays in the data set and count with any number of rows.
    """
    has_enough = ((rows.counts() >= min_rows) | _is_known_owner(is_known, rows))[rows.owner]
    keys, counts = np.unique(rows.key[has_enough], return_counts=True)
    return keys, counts


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Rows that are left out, with the reasons, such as an owner or a song with too few rows."""

    rows: list[MergedRows] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def add(self, rows: MergedRows, reason: str) -> None:
        """Add rows that are left out for `reason`."""
        if len(rows):
            self.rows.append(rows)
            self.reasons.append(reason)

    def counts(self) -> dict[str, int]:
        """Return reason -> number of rows."""
        totals: dict[str, int] = {}
        for rows, reason in zip(self.rows, self.reasons, strict=True):
            totals[reason] = totals.get(reason, 0) + len(rows)
        return totals

    def table(self, sources: list[str]) -> pa.Table:
        """Return columns.REJECTED; `sources` are the files by number. A text is the owner and the time or position."""
        tables = [columns.REJECTED.empty_table()]
        for rows, reason in zip(self.rows, self.reasons, strict=True):
            owners = pa.array(rows.owners, pa.string()).take(pa.array(rows.owner))
            data = [
                pa.array(sources, pa.string()).take(pa.array(rows.source)),
                pa.array(rows.line),
                pa.array([reason], pa.string()).take(pa.array(np.zeros(len(rows), np.int64))),
                pc.binary_join_element_wise(owners, pa.array(rows.order).cast(pa.string()), " "),
            ]
            tables.append(pa.table(data, schema=columns.REJECTED))
        return pa.concat_tables(tables).combine_chunks()


def drop_rare(
    rows: MergedRows, song_rows: SongRows, min_rows: int, reasons: tuple[str, str], is_known: np.ndarray | None = None
) -> tuple[MergedRows, Dropped]:
    """Return the rows whose song is in the vocabulary and whose owner has at least `min_rows` of them, and the others.

    `reasons` are the reasons for dropping an owner and a song with too few rows. Owners with `is_known`, bool (O,),
    already have plays in the data set and are kept with any number of rows.
    """
    dropped = Dropped()
    few_rows_reason, rare_song_reason = reasons

    def drop_owners(rows: MergedRows) -> MergedRows:
        has_enough = ((rows.counts() >= min_rows) | _is_known_owner(is_known, rows))[rows.owner]
        dropped.add(rows.keep(~has_enough), few_rows_reason)
        return rows.keep(has_enough)

    rows = drop_owners(rows)
    is_in_vocabulary = song_rows.find(rows.key) >= 0
    dropped.add(rows.keep(~is_in_vocabulary), rare_song_reason)
    return drop_owners(rows.keep(is_in_vocabulary)), dropped


def usable_likes(
    rows: PlaysAndLikes, has_plays: np.ndarray, song_rows: SongRows, rare_song_reason: str, dropped: Dropped
) -> PlaysAndLikes:
    """Return `rows` with only the likes of songs in the vocabulary by owners with `has_plays`, bool (O,).

    Other likes in rows that are no plays are added to `dropped`.
    """
    likes, liked_plays = (part.keep(has_plays[part.owner]) for part in (rows.likes, rows.liked_plays))
    dropped.add(rows.likes.keep(~has_plays[rows.likes.owner]), LIKE_WITHOUT_PLAYS)
    dropped.add(likes.keep(song_rows.find(likes.key) < 0), rare_song_reason)
    likes, liked_plays = (part.keep(song_rows.find(part.key) >= 0) for part in (likes, liked_plays))
    return replace(rows, likes=likes, liked_plays=liked_plays)


def all_likes(rows: PlaysAndLikes) -> MergedRows:
    """Return the likes in rows that are no plays and in plays, without duplicates (same owner, song and time)."""
    parts = (rows.likes, rows.liked_plays)
    if not len(rows.liked_plays):
        return rows.likes
    owner, order, key, skipped, source, line = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("owner", "order", "key", "skipped", "source", "line")
    )
    time_order = np.lexsort((order, owner))
    likes = MergedRows(
        owners=rows.plays.owners,
        owner=owner[time_order],
        order=order[time_order],
        key=key[time_order],
        contexts=pa.concat_arrays([part.contexts for part in parts]).take(pa.array(time_order)),
        skipped=skipped[time_order],
        source=source[time_order],
        line=line[time_order],
    )
    return _distinct(likes)


def _is_known_owner(is_known: np.ndarray | None, rows: MergedRows) -> np.ndarray:
    """bool (O,): `is_known`, or False for all owners if it is None."""
    return np.zeros(len(rows.owners), dtype=bool) if is_known is None else is_known


def find_duplicate_rows(rows: MergedRows, songs: np.ndarray, histories: Histories) -> np.ndarray:
    """int64: indices of the rows that have the same user, time and song as a play in `histories`.

    `songs`, int32 (R,), are the song rows of `rows`, -1 for new songs.
    """
    owner_indices = pd.Index(rows.owners).get_indexer(pd.Index(histories.user_ids))
    plays = histories.take(owner_indices >= 0)
    plays = plays.keep((plays.played_at >= rows.order.min()) & (plays.played_at <= rows.order.max()))
    play_owners = owner_indices[owner_indices >= 0][plays.rows]
    owner_rows = np.flatnonzero(np.isin(rows.owner, play_owners))
    row_keys = pd.MultiIndex.from_arrays([rows.owner[owner_rows], rows.order[owner_rows], songs[owner_rows]])
    is_in_histories: np.ndarray = row_keys.isin(pd.MultiIndex.from_arrays([play_owners, plays.played_at, plays.songs]))
    return np.asarray(owner_rows[is_in_histories])


def to_histories(
    rows: MergedRows,
    song_rows: SongRows,
    contexts: list[str],
    *,
    has_skipped: bool,
    likes: MergedRows | None = None,
) -> Histories:
    """Return the histories of the owners who have plays or likes.

    `likes`, None if the data has no likes, have the same `owners` as `rows`. `contexts` are the names of the context
    bits, at most 31.
    """
    has_rows = rows.counts() > 0
    if likes is not None:
        has_rows |= likes.counts() > 0
    owners, offsets = _owner_spans(rows, has_rows)
    liked_histories = None
    if likes is not None:
        liked_histories = Histories(
            user_ids=owners,
            offsets=_owner_spans(likes, has_rows)[1],
            songs=song_rows.find(likes.key),
            played_at=likes.order,
        )
    return Histories(
        user_ids=owners,
        offsets=offsets,
        songs=song_rows.find(rows.key),
        played_at=rows.order,
        contexts=context_bits(rows.contexts, contexts) if contexts else None,
        skipped=rows.skipped if has_skipped else None,
        likes=liked_histories,
    )


def to_playlists(rows: MergedRows, song_rows: SongRows) -> pa.Table:
    """Convert rows to columns.PLAYLISTS, one row per playlist."""
    owners, offsets = _owner_spans(rows, rows.counts() > 0)
    songs = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(song_rows.find(rows.key)))
    return pa.table([pa.array(owners, pa.string()), songs], schema=columns.PLAYLISTS)


def _owner_spans(rows: MergedRows, is_kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the owners with `is_kept`, bool (O,), and the offsets of their rows, int64."""
    counts = rows.counts()[is_kept]
    return rows.owners[is_kept], offsets_of(counts)


def context_bits(names: pa.Array, contexts: list[str]) -> np.ndarray:
    """int32 (R,): the contexts of each row as bits; bit i is `contexts[i]`, and other names are left out."""
    bit_numbers = pc.index_in(pc.list_flatten(names), value_set=pa.array(contexts, pa.string()))
    row_numbers = pc.list_parent_indices(names).to_numpy()
    is_known = bit_numbers.is_valid().to_numpy(zero_copy_only=False)
    known_bits = pc.fill_null(bit_numbers, 0).to_numpy()[is_known]
    bits = np.zeros(len(names), dtype=np.int32)
    np.bitwise_or.at(bits, row_numbers[is_known], np.left_shift(np.int32(1), known_bits.astype(np.int32)))
    return bits


def choose_contexts(counts: dict[str, int], existing: Sequence[str] = ()) -> list[str]:
    """Return the names of the context bits, at most 31: those in `existing`, then new ones, the most frequent first."""
    new_names = sorted(counts.keys() - set(existing), key=lambda name: (-counts[name], name))
    return [*existing, *new_names][:MAX_CONTEXTS]


def merge_spans(parts: int, cuts: Iterable[int]) -> Spans:
    """Join parts 0 to `parts` - 1 into as few spans as possible, with a new span at each of the `cuts`.

    A cut is the number of a part: plays from it on must be readable alone, for artifacts that continue from there.
    """
    bounds = sorted({0, parts, *(cut for cut in cuts if 0 < cut < parts)})
    return [(first, next_first - 1) for first, next_first in pairwise(bounds)]


class BucketJoiner:
    """Joins the parts of one bucket at a time into one file per span of parts."""

    def __init__(self, staging: Staging, dataset: Dataset, spans: Sequence[tuple[int, int]]) -> None:
        self.staging, self.dataset, self.spans = staging, dataset, spans

    def __call__(self, bucket: int) -> tuple[int, dict[str, str]]:
        """Write the files of one bucket, then its result; return the bucket, and path -> sha256."""
        files = {}
        for first, last in self.spans:
            path = histories_file(first, bucket, last)
            earlier_files = self.dataset.manifest.histories_files(bucket, first, last + 1)
            batches = (
                with_columns(
                    histories,
                    contexts=bool(self.dataset.manifest.contexts),
                    skipped=self.dataset.manifest.has_skipped,
                    likes=self.dataset.manifest.has_likes,
                )
                for histories in read_files(self.dataset.workspace, earlier_files, USERS_PER_READ)
            )
            files[path] = write_histories(self.dataset.workspace, self.staging.out(path), batches)
        self.dataset.workspace.write_json(self.staging.bucket_file(bucket), files)
        return bucket, files


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """What the second pass needs to know from the first pass and from the base data set."""

    pieces: list[list[int]]  # units of each piece of input
    offsets: list[int]  # number of lines before each unit in its file
    files: list[int]  # number of the file of each unit
    sources: list[str]  # name of each file
    contexts: list[str]  # name of each context bit
    has_skipped: bool
    has_likes: bool
    in_lines: bool  # the order of a row is its place in its line
    base: DatasetManifest | None = None  # the data set that plays are appended to
    forgotten: ForgottenUsers = NO_FORGOTTEN_USERS  # deleted users; their plays from before the deletion are left out

    @property
    def part(self) -> int:
        """The number of the part of the histories that is written."""
        return self.base.parts if self.base else 0

    def rows_of(self, group_rows: BucketGroup, bucket: int) -> PlaysAndLikes:
        """Return the sorted rows of a bucket, including those of deleted users."""
        parts = (
            (
                [self.files[unit] for unit in self.pieces[piece]],
                [self.offsets[unit] for unit in self.pieces[piece]],
                rows,
            )
            for piece, rows in group_rows.read(bucket)
        )
        return sort_rows(parts, in_lines=self.in_lines)


class PieceImporter:
    """Reads pieces of input into fragments."""

    def __init__(
        self, staging: Staging, config: ImportConfig, units: list[Unit], pieces: list[list[int]], buckets: int
    ) -> None:
        self.store, self.reader, self.units, self.pieces = staging.fragments, config.reader(), units, pieces
        self.buckets, self.with_lines = buckets, config.needs_lines

    def __call__(self, piece: int) -> tuple[int, PieceResult]:
        """Read one piece; an error in the input is stored, not raised, so that the other pieces are read too."""
        batches = (self.reader.read(self.units[unit]) for unit in self.pieces[piece])
        return piece, self.store.write_piece(piece, batches, self.buckets, with_lines=self.with_lines)


class SongRange:
    """Merges the songs of all pieces in a range of keys."""

    def __init__(self, staging: Staging, config: ImportConfig, offsets: np.ndarray) -> None:
        self.staging, self.offsets = staging, offsets  # int64 (pieces, ranges + 1)

    def __call__(self, key_range: int) -> int:
        """Write the songs of one range; return the range."""
        merger = SongMerger()
        for piece, offsets in enumerate(self.offsets):
            songs = self.staging.fragments.read_songs(piece, offsets, key_range)
            if songs is not None:
                merger.add(songs)
        self.staging.workspace.write_table(self.staging.songs_file(key_range), merger.table())
        return key_range


class _GroupWorker:
    """Processes the buckets of a group one after another; reads each piece once per group."""

    def __init__(
        self, staging: Staging, config: ImportConfig, merge: MergeSettings, offsets: np.ndarray, buckets: Set[int]
    ) -> None:
        self.staging, self.config, self.merge = staging, config, merge
        self.offsets, self.buckets = offsets, buckets  # int64 (pieces, all buckets + 1); buckets that are not done

    def __call__(self, group: tuple[int, int]) -> list[tuple[int, Any]]:
        """Process the buckets of a group (first and last) that are not done; return each bucket with its result."""
        first, last = group
        with tempfile.TemporaryFile(prefix="rayrec-") as spool:
            group_rows = self.staging.fragments.read_group(self.offsets, first, last, spool)
            return [
                (bucket, self.run(bucket, group_rows)) for bucket in range(first, last + 1) if bucket in self.buckets
            ]

    def run(self, bucket: int, group_rows: BucketGroup) -> Any:
        """Process one bucket and return its result."""
        raise NotImplementedError


class KeyCounter(_GroupWorker):
    """Counts the plays of each song in a bucket."""

    def run(self, bucket: int, group_rows: BucketGroup) -> None:
        """Write the counts of one bucket."""
        rows = self.merge.rows_of(group_rows, bucket).without_forgotten(self.merge.forgotten).plays
        earlier_parts = EarlierParts(self.staging.workspace, self.merge.base, bucket)
        keys, counts = song_counts(rows, self.config.min_user_plays, earlier_parts.knows(rows.owners))
        table = pa.table({KEY: pa.array(keys, pa.uint64()), "count": pa.array(counts, pa.int64())})
        self.staging.workspace.write_table(self.staging.counts_file(bucket), table)


class EarlierParts:
    """The users and plays of a bucket in the existing parts, before the part that is written."""

    def __init__(self, workspace: Workspace, base: DatasetManifest | None, bucket: int) -> None:
        self.workspace, self.base, self.bucket = workspace, base, bucket
        path = base.current_users_file(bucket) if base else None
        # object (U,), ascending
        self.users = read_users(workspace, path) if path else np.zeros(0, dtype=object)

    def knows(self, owners: np.ndarray) -> np.ndarray:
        """bool (O,): True for owners with plays in the existing parts."""
        return np.isin(owners, self.users)

    def without(self, rows: MergedRows, songs: SongRows) -> MergedRows:
        """Return the rows that are not exact duplicates of existing plays.

        Only files of parts whose time range overlaps that of the rows are read, and of these files only row groups that
        may hold plays of the same users in that time range.
        """
        known_rows = rows.keep(self.knows(rows.owners)[rows.owner])
        if self.base is None or not len(known_rows):
            return rows
        first, last = int(known_rows.order.min()), int(known_rows.order.max())
        files = self.base.files_between(self.bucket, first, last)
        row_songs = songs.find(rows.key)
        is_repeated: np.ndarray = np.zeros(len(rows), dtype=bool)
        owners = known_rows.owners[np.unique(known_rows.owner)]
        for path in files:
            for histories in read_overlap(self.workspace, path, owners, first, last):
                is_repeated[find_duplicate_rows(rows, row_songs, histories)] = True
        return rows.keep(~is_repeated)

    def without_likes(self, rows: PlaysAndLikes, songs: SongRows) -> PlaysAndLikes:
        """Return `rows` without the likes that existing parts hold."""
        likes, liked_plays = rows.likes, rows.liked_plays
        owners = likes.owners[np.unique(np.concatenate([likes.owner, liked_plays.owner]))]
        known_owners = owners[self.knows(owners)]
        if self.base is None or not self.base.has_likes or not len(known_owners):
            return rows
        # All files are read, since the times of parts and row groups are those of plays.
        for path in self.base.histories_files(self.bucket):
            for histories in find_users(self.workspace, path, known_owners):
                if histories.likes is not None:
                    likes = _without_duplicates(likes, songs, histories.likes)
                    liked_plays = _without_duplicates(liked_plays, songs, histories.likes)
        return replace(rows, likes=likes, liked_plays=liked_plays)


def _without_duplicates(rows: MergedRows, songs: SongRows, histories: Histories) -> MergedRows:
    if not len(rows):
        return rows
    is_new = np.ones(len(rows), dtype=bool)
    is_new[find_duplicate_rows(rows, songs.find(rows.key), histories)] = False
    return rows.keep(is_new)


class BucketMerger(_GroupWorker):
    """Makes the histories (or playlists) of a bucket from the fragments of all pieces."""

    def __init__(
        self,
        staging: Staging,
        config: ImportConfig,
        merge: MergeSettings,
        offsets: np.ndarray,
        buckets: Set[int],
        keys: np.ndarray,
        rows: np.ndarray,
    ) -> None:
        super().__init__(staging, config, merge, offsets, buckets)
        self.songs = SongRows(keys, rows)

    def run(self, bucket: int, group_rows: BucketGroup) -> dict[str, Any]:
        """Write the files of one bucket, then its result."""
        earlier_parts = EarlierParts(self.staging.workspace, self.merge.base, bucket)
        all_rows = self.merge.rows_of(group_rows, bucket)
        remaining = all_rows.without_forgotten(self.merge.forgotten)
        deleted_count = len(all_rows) - len(remaining)
        is_known = earlier_parts.knows(remaining.plays.owners)
        distinct_rows = earlier_parts.without(remaining.plays, self.songs)
        merged_count = all_rows.merged + len(remaining.plays) - len(distinct_rows)
        rows, dropped = drop_rare(
            distinct_rows, self.songs, self.config.min_user_plays, self.config.drop_reasons, is_known
        )
        rows = to_positions(rows) if self.merge.in_lines else rows
        is_new = (rows.counts() > 0) & ~is_known
        rare_song_reason = self.config.drop_reasons[1]
        kept_likes = usable_likes(remaining, (rows.counts() > 0) | is_known, self.songs, rare_song_reason, dropped)
        new_likes = earlier_parts.without_likes(kept_likes, self.songs)
        merged_count += len(kept_likes.likes) - len(new_likes.likes)
        likes = all_likes(new_likes)
        files = self._write_rows(bucket, rows, likes if self.merge.has_likes else None)
        if self.config.produces == "plays" and (is_new.any() or not self.merge.part):
            path = users_file(self.merge.part, bucket)
            user_ids = np.union1d(earlier_parts.users, rows.owners[is_new])
            files[path] = self._write_table(path, pa.table({columns.USER: pa.array(user_ids, pa.string())}))
        if dropped.rows:
            path = rejected_rows_file(self.config.produces, self.merge.part, f"{bucket:05d}")
            files[path] = self._write_table(path, dropped.table(self.merge.sources))
        result = {
            "rows": len(rows),
            "likes": len(new_likes.likes),
            "new_likes": len(likes),
            "owners": int(is_new.sum()),
            "merged": merged_count,
            "dropped": dropped.counts() | ({FORGOTTEN_USER: deleted_count} if deleted_count else {}),
            "first": int(rows.order.min()) if len(rows) else 0,
            "last": int(rows.order.max()) if len(rows) else 0,
            "files": files,
        }
        self.staging.workspace.write_json(self.staging.bucket_file(bucket), result)
        return result

    def _write_rows(self, bucket: int, rows: MergedRows, likes: MergedRows | None) -> dict[str, str]:
        if self.config.produces == "playlists":
            path = playlists_file(bucket)
            return {path: self._write_table(path, to_playlists(rows, self.songs))} if len(rows) else {}
        path = histories_file(self.merge.part, bucket)
        histories = to_histories(rows, self.songs, self.merge.contexts, has_skipped=self.merge.has_skipped, likes=likes)
        return {path: write_histories(self.staging.workspace, self.staging.out(path), [histories])}

    def _write_table(self, path: str, table: pa.Table) -> str:
        return self.staging.workspace.write_table(self.staging.out(path), table)
