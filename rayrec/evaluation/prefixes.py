"""Given pairs of a prefix and the song that came next, such as published test sets are made of.

A text file, one pair a line: `song song song<TAB>target`, songs by their outside ids. There are no
times: songs count as played three minutes apart, the last one three minutes before the request.

Q pairs, P songs of all prefixes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data.histories import Histories, Queries
from rayrec.errors import InputError
from rayrec.evaluation.accumulator import RETURN_BYTES, VIEWS, CellRange, MetricAccumulator
from rayrec.evaluation.protocol import GROUPS, EvaluateConfig, HeardSongs, TargetSongs
from rayrec.evaluation.ranks import metrics_of, rank_targets
from rayrec.importing.readers.reader import Unit, read_blocks
from rayrec.recommend.answer import ASSUMED_GAP_MS
from rayrec.recommend.base import BaseRecommender

BLOCK_BYTES = 1 << 18  # about 7,000 short lines, each with a weight in every bootstrap sample
SHOWN = 60  # characters of a line that cannot be read


@dataclass(frozen=True, kw_only=True)
class PrefixFile:
    """A file of pairs and how its lines read."""

    path: str  # or URI; .gz too
    item_separator: str = " "  # between the songs of a prefix
    target_separator: str = "\t"  # before the target, the last one of a line

    def __post_init__(self) -> None:
        for name in ("item_separator", "target_separator"):
            object.__setattr__(self, name, getattr(self, name).replace("\\t", "\t"))
            if not getattr(self, name):
                raise InputError(
                    f"{name} is empty; give what stands there in each line, such as a space or \\t for a tab"
                )
        if self.item_separator == self.target_separator:
            raise InputError(f"both separators are {self.item_separator!r}; they must differ")


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """Pairs as songs of the catalog; what it does not know is one more song, the row behind its last."""

    histories: Histories  # Q users, each named by its line
    targets: np.ndarray  # int64 (Q,)
    num_songs: int  # of the catalog

    def take(self, rows: np.ndarray) -> Prefixes:
        """The pairs at `rows`, int or bool (Q,)."""
        return Prefixes(histories=self.histories.take(rows), targets=self.targets[rows], num_songs=self.num_songs)

    @property
    def counts(self) -> np.ndarray:
        """int64 (3,): pairs, targets that the catalog does not know, songs of prefixes that it does not know."""
        unknown = (self.targets, self.histories.songs)
        return np.array([len(self.targets), *(np.count_nonzero(songs == self.num_songs) for songs in unknown)])


def read_prefixes(unit: Unit, file: PrefixFile, song_ids: pa.ChunkedArray) -> Iterator[Prefixes]:
    """The pairs whose lines begin in a unit, in blocks; empty lines are passed over.

    `song_ids` are the outside ids of the catalog, by row. Raises `InputError` for a line without a target.
    """
    for block in read_blocks(unit, BLOCK_BYTES):
        lines = pc.utf8_trim(pa.array(block.texts(range(len(block))), pa.string()), characters="\r\n \ufeff")
        yield parse_prefixes(lines.filter(pc.greater(pc.utf8_length(lines), 0)), file, song_ids)


def parse_prefixes(lines: pa.Array, file: PrefixFile, song_ids: pa.ChunkedArray) -> Prefixes:
    """Lines, strings (Q,), as pairs. Raises `InputError` for a line without a target."""
    halves = pc.split_pattern(lines, file.target_separator, max_splits=1, reverse=True)
    whole = pc.list_value_length(halves).to_numpy() == 2
    if not whole.all():
        line = lines[int(np.argmin(whole))].as_py()
        raise InputError(
            f"{file.path} has a line without {file.target_separator!r} before a target: {line[:SHOWN]!r}; "
            "expected the songs of a prefix and then the song that followed"
        )
    flat = pc.list_flatten(halves)
    prefixes, targets = flat.take(pa.array(np.arange(0, len(flat), 2))), flat.take(pa.array(np.arange(1, len(flat), 2)))
    items = pc.split_pattern(prefixes, file.item_separator)
    songs = pc.utf8_trim_whitespace(pc.list_flatten(items))
    is_filled = pc.greater(pc.utf8_length(songs), 0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(lines)), pc.list_value_length(items).to_numpy())[is_filled]
    lengths = np.bincount(rows, minlength=len(lines))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    histories = Histories(
        user_ids=lines.to_numpy(zero_copy_only=False),
        offsets=offsets,
        songs=_rows(songs.filter(pa.array(is_filled)), song_ids).astype(np.int32),
        played_at=ASSUMED_GAP_MS * (np.arange(offsets[-1]) - offsets[rows]),
    )
    return Prefixes(
        histories=histories, targets=_rows(pc.utf8_trim_whitespace(targets), song_ids), num_songs=len(song_ids)
    )


def _rows(names: pa.Array, song_ids: pa.ChunkedArray) -> np.ndarray:
    """int64: the rows of outside ids, len(song_ids) where there is none."""
    rows = pc.fill_null(pc.index_in(names, value_set=song_ids), len(song_ids))
    return np.asarray(rows.to_numpy(zero_copy_only=False), dtype=np.int64)


class PrefixEvaluator:
    """Answers each pair as the query of a new user and adds up metrics.

    `song_plays` is (N,), as for the `Evaluator`; a target without a play there, or unknown to the catalog, is a miss.
    Pairs are what the bootstrap draws, by the text of their lines.
    """

    def __init__(
        self, recommenders: Sequence[BaseRecommender], *, song_plays: np.ndarray, config: EvaluateConfig
    ) -> None:
        self.recommenders, self.known_songs, self.config = recommenders, song_plays > 0, config

    def empty(self, cells: int = CellRange().count) -> MetricAccumulator:
        """The sums of no pairs."""
        return MetricAccumulator.empty(cells=cells, models=len(self.recommenders), ks=len(self.config.ks))

    @property
    def cells_at_once(self) -> int:
        """How many bootstrap cells one return value may hold."""
        return max(1, RETURN_BYTES // self.empty(1).bytes_of_cell)

    def __call__(self, prefixes: Prefixes, cells: CellRange | None = None) -> MetricAccumulator:
        """The sums of some pairs."""
        cells = cells or CellRange()
        sums, histories, targets = self.empty(cells.count), prefixes.histories, self._targets(prefixes)
        queries = Queries.at_end(histories, ASSUMED_GAP_MS * histories.lengths)
        cell, group = cells.cells_of(histories.user_ids), GROUPS.index("new")
        for name, target in targets.items():
            sums.users[VIEWS.index(name), group] = np.count_nonzero(target.sizes)
            np.add.at(sums.queries[:, VIEWS.index(name), group], cell, target.sizes)
        for model, recommender in enumerate(self.recommenders):
            ranked = rank_targets(recommender, histories, queries, targets, self.known_songs, depth=max(self.config.ks))
            for name, target in targets.items():
                metrics = metrics_of(ranked.ranks[name], target.rows, target.sizes, self.config.ks)
                np.add.at(sums.metrics[:, model, VIEWS.index(name), group], cell, metrics)
        return sums

    @staticmethod
    def _targets(prefixes: Prefixes) -> dict[str, TargetSongs]:
        """The target of each pair, and as served where it is not a song of the prefix."""
        histories, rows = prefixes.histories, np.arange(len(prefixes.histories))
        new = np.flatnonzero(~HeardSongs(histories)(rows, histories.lengths, prefixes.targets))
        sizes = np.ones(len(rows), dtype=np.int64)
        return {
            "served": TargetSongs(
                rows=new,
                songs=prefixes.targets[new],
                sizes=np.bincount(new, minlength=len(rows)),
                served=True,
            ),
            "next": TargetSongs(rows=rows, songs=prefixes.targets, sizes=sizes),
        }
