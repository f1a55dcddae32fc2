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
from rayrec.data.dataset import NOBODY, Dataset, ForgottenUsers, read_files, read_overlap, read_users, with_columns
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
LIKE_ALONE = "like of a user without plays"
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
        until = forgotten.until(self.plays.owners)
        plays, liked_plays, likes = (
            rows.keep(rows.order > until[rows.owner]) for rows in (self.plays, self.liked_plays, self.likes)
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
    listed = [(files, offsets, rows) for files, offsets, rows in parts if rows.num_rows]
    if not listed:
        nothing = _no_rows(np.zeros(0, object))
        return PlaysAndLikes(plays=nothing, liked_plays=nothing, likes=nothing)
    table = pa.concat_tables([rows for _, _, rows in listed]).combine_chunks()
    source, line = (np.concatenate(values) for values in zip(*(_lines(*part) for part in listed), strict=True))
    encoded = one_array(table.column(OWNER)).dictionary_encode()
    names = encoded.dictionary.to_numpy(zero_copy_only=False)
    ascending = np.argsort(names)
    rank = np.empty(len(names), dtype=np.int64)
    rank[ascending] = np.arange(len(names))
    owner = rank[encoded.indices.to_numpy()]
    moment = table.column(ORDER).to_numpy()
    sequence = np.lexsort((moment, line, source, owner) if in_lines else (moment, owner))
    skipped = pc.fill_null(one_array(table.column(columns.SKIPPED)), False).to_numpy(zero_copy_only=False)
    rows = MergedRows(
        owners=names[ascending],
        owner=owner[sequence],
        order=moment[sequence],
        key=table.column(KEY).to_numpy()[sequence],
        contexts=one_array(table.column(columns.CONTEXTS)).take(pa.array(sequence)),
        skipped=skipped[sequence],
        source=source[sequence],
        line=line[sequence],
    )
    nothing = _no_rows(rows.owners)
    if in_lines:
        return PlaysAndLikes(plays=rows, liked_plays=nothing, likes=nothing)
    if table.column(columns.LIKED).null_count == len(table):
        plays = _distinct(rows)
        return PlaysAndLikes(plays=plays, liked_plays=nothing, likes=nothing, merged=len(rows) - len(plays))
    liked, is_play = (
        pc.fill_null(one_array(table.column(name)), missing).to_numpy(zero_copy_only=False)[sequence]
        for name, missing in ((columns.LIKED, False), (columns.IS_PLAY, True))
    )
    plays, liked_plays, likes = (_distinct(rows.keep(mask)) for mask in (is_play, is_play & liked, ~is_play & liked))
    return PlaysAndLikes(plays=plays, liked_plays=liked_plays, likes=likes, merged=len(rows) - len(plays) - len(likes))


def _distinct(rows: MergedRows) -> MergedRows:
    return rows.keep(_first_of_each(rows)) if len(rows) else rows


def _lines(files: Sequence[int], offsets: Sequence[int], rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the file number and the line of each row, two int64 (R,) arrays; zeros if lines were not kept."""
    if rows.column(LINE).null_count:
        return np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    unit = rows.column(UNIT).to_numpy()
    return np.asarray(files, dtype=np.int64)[unit], np.asarray(offsets)[unit] + rows.column(LINE).to_numpy()


def _first_of_each(rows: MergedRows) -> np.ndarray:
    """bool (R,): True for rows that are not duplicates of earlier ones."""
    by_song = np.lexsort((rows.key, rows.order, rows.owner))
    owner, order, key = rows.owner[by_song], rows.order[by_song], rows.key[by_song]
    repeated = (owner[1:] == owner[:-1]) & (order[1:] == order[:-1]) & (key[1:] == key[:-1])
    first = np.ones(len(rows), dtype=bool)
    first[by_song[1:]] = ~repeated
    return first


def to_positions(rows: MergedRows) -> MergedRows:
    """Replace the places of rows in lines by positions, in ms: an owner's first row is at 0, each next row of the line
    is 3 minutes later, and the first row of the owner's next line is 63 minutes after the row before it."""
    same_owner = rows.owner[1:] == rows.owner[:-1]
    same_line = same_owner & (rows.source[1:] == rows.source[:-1]) & (rows.line[1:] == rows.line[:-1])
    steps = np.zeros(len(rows), dtype=np.int64)
    steps[1:] = np.where(same_line, ASSUMED_GAP_MS, LINE_GAP_MS) * same_owner
    times = np.cumsum(steps)
    first = np.searchsorted(rows.owner, rows.owner)
    return replace(rows, order=times - times[first])


def _no_rows(owners: np.ndarray) -> MergedRows:
    whole, keys = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    return MergedRows(
        owners=owners,
        owner=whole,
        order=whole,
        key=keys,
        contexts=pa.array([], pa.list_(pa.string())),
        skipped=np.zeros(0, bool),
        source=whole,
        line=whole,
    )


def song_counts(rows: MergedRows, min_rows: int, known: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the songs of owners with at least `min_rows` rows: their keys, uint64, and numbers of rows, int64.

    Owners in `known`, bool (O,), already have plays in the data set and count with any number of rows.
    """
    enough = ((rows.counts() >= min_rows) | _none_unless(known, rows))[rows.owner]
    keys, counts = np.unique(rows.key[enough], return_counts=True)
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
    rows: MergedRows, song_rows: SongRows, min_rows: int, reasons: tuple[str, str], known: np.ndarray | None = None
) -> tuple[MergedRows, Dropped]:
    """Return the rows whose song is in the vocabulary and whose owner has at least `min_rows` of them, and the others.

    `reasons` are the reasons for dropping an owner and a song with too few rows. Owners in `known`, bool (O,), already
    have plays in the data set and are kept with any number of rows.
    """
    dropped = Dropped()
    too_few, too_rare = reasons

    def drop_owners(rows: MergedRows) -> MergedRows:
        enough = ((rows.counts() >= min_rows) | _none_unless(known, rows))[rows.owner]
        dropped.add(rows.keep(~enough), too_few)
        return rows.keep(enough)

    rows = drop_owners(rows)
    in_vocabulary = song_rows.find(rows.key) >= 0
    dropped.add(rows.keep(~in_vocabulary), too_rare)
    return drop_owners(rows.keep(in_vocabulary)), dropped


def usable_likes(
    rows: PlaysAndLikes, with_plays: np.ndarray, song_rows: SongRows, too_rare: str, dropped: Dropped
) -> PlaysAndLikes:
    """Return `rows` with only the likes of songs in the vocabulary by owners in `with_plays`, bool (O,).

    Other likes in rows that are no plays are added to `dropped`.
    """
    likes, liked_plays = (part.keep(with_plays[part.owner]) for part in (rows.likes, rows.liked_plays))
    dropped.add(rows.likes.keep(~with_plays[rows.likes.owner]), LIKE_ALONE)
    dropped.add(likes.keep(song_rows.find(likes.key) < 0), too_rare)
    likes, liked_plays = (part.keep(song_rows.find(part.key) >= 0) for part in (likes, liked_plays))
    return replace(rows, likes=likes, liked_plays=liked_plays)


def all_likes(rows: PlaysAndLikes) -> MergedRows:
    """Return the likes in rows that are no plays and in plays, without duplicates (same owner, song and time)."""
    both = (rows.likes, rows.liked_plays)
    if not len(rows.liked_plays):
        return rows.likes
    owner, order, key, skipped, source, line = (
        np.concatenate([getattr(part, name) for part in both])
        for name in ("owner", "order", "key", "skipped", "source", "line")
    )
    by_time = np.lexsort((order, owner))
    joined = MergedRows(
        owners=rows.plays.owners,
        owner=owner[by_time],
        order=order[by_time],
        key=key[by_time],
        contexts=pa.concat_arrays([part.contexts for part in both]).take(pa.array(by_time)),
        skipped=skipped[by_time],
        source=source[by_time],
        line=line[by_time],
    )
    return _distinct(joined)


def _none_unless(known: np.ndarray | None, rows: MergedRows) -> np.ndarray:
    """bool (O,): `known`, or False for all owners if it is None."""
    return np.zeros(len(rows.owners), dtype=bool) if known is None else known


def rows_among(rows: MergedRows, songs: np.ndarray, histories: Histories) -> np.ndarray:
    """int64: indices of the rows that have the same user, time and song as a play in `histories`.

    `songs`, int32 (R,), are the song rows of `rows`, -1 for new songs.
    """
    place = pd.Index(rows.owners).get_indexer(pd.Index(histories.user_ids))
    plays = histories.take(place >= 0)
    plays = plays.keep((plays.played_at >= rows.order.min()) & (plays.played_at <= rows.order.max()))
    owner = place[place >= 0][plays.rows]
    owner_rows = np.flatnonzero(np.isin(rows.owner, owner))
    mine = pd.MultiIndex.from_arrays([rows.owner[owner_rows], rows.order[owner_rows], songs[owner_rows]])
    is_among: np.ndarray = mine.isin(pd.MultiIndex.from_arrays([owner, plays.played_at, plays.songs]))
    return np.asarray(owner_rows[is_among])


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
    present = rows.counts() > 0
    if likes is not None:
        present |= likes.counts() > 0
    owners, offsets = _spans(rows, present)
    liked = None
    if likes is not None:
        liked = Histories(
            user_ids=owners,
            offsets=_spans(likes, present)[1],
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
        likes=liked,
    )


def to_playlists(rows: MergedRows, song_rows: SongRows) -> pa.Table:
    """Convert rows to columns.PLAYLISTS, one row per playlist."""
    owners, offsets = _spans(rows, rows.counts() > 0)
    songs = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(song_rows.find(rows.key)))
    return pa.table([pa.array(owners, pa.string()), songs], schema=columns.PLAYLISTS)


def _spans(rows: MergedRows, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the owners in `present`, bool (O,), and the offsets of their rows, int64."""
    counts = rows.counts()[present]
    return rows.owners[present], offsets_of(counts)


def context_bits(names: pa.Array, contexts: list[str]) -> np.ndarray:
    """int32 (R,): the contexts of each row as bits; bit i is `contexts[i]`, and other names are left out."""
    bit = pc.index_in(pc.list_flatten(names), value_set=pa.array(contexts, pa.string()))
    row = pc.list_parent_indices(names).to_numpy()
    known = bit.is_valid().to_numpy(zero_copy_only=False)
    place = pc.fill_null(bit, 0).to_numpy()[known]
    bits = np.zeros(len(names), dtype=np.int32)
    np.bitwise_or.at(bits, row[known], np.left_shift(np.int32(1), place.astype(np.int32)))
    return bits


def choose_contexts(counts: dict[str, int], before: Sequence[str] = ()) -> list[str]:
    """Return the names of the context bits, at most 31: those in `before`, then new ones, the most frequent first."""
    new = sorted(counts.keys() - set(before), key=lambda name: (-counts[name], name))
    return [*before, *new][:MAX_CONTEXTS]


def joined_spans(parts: int, cuts: Iterable[int]) -> Spans:
    """Join parts 0 to `parts` - 1 into as few spans as possible, with a new span at each of the `cuts`.

    A cut is the number of a part: plays from it on must be readable alone, for artifacts that continue from there.
    """
    bounds = sorted({0, parts, *(cut for cut in cuts if 0 < cut < parts)})
    return [(first, after - 1) for first, after in pairwise(bounds)]


class BucketJoiner:
    """Joins the parts of one bucket at a time into one file per span of parts."""

    def __init__(self, staging: Staging, dataset: Dataset, spans: Sequence[tuple[int, int]]) -> None:
        self.staging, self.dataset, self.spans = staging, dataset, spans

    def __call__(self, bucket: int) -> tuple[int, dict[str, str]]:
        """Write the files of one bucket, then its result; return the bucket, and path -> sha256."""
        files = {}
        for first, last in self.spans:
            path = histories_file(first, bucket, last)
            earlier = self.dataset.manifest.histories_files(bucket, first, last + 1)
            batches = (
                with_columns(
                    histories,
                    contexts=bool(self.dataset.manifest.contexts),
                    skipped=self.dataset.manifest.has_skipped,
                    likes=self.dataset.manifest.has_likes,
                )
                for histories in read_files(self.dataset.workspace, earlier, USERS_PER_READ)
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
    forgotten: ForgottenUsers = NOBODY  # deleted users; their plays from before the deletion are left out

    @property
    def part(self) -> int:
        """The number of the part of the histories that is written."""
        return self.base.parts if self.base else 0

    def rows_of(self, group: BucketGroup, bucket: int) -> PlaysAndLikes:
        """Return the sorted rows of a bucket, including those of deleted users."""
        parts = (
            (
                [self.files[unit] for unit in self.pieces[piece]],
                [self.offsets[unit] for unit in self.pieces[piece]],
                rows,
            )
            for piece, rows in group.read(bucket)
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
            rows = self.staging.fragments.read_group(self.offsets, first, last, spool)
            return [(bucket, self.run(bucket, rows)) for bucket in range(first, last + 1) if bucket in self.buckets]

    def run(self, bucket: int, group: BucketGroup) -> Any:
        """Process one bucket and return its result."""
        raise NotImplementedError


class KeyCounter(_GroupWorker):
    """Counts the plays of each song in a bucket."""

    def run(self, bucket: int, group: BucketGroup) -> None:
        """Write the counts of one bucket."""
        rows = self.merge.rows_of(group, bucket).without_forgotten(self.merge.forgotten).plays
        earlier = EarlierParts(self.staging.workspace, self.merge.base, bucket)
        keys, counts = song_counts(rows, self.config.min_user_plays, earlier.knows(rows.owners))
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
        known = rows.keep(self.knows(rows.owners)[rows.owner])
        if self.base is None or not len(known):
            return rows
        first, last = int(known.order.min()), int(known.order.max())
        files = self.base.files_between(self.bucket, first, last)
        row_songs = songs.find(rows.key)
        repeated: np.ndarray = np.zeros(len(rows), dtype=bool)
        owners = known.owners[np.unique(known.owner)]
        for path in files:
            for histories in read_overlap(self.workspace, path, owners, first, last):
                repeated[rows_among(rows, row_songs, histories)] = True
        return rows.keep(~repeated)


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

    def run(self, bucket: int, group: BucketGroup) -> dict[str, Any]:
        """Write the files of one bucket, then its result."""
        earlier = EarlierParts(self.staging.workspace, self.merge.base, bucket)
        everything = self.merge.rows_of(group, bucket)
        remaining = everything.without_forgotten(self.merge.forgotten)
        of_deleted = len(everything) - len(remaining)
        known = earlier.knows(remaining.plays.owners)
        distinct = earlier.without(remaining.plays, self.songs)
        merged = everything.merged + len(remaining.plays) - len(distinct)
        rows, dropped = drop_rare(distinct, self.songs, self.config.min_user_plays, self.config.drop_reasons, known)
        rows = to_positions(rows) if self.merge.in_lines else rows
        is_new = (rows.counts() > 0) & ~known
        too_rare = self.config.drop_reasons[1]
        liked = usable_likes(remaining, (rows.counts() > 0) | known, self.songs, too_rare, dropped)
        files = self._write_rows(bucket, rows, all_likes(liked) if self.merge.has_likes else None)
        if self.config.produces == "plays" and (is_new.any() or not self.merge.part):
            path = users_file(self.merge.part, bucket)
            user_ids = np.union1d(earlier.users, rows.owners[is_new])
            files[path] = self._write_table(path, pa.table({columns.USER: pa.array(user_ids, pa.string())}))
        if dropped.rows:
            path = rejected_rows_file(self.config.produces, self.merge.part, f"{bucket:05d}")
            files[path] = self._write_table(path, dropped.table(self.merge.sources))
        result = {
            "rows": len(rows),
            "likes": len(liked.likes),
            "owners": int(is_new.sum()),
            "merged": merged,
            "dropped": dropped.counts() | ({FORGOTTEN_USER: of_deleted} if of_deleted else {}),
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
