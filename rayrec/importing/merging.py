"""The second pass of an import: the fragments of one bucket become sorted histories or playlists."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.columns import one_array
from rayrec.data.dataset import Dataset
from rayrec.data.forgotten import ForgottenUsers
from rayrec.data.histories import Histories
from rayrec.data.parts import read_files, with_columns
from rayrec.importing.fragments import KEY, LINE, ORDER, OWNER, UNIT
from rayrec.importing.staging import Staging, write_histories
from rayrec.importing.vocabulary import SongRows
from rayrec.storage.workspace import histories_file

FORGOTTEN_USER = "user was deleted"  # the reason of plays from before the deletion
LIKE_ALONE = "like of a user without plays"
MAX_CONTEXTS = 31  # bits of an int32 without its sign
POSITION_MS = 180_000  # from one position to the next: about a song, so that no session gap falls within a line
LINE_GAP = 20  # positions left out between two lines of a user: an hour, so that a session gap does
USERS_PER_READ = 5_000
PARTS_BEFORE_COMPACT = 8  # above them, reading takes noticeably more requests
Spans = list[tuple[int, int]]  # first and last part of each set of files


@dataclass(frozen=True, kw_only=True)
class MergedRows:
    """R rows of one bucket, sorted by owner and then by order; rows that tie stay in the order of import."""

    owners: np.ndarray  # object (O,), strings, ascending
    owner: np.ndarray  # int64 (R,), place in `owners`, ascending
    order: np.ndarray  # int64 (R,), ms UTC or position
    key: np.ndarray  # uint64 (R,)
    contexts: pa.Array  # list<string> (R,)
    skipped: np.ndarray  # bool (R,), false where not known
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
        """int64 (O,): rows of each owner."""
        return np.bincount(self.owner, minlength=len(self.owners))


@dataclass(frozen=True, kw_only=True)
class PlaysAndLikes:
    """What the pieces of input hold of one bucket. Plays and likes have the same owners."""

    plays: MergedRows
    liked_plays: MergedRows  # of the plays those whose rows say that the user likes the song
    likes: MergedRows  # rows that are no plays
    merged: int = 0  # exact duplicates that were left out

    def __len__(self) -> int:
        return len(self.plays) + len(self.likes)

    def without_forgotten(self, forgotten: ForgottenUsers) -> "PlaysAndLikes":
        """Those that are not from before their owner was deleted. Positions in lines are before any moment."""
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
    """Rows out of pieces of input in the order of import, exact duplicates (owner, order, song) merged.

    A part is the number of the file of each unit of a piece, the line of that file before the unit's first, and
    the piece's rows. Of duplicates the first in the order of import stays. Where rows are `in_lines`, the order is a
    place in the line: an owner's lines follow each other as they came, and nothing is a duplicate.
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
    """int64 (R,) twice: the number of the file of each row and its line there; zeros where they were not kept."""
    if rows.column(LINE).null_count:
        return np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    unit = rows.column(UNIT).to_numpy()
    return np.asarray(files, dtype=np.int64)[unit], np.asarray(offsets)[unit] + rows.column(LINE).to_numpy()


def _first_of_each(rows: MergedRows) -> np.ndarray:
    by_song = np.lexsort((rows.key, rows.order, rows.owner))
    owner, order, key = rows.owner[by_song], rows.order[by_song], rows.key[by_song]
    repeated = (owner[1:] == owner[:-1]) & (order[1:] == order[:-1]) & (key[1:] == key[:-1])
    first = np.ones(len(rows), dtype=bool)
    first[by_song[1:]] = ~repeated
    return first


def to_positions(rows: MergedRows) -> MergedRows:
    """Rows in lines with positions for times: an owner's first row is at 0, the next 3 minutes later,
    the first of the owner's next line an hour after that."""
    same_owner = rows.owner[1:] == rows.owner[:-1]
    same_line = same_owner & (rows.source[1:] == rows.source[:-1]) & (rows.line[1:] == rows.line[:-1])
    steps = np.zeros(len(rows), dtype=np.int64)
    steps[1:] = np.where(same_line, 1, 1 + LINE_GAP) * same_owner
    place = np.cumsum(steps)
    first = np.searchsorted(rows.owner, rows.owner)
    return replace(rows, order=(place - place[first]) * POSITION_MS)


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
    """Keys, uint64, and numbers of rows, int64, of the songs of owners with at least `min_rows` rows.

    Owners who are `known` already, bool (O,), count however few rows they have.
    """
    enough = ((rows.counts() >= min_rows) | _none_unless(known, rows))[rows.owner]
    keys, counts = np.unique(rows.key[enough], return_counts=True)
    return keys, counts


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Rows that are left out because their owner or song has too few."""

    rows: list[MergedRows] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def add(self, rows: MergedRows, reason: str) -> None:
        """Rows that share a reason."""
        if len(rows):
            self.rows.append(rows)
            self.reasons.append(reason)

    def counts(self) -> dict[str, int]:
        """Reason -> rows."""
        totals: dict[str, int] = {}
        for rows, reason in zip(self.rows, self.reasons, strict=True):
            totals[reason] = totals.get(reason, 0) + len(rows)
        return totals

    def table(self, sources: list[str]) -> pa.Table:
        """columns.REJECTED; `sources` are the files by number. The text names owner and time or position."""
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
    """The rows whose song is in the vocabulary and whose owner has at least `min_rows` of them.

    `reasons` are those of an owner and of a song with too few rows. Owners who are `known` already,
    bool (O,), stay however few rows they have.
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
    """The likes of songs in the vocabulary by owners `with_plays`, bool (O,); other rows of likes go to `dropped`."""
    likes, liked_plays = (part.keep(with_plays[part.owner]) for part in (rows.likes, rows.liked_plays))
    dropped.add(rows.likes.keep(~with_plays[rows.likes.owner]), LIKE_ALONE)
    dropped.add(likes.keep(song_rows.find(likes.key) < 0), too_rare)
    likes, liked_plays = (part.keep(song_rows.find(part.key) >= 0) for part in (likes, liked_plays))
    return replace(rows, likes=likes, liked_plays=liked_plays)


def all_likes(rows: PlaysAndLikes) -> MergedRows:
    """The likes of rows that are no plays and of those that are, each song and moment once."""
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
    return np.zeros(len(rows.owners), dtype=bool) if known is None else known


def rows_among(rows: MergedRows, songs: np.ndarray, histories: Histories) -> np.ndarray:
    """int64: the rows whose user, time and song are those of a play in `histories`.

    `songs`, int32 (R,), are the song rows of `rows`, -1 where they are new.
    """
    place = pd.Index(rows.owners).get_indexer(pd.Index(histories.user_ids))
    plays = histories.take(place >= 0)
    plays = plays.keep((plays.played_at >= rows.order.min()) & (plays.played_at <= rows.order.max()))
    owner = place[place >= 0][plays.rows]
    asked = np.flatnonzero(np.isin(rows.owner, owner))
    mine = pd.MultiIndex.from_arrays([rows.owner[asked], rows.order[asked], songs[asked]])
    found: np.ndarray = mine.isin(pd.MultiIndex.from_arrays([owner, plays.played_at, plays.songs]))
    return np.asarray(asked[found])


def to_histories(
    rows: MergedRows,
    song_rows: SongRows,
    contexts: list[str],
    *,
    has_skipped: bool,
    likes: MergedRows | None = None,
) -> Histories:
    """The histories of the owners who have plays or likes; `likes`, where the data has any, are of the same owners.

    `contexts` are the names of the bits, at most 31.
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
    """columns.PLAYLISTS."""
    owners, offsets = _spans(rows, rows.counts() > 0)
    songs = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(song_rows.find(rows.key)))
    return pa.table([pa.array(owners, pa.string()), songs], schema=columns.PLAYLISTS)


def _spans(rows: MergedRows, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The owners who are `present`, bool (O,), and int64 offsets of their rows."""
    counts = rows.counts()[present]
    return rows.owners[present], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def context_bits(names: pa.Array, contexts: list[str]) -> np.ndarray:
    """int32 (R,): the set of contexts of each row; names that are not among `contexts` leave no bit."""
    bit = pc.index_in(pc.list_flatten(names), value_set=pa.array(contexts, pa.string()))
    row = pc.list_parent_indices(names).to_numpy()
    known = bit.is_valid().to_numpy(zero_copy_only=False)
    place = pc.fill_null(bit, 0).to_numpy()[known]
    bits = np.zeros(len(names), dtype=np.int32)
    np.bitwise_or.at(bits, row[known], np.left_shift(np.int32(1), place.astype(np.int32)))
    return bits


def choose_contexts(counts: dict[str, int], before: Sequence[str] = ()) -> list[str]:
    """The names of the bits, at most 31: those `before`, then the most frequent contexts, the most frequent first."""
    new = sorted(counts.keys() - set(before), key=lambda name: (-counts[name], name))
    return [*before, *new][:MAX_CONTEXTS]


def joined_spans(parts: int, cuts: Iterable[int]) -> Spans:
    """Parts from 0 up to `parts` as few spans: parts stay apart at `cuts`, from where something goes on reading."""
    bounds = sorted({0, parts, *(cut for cut in cuts if 0 < cut < parts)})
    return [(first, after - 1) for first, after in pairwise(bounds)]


class BucketJoiner:
    """Writes the files of one bucket for some spans of parts at a time."""

    def __init__(self, staging: Staging, dataset: Dataset, spans: Sequence[tuple[int, int]]) -> None:
        self.staging, self.dataset, self.spans = staging, dataset, spans

    def __call__(self, bucket: int) -> tuple[int, dict[str, str]]:
        """Write the files of one bucket, then note that it is done; the bucket, and path -> sha256."""
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
