"""Answer the queries of a batch of users, or given prefixes of songs, with every model and add up metrics.

Each model scores each query once per horizon; the ranks of all targets and the recommended songs follow from these
scores. Values that are the same for all models are computed once per block of users. An evaluator can be stored in
files; all processes of a node then map its arrays into memory, so that a node holds them only once.

Published test sets consist of pairs of a prefix and the song that came next, one pair per line: `song song
song<TAB>target`, with the song ids of the imported data. They have no times: songs count as played three minutes apart,
the last one three minutes before the request.

N songs, R retrievers, Q queries or pairs, U users, G groups of users, S slices, C bootstrap cells, K columns.
"""

from __future__ import annotations

import io
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from rayrec.config import Settings
from rayrec.data.histories import Histories, Queries, user_hash
from rayrec.data.moments import ASSUMED_GAP_MS
from rayrec.data.ragged import group_of_each_item, offsets_of
from rayrec.data.split import Split
from rayrec.errors import InputError
from rayrec.evaluation.accumulator import (
    COVERAGE_SONGS,
    LAST,
    LISTED,
    PAIRED,
    RETURN_BYTES,
    SLICED,
    VIEWS,
    CellRange,
    MetricAccumulator,
    RandomSongs,
    cosine_sums,
    curves_of,
    pair_sums,
    popularity_ranks,
)
from rayrec.evaluation.calibration import CALIBRATED
from rayrec.evaluation.protocol import (
    GROUPS,
    OFFSETS,
    EvaluateConfig,
    HeardSongs,
    TargetSongs,
    blocks,
    day_targets,
    first_plays,
    horizon_of,
    in_mask,
    plays_to_predict,
    slice_masks,
    slices_of,
    target_songs,
    user_groups,
    usual_k,
)
from rayrec.evaluation.ranks import NOT_FOUND, Ranked, metric_columns, metrics_of, rank_targets
from rayrec.importing.readers.reader import Unit, read_blocks
from rayrec.model.train_config import DaysHorizon
from rayrec.recommend.base import BaseRecommender, CandidateRecommender, VectorRecommender
from rayrec.recommend.index import INDEX_FILE, import_faiss
from rayrec.storage.workspace import Workspace, location_of

ARRAYS_FILE = "arrays.bin"
ALIGNED = 64  # bytes; each array begins at a multiple of it

EvaluatorType = TypeVar("EvaluatorType")  # Evaluator or PrefixEvaluator

PREFIX_BLOCK_BYTES = 1 << 18  # about 7,000 short lines
SHOWN_CHARACTERS = 60  # shown of a line that cannot be read


@dataclass(frozen=True, kw_only=True)
class QueryBlock:
    """A block of users with their queries and target songs, and the cells, groups, views and slices of each query."""

    histories: Histories
    queries: Queries
    cells: np.ndarray  # int64 (U,), the bootstrap cell of each user
    num_cells: int  # C
    groups: np.ndarray  # int64 (U,), the index in GROUPS of each user
    targets: dict[str, TargetSongs]  # of OFFSETS, then of targets in days
    counted: dict[str, np.ndarray]  # view -> bool (Q,), the queries that count in it
    slices: np.ndarray  # bool (S, Q)
    drawn: np.ndarray  # bool (Q,), queries of the users drawn for curves, pairs and lists
    heard: HeardSongs

    @classmethod
    def of(
        cls,
        histories: Histories,
        plays: np.ndarray,
        split: Split,
        config: EvaluateConfig,
        curve_share: float,
        contexts: Sequence[str],
        cells: CellRange,
        known_songs: np.ndarray,
        days: Mapping[str, DaysHorizon],
        network: VectorRecommender | None = None,
    ) -> QueryBlock:
        """Create the block of the queries whose next plays are at positions `plays`, int (Q,).

        `known_songs` is as in `target_songs`, `days` is the result of `day_targets`, `network` is as in `slice_masks`.
        """
        queries = Queries.before_plays(histories, plays)
        is_sampled = user_hash(histories.user_ids, salt=f"curves {config.seed} ") / 2.0**64 < curve_share
        heard_songs = HeardSongs(histories)
        is_repeat = heard_songs(queries.rows, queries.plays_before, histories.songs[plays])
        targets = {
            name: target_songs(histories, queries, name, heard_songs, known_songs, days.get(name))
            for name in (*OFFSETS, *days)
        }
        counted_masks = {name: target.sizes > 0 for name, target in targets.items()}
        is_last = plays == histories.offsets[queries.rows + 1] - 1
        predicted_counts = np.bincount(histories.rows[plays_to_predict(histories, split)], minlength=len(histories))
        return cls(
            histories=histories,
            queries=queries,
            cells=cells.cells_of(histories.user_ids),
            num_cells=cells.count,
            groups=user_groups(histories, split),
            targets=targets,
            counted={**counted_masks, "next_new": ~is_repeat, "next_repeat": is_repeat, LAST: is_last},
            slices=slice_masks(histories, queries, predicted_counts, contexts, network),
            drawn=is_sampled[queries.rows],
            heard=heard_songs,
        )

    def sums(self, values: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float64 (C, G, K): the sums of `values`, (Q, K), by cell and group; with `mask`, (Q,), of its queries."""
        selected_rows = np.arange(len(self.queries)) if mask is None else np.flatnonzero(mask)
        users = self.queries.rows[selected_rows]
        keys = self.cells[users] * len(GROUPS) + self.groups[users]
        size = self.num_cells * len(GROUPS)
        columns = [np.bincount(keys, weights=column, minlength=size) for column in values[selected_rows].T]
        return np.stack(columns, axis=1).reshape(self.num_cells, len(GROUPS), -1)

    def sum_users_by_cell(self, values: np.ndarray) -> np.ndarray:
        """float64 (C, ...): the sums of `values`, (U, ...), by cell."""
        cell_sums = np.zeros((self.num_cells, *values.shape[1:]))
        np.add.at(cell_sums, self.cells, values)
        return cell_sums


QUERIES_PER_BLOCK = 1 << 16


class Evaluator:
    """Evaluates recommenders on whole histories.

    `song_plays`, (N,), is the number of plays of each song in the fit range. A song without a play is a miss for every
    model, unless it was added to the model. `curve_share` in [0, 1] is the share of users, drawn by hash, for the
    curves, the pairs and the recommended lists. `contexts` names the bits of the plays' contexts. `chosen_users` takes
    user ids, object (U,), and returns which of them are evaluated, bool (U,).
    """

    def __init__(
        self,
        recommenders: Sequence[BaseRecommender],
        *,
        split: Split,
        song_plays: np.ndarray,
        config: EvaluateConfig,
        curve_share: float = 1.0,
        contexts: Sequence[str] = (),
        chosen_users: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.recommenders = recommenders
        self.split = split
        self.song_plays = song_plays
        self.known_songs = song_plays > 0
        self.config = config
        self.curve_share = curve_share
        self.query_share = 1.0  # in (0, 1], the share of the queries that are answered, by a hash of user and play
        self.contexts, self.chosen_users = contexts, chosen_users
        self.days = day_targets(recommenders)
        self.views = (*VIEWS, *self.days)
        self.curves = curves_of(recommenders)
        self.retrievers = retrievers_of(recommenders)
        self.coverage_songs = coverage_songs(len(song_plays))
        self._negatives = RandomSongs(song_plays, config.seed)
        self._popularity_ranks = popularity_ranks(song_plays)
        from rayrec.recommend.reranking import PopularOrder  # these load torch, which slows the start
        from rayrec.recommend.taste_recommender import TasteRecommender
        from rayrec.recommend.two_step import TwoStepRecommender

        two_step = next(
            (recommender for recommender in recommenders if isinstance(recommender, TwoStepRecommender)), None
        )
        networks = [recommender for recommender in recommenders if isinstance(recommender, TasteRecommender)]
        self._network = two_step.source.network if two_step else next(iter(networks), None)
        starting_songs = PopularOrder.of(
            song_plays,
            self.known_songs,
            recent_plays=two_step.source.retrieval.recent_plays if two_step else None,
            artist_of_song=two_step.source.retrieval.artists.of_song if two_step else None,
        )
        self._starting_ranks = np.full(len(song_plays), NOT_FOUND)  # rank of each song for a user without plays
        self._starting_ranks[starting_songs.order] = np.arange(1, len(starting_songs.order) + 1)

    def empty(self, cells: int = CellRange().count) -> MetricAccumulator:
        """Return an accumulator of zeros."""
        return MetricAccumulator.empty(
            cells=cells,
            models=len(self.recommenders),
            ks=len(self.config.ks),
            curves=len(self.curves),
            offsets=self.config.offsets,
            slices=len(slices_of(self.contexts)),
            songs=len(self.coverage_songs),
            retrievers=len(self.retrievers),
            day_targets=len(self.days),
            calibrated=count_calibrated(self.recommenders),
        )

    @property
    def cells_at_once(self) -> int:
        """The number of bootstrap cells that one return value can hold."""
        return max(1, RETURN_BYTES // self.empty(1).bytes_of_cell)

    def __call__(self, histories: Histories, cells: CellRange | None = None) -> MetricAccumulator:
        """Return the sums of whole histories, for users in `cells` only. Users without test plays cost very little."""
        cells = cells or CellRange()
        accumulator = self.empty(cells.count)
        histories = histories.take(cells.holds(histories.user_ids))
        if self.chosen_users is not None:
            histories = histories.take(self.chosen_users(histories.user_ids))
        self._count_first_plays(accumulator, histories, cells)
        for block_histories, plays in blocks(histories, self.split, QUERIES_PER_BLOCK, self.query_share):
            block = QueryBlock.of(
                block_histories,
                plays,
                self.split,
                self.config,
                self.curve_share,
                self.contexts,
                cells,
                self.known_songs,
                self.days,
                self._network,
            )
            self._count_queries(accumulator, block)
            for model in range(len(self.recommenders)):
                self._add_model(accumulator, model, block)
            self._add_curves(accumulator, block)
        return accumulator

    def _count_first_plays(self, accumulator: MetricAccumulator, histories: Histories, cells: CellRange) -> None:
        """Count the first plays of users without earlier plays; all of them get the same songs from every model."""
        slice_index = slices_of(self.contexts).index(("known", "0"))
        users, songs = first_plays(histories, self.split, self.query_share)
        user_cells, ranks = cells.cells_of(histories.user_ids)[users], np.full(len(users), NOT_FOUND)
        is_known = in_mask(self.known_songs, songs)
        ranks[is_known] = self._starting_ranks[songs[is_known]]
        metrics = metrics_of(ranks, np.arange(len(users)), np.ones(len(users), np.int64), self.config.ks)
        np.add.at(accumulator.slice_queries[:, slice_index], user_cells, 1.0)
        sliced_metrics = metrics[:, self._sliced_columns()]
        for model in range(len(self.recommenders)):
            np.add.at(accumulator.slice_metrics[:, model, slice_index], user_cells, sliced_metrics)

    def _sliced_columns(self) -> list[int]:
        columns = metric_columns(self.config.ks)
        return [columns.index((metric, usual_k(self.config.ks))) for metric in SLICED]

    def _count_queries(self, accumulator: MetricAccumulator, block: QueryBlock) -> None:
        """Count the queries of each view and each slice, and the users who have any."""
        for view_index, view in enumerate(self.views):
            mask = block.counted[view]
            accumulator.queries[:, view_index] += block.sums(np.ones((len(mask), 1)), mask)[..., 0]
            groups = block.groups[np.unique(block.queries.rows[mask])]
            accumulator.users[view_index] += np.bincount(groups, minlength=len(GROUPS))
        # Slice known 0 gets nothing here, since each of these queries has an earlier play.
        accumulator.slice_queries += block.sums(block.slices.T.astype(np.float64)).sum(axis=1)

    def _add_model(self, accumulator: MetricAccumulator, model: int, block: QueryBlock) -> None:
        recommender = self.recommenders[model]
        ranked = rank_targets(
            recommender,
            block.histories,
            block.queries,
            block.targets,
            self.known_songs,
            depth=max(self.config.ks),
            horizons={name: horizon_of(recommender, name) for name in block.targets},
            listed=block.drawn,
            heard_songs=block.heard,
        )
        metrics = {
            name: metrics_of(ranked.ranks[name], target.rows, target.sizes, self.config.ks)
            for name, target in block.targets.items()
        }
        self._add_lists(accumulator, model, block, ranked)
        add_calibration(accumulator, self.recommenders, model, ranked)
        if isinstance(recommender, CandidateRecommender):
            self._add_retrieved(accumulator, model, block, ranked, recommender.retrievers)
        for index, view in enumerate(self.views):
            accumulator.metrics[:, model, index] += block.sums(metrics.get(view, metrics["next"]), block.counted[view])
        sliced_metrics = metrics["next"][:, self._sliced_columns()]
        for index, mask in enumerate(block.slices):
            accumulator.slice_metrics[:, model, index] += block.sums(sliced_metrics, mask).sum(axis=1)

    def _add_lists(self, accumulator: MetricAccumulator, model: int, block: QueryBlock, ranked: Ranked) -> None:
        rows, songs = ranked.listed_rows, ranked.listed_songs
        repeats = block.heard(block.queries.rows[rows], block.queries.plays_before[rows], songs)
        query_sums = np.zeros((len(block.queries), 1 + len(LISTED)))
        np.add.at(query_sums, rows, np.stack([np.ones(len(songs)), self._popularity_ranks[songs], repeats], axis=1))
        cell_sums = block.sums(query_sums).sum(axis=1)
        accumulator.list_counts[:, model] += cell_sums[:, 0]
        accumulator.list_sums[:, model] += cell_sums[:, 1:]
        accumulator.listed[model] |= np.packbits(np.isin(self.coverage_songs, songs))
        accumulator.lists[model] += np.count_nonzero(block.drawn)

    def _add_retrieved(
        self, accumulator: MetricAccumulator, model: int, block: QueryBlock, ranked: Ranked, retrievers: Sequence[str]
    ) -> None:
        """Add the shares of the targets that are candidates, of all retrievers together and of each one."""
        columns = [0, *(1 + self.retrievers.index(name) for name in retrievers)]
        for name, is_proposed in ranked.proposed.items():
            target, target_index = block.targets[name], list(block.targets).index(name)
            shares = np.zeros((len(block.queries), len(columns)))
            np.add.at(shares, target.rows, is_proposed / target.sizes[target.rows][:, None])
            accumulator.retrieved[:, model, target_index, columns] += block.sums(shares, target.sizes > 0).sum(axis=1)
        if ranked.candidates is not None:
            accumulator.candidates[:, model, columns] += block.sums(ranked.candidates).sum(axis=1)

    def _add_curves(self, accumulator: MetricAccumulator, block: QueryBlock) -> None:
        """Add the cosines and pairs of the drawn users."""
        histories, sampled_queries = block.histories, block.queries.take(np.flatnonzero(block.drawn))
        for curve_index, (recommender, horizon) in enumerate(self.curves):
            vectors = recommender.vectors(histories, sampled_queries, horizon)
            cosines, counts = cosine_sums(recommender, vectors, histories, sampled_queries, self.config.offsets)
            accumulator.curve_sums[:, curve_index] += block.sum_users_by_cell(cosines)
            accumulator.curve_counts[:, curve_index] += block.sum_users_by_cell(counts)
            for target_index, target in enumerate(PAIRED):
                if horizon_of(recommender, target) == horizon:
                    pairs_won, pairs = pair_sums(
                        recommender, vectors, histories, sampled_queries, target, self._negatives
                    )
                    accumulator.pairs_won[:, curve_index, target_index] += block.sum_users_by_cell(pairs_won)
                    accumulator.pairs[:, curve_index, target_index] += block.sum_users_by_cell(pairs)


def retrievers_of(recommenders: Sequence[BaseRecommender]) -> list[str]:
    """Return the distinct names of the retrievers of all candidate recommenders."""
    name_lists = (
        recommender.retrievers for recommender in recommenders if isinstance(recommender, CandidateRecommender)
    )
    return list(dict.fromkeys(name for names in name_lists for name in names))


def count_calibrated(recommenders: Sequence[BaseRecommender]) -> int:
    """Return the number of recommenders whose scores are probabilities."""
    return sum(recommender.scores_are_probabilities for recommender in recommenders)


def add_calibration(
    accumulator: MetricAccumulator, recommenders: Sequence[BaseRecommender], model: int, ranked: Ranked
) -> None:
    """Add the calibration sums of recommender number `model`, if its scores are probabilities."""
    if ranked.bin_sums:
        index = count_calibrated(recommenders[:model])
        accumulator.bin_sums[index] += np.stack([ranked.bin_sums[target] for target in CALIBRATED])


def coverage_songs(num_songs: int) -> np.ndarray:
    """int64, ascending: the songs by which coverage is measured, all of a small catalog, else a random sample."""
    if num_songs <= COVERAGE_SONGS:
        return np.arange(num_songs)
    return np.sort(np.random.default_rng(0).choice(num_songs, COVERAGE_SONGS, replace=False))


class PrefixFile(Settings):
    """A file of pairs and the format of its lines. In separators \\t is a tab."""

    path: str  # path or URI, also of a .gz file
    item_separator: str = Field(" ", min_length=1)  # between the songs of a prefix
    target_separator: str = Field("\t", min_length=1)  # before the target; the last one in the line counts

    @field_validator("item_separator", "target_separator")
    @classmethod
    def _with_tabs(cls, value: str) -> str:
        return value.replace("\\t", "\t")

    @model_validator(mode="after")
    def _check_together(self) -> PrefixFile:
        if self.item_separator == self.target_separator:
            raise ValueError(
                f"--item-separator and --target-separator are both {self.item_separator!r}; give two different ones"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """Pairs as song rows; songs that the catalog does not know all get the row after its last one."""

    histories: Histories  # Q users, each named by its line
    targets: np.ndarray  # int64 (Q,)
    num_songs: int  # of the catalog

    def take(self, rows: np.ndarray) -> Prefixes:
        """The pairs at `rows`, int or bool (Q,)."""
        return Prefixes(histories=self.histories.take(rows), targets=self.targets[rows], num_songs=self.num_songs)

    @property
    def counts(self) -> np.ndarray:
        """int64 (3,): numbers of pairs, of targets unknown to the catalog, and of unknown songs in prefixes."""
        song_arrays = (self.targets, self.histories.songs)
        return np.array([len(self.targets), *(np.count_nonzero(songs == self.num_songs) for songs in song_arrays)])


def read_prefixes(unit: Unit, file: PrefixFile, song_ids: pa.ChunkedArray) -> Iterator[Prefixes]:
    """Yield the pairs whose lines begin in a unit, in blocks; empty lines are skipped.

    `song_ids` are the song ids of the catalog, by row. Raises `InputError` for a line without a target.
    """
    for block in read_blocks(unit, PREFIX_BLOCK_BYTES):
        lines = pc.utf8_trim(pa.array(block.texts(range(len(block))), pa.string()), characters="\r\n \ufeff")
        yield parse_prefixes(lines.filter(pc.greater(pc.utf8_length(lines), 0)), file, song_ids)


def parse_prefixes(lines: pa.Array, file: PrefixFile, song_ids: pa.ChunkedArray) -> Prefixes:
    """Parse lines, strings (Q,), into pairs. Raises `InputError` for a line without a target."""
    halves = pc.split_pattern(lines, file.target_separator, max_splits=1, reverse=True)
    has_target = pc.list_value_length(halves).to_numpy() == 2
    if not has_target.all():
        line = lines[int(np.argmin(has_target))].as_py()
        raise InputError(
            f"{file.path} has a line without the target separator {file.target_separator!r}: "
            f"{line[:SHOWN_CHARACTERS]!r}; expected the songs of a prefix, the separator and the target song"
        )
    flat = pc.list_flatten(halves)
    prefixes, targets = flat.take(pa.array(np.arange(0, len(flat), 2))), flat.take(pa.array(np.arange(1, len(flat), 2)))
    items = pc.split_pattern(prefixes, file.item_separator)
    songs = pc.utf8_trim_whitespace(pc.list_flatten(items))
    is_filled = pc.greater(pc.utf8_length(songs), 0).to_numpy(zero_copy_only=False)
    rows = group_of_each_item(pc.list_value_length(items).to_numpy())[is_filled]
    lengths = np.bincount(rows, minlength=len(lines))
    offsets = offsets_of(lengths)
    histories = Histories(
        user_ids=lines.to_numpy(zero_copy_only=False),
        offsets=offsets,
        songs=_song_rows(songs.filter(pa.array(is_filled)), song_ids).astype(np.int32),
        played_at=ASSUMED_GAP_MS * (np.arange(offsets[-1]) - offsets[rows]),
    )
    return Prefixes(
        histories=histories, targets=_song_rows(pc.utf8_trim_whitespace(targets), song_ids), num_songs=len(song_ids)
    )


def _song_rows(ids: pa.Array, song_ids: pa.ChunkedArray) -> np.ndarray:
    """int64: the rows of song ids; len(song_ids) for unknown ones."""
    rows = pc.fill_null(pc.index_in(ids, value_set=song_ids), len(song_ids))
    return np.asarray(rows.to_numpy(zero_copy_only=False), dtype=np.int64)


class PrefixEvaluator:
    """Answers each pair as the query of a new user and adds up metrics.

    `song_plays`, (N,), is as in `Evaluator`; a target without a play there, or unknown to the catalog, is a miss.
    Prefixes begin at `begin` (ms UTC); if the models know plays with real times, it must be after all of them. The
    bootstrap draws pairs, identified by the text of their lines.
    """

    def __init__(
        self,
        recommenders: Sequence[BaseRecommender],
        *,
        song_plays: np.ndarray,
        config: EvaluateConfig,
        begin: int = 0,
    ) -> None:
        self.recommenders, self.known_songs, self.config, self.begin = recommenders, song_plays > 0, config, begin

    def empty(self, cells: int = CellRange().count) -> MetricAccumulator:
        """Return an accumulator of zeros."""
        return MetricAccumulator.empty(
            cells=cells,
            models=len(self.recommenders),
            ks=len(self.config.ks),
            calibrated=count_calibrated(self.recommenders),
        )

    @property
    def cells_at_once(self) -> int:
        """The number of bootstrap cells that one return value can hold."""
        return max(1, RETURN_BYTES // self.empty(1).bytes_of_cell)

    def __call__(self, prefixes: Prefixes, cells: CellRange | None = None) -> MetricAccumulator:
        """Return the sums of the given pairs."""
        cells = cells or CellRange()
        accumulator, targets = self.empty(cells.count), self._targets(prefixes)
        histories = replace(prefixes.histories, played_at=self.begin + prefixes.histories.played_at)
        queries = Queries.at_end(histories, self.begin + ASSUMED_GAP_MS * histories.lengths)
        pair_cells, group_index = cells.cells_of(histories.user_ids), GROUPS.index("new")
        for name, target in targets.items():
            accumulator.users[VIEWS.index(name), group_index] = np.count_nonzero(target.sizes)
            np.add.at(accumulator.queries[:, VIEWS.index(name), group_index], pair_cells, target.sizes)
        for model, recommender in enumerate(self.recommenders):
            ranked = rank_targets(recommender, histories, queries, targets, self.known_songs, depth=max(self.config.ks))
            add_calibration(accumulator, self.recommenders, model, ranked)
            for name, target in targets.items():
                metrics = metrics_of(ranked.ranks[name], target.rows, target.sizes, self.config.ks)
                np.add.at(accumulator.metrics[:, model, VIEWS.index(name), group_index], pair_cells, metrics)
        return accumulator

    @staticmethod
    def _targets(prefixes: Prefixes) -> dict[str, TargetSongs]:
        """Return the target of each pair; as served, only of pairs whose target is not a song of the prefix."""
        histories, rows = prefixes.histories, np.arange(len(prefixes.histories))
        is_heard = HeardSongs(histories)(rows, histories.lengths, prefixes.targets)
        new_rows = np.flatnonzero(~is_heard | (prefixes.targets == prefixes.num_songs))  # unknown songs share a row
        sizes = np.ones(len(rows), dtype=np.int64)
        return {
            "served": TargetSongs(
                rows=new_rows,
                songs=prefixes.targets[new_rows],
                sizes=np.bincount(new_rows, minlength=len(rows)),
                served=True,
            ),
            "next": TargetSongs(rows=rows, songs=prefixes.targets, sizes=sizes),
        }


@dataclass(frozen=True, kw_only=True)
class EvaluatorFiles(Generic[EvaluatorType]):
    """An evaluator without its arrays, a few KB for any catalog, and the place of its arrays."""

    workspace: Workspace
    folder: str  # holds the arrays and indexes that no artifact holds
    pickled: bytes
    sizes: tuple[int, ...]  # bytes of each array in the file of arrays

    def load(self) -> EvaluatorType:
        """Load the evaluator. Its arrays are memory-mapped; with object storage, from one local copy per node."""
        # Copy on write, since torch does not support read-only tensors.
        mapped = np.memmap(self.workspace.local_file(f"{self.folder}/{ARRAYS_FILE}"), np.uint8, "c").data
        arrays, start = [], 0
        for size in self.sizes:
            arrays.append(mapped[start : start + size])
            start += size + _padding(size)
        evaluator: EvaluatorType = pickle.loads(self.pickled, buffers=arrays)
        return evaluator


@contextmanager
def evaluator_files(
    workspace: Workspace, folder: str, evaluator: EvaluatorType
) -> Iterator[EvaluatorFiles[EvaluatorType]]:
    """Write an evaluator to files, which are deleted at the end of the `with` block.

    Arrays that are mapped from files of the workspace are not written again.
    """
    stream = io.BytesIO()
    arrays: list[pickle.PickleBuffer] = []
    try:
        _Pickler(workspace, folder, stream, arrays).dump(evaluator)
        sizes = []
        with workspace.open_output(f"{folder}/{ARRAYS_FILE}") as file:
            for array in arrays:
                with array.raw() as data:
                    sizes.append(data.nbytes)
                    file.write(data)
                file.write(bytes(_padding(sizes[-1])))
        yield EvaluatorFiles(workspace=workspace, folder=folder, pickled=stream.getvalue(), sizes=tuple(sizes))
    finally:
        workspace.delete(folder)


def _padding(size: int) -> int:
    """Return the padding bytes after an array of `size` bytes, at least one, since an empty file cannot be mapped."""
    return ALIGNED - size % ALIGNED


class _Pickler(pickle.Pickler):
    """Keeps arrays, tensors and indexes out of the pickle, so that they are stored in files."""

    def __init__(
        self, workspace: Workspace, folder: str, stream: io.BytesIO, arrays: list[pickle.PickleBuffer]
    ) -> None:
        import torch  # loaded only when needed

        super().__init__(stream, protocol=5, buffer_callback=arrays.append)
        self._workspace, self._folder, self._num_indexes = workspace, folder, 0
        self._tensor_type, self._index_type = torch.Tensor, import_faiss().Index

    def reducer_override(self, value: Any) -> Any:
        """Return how to rebuild a value in another process, or NotImplemented if pickle handles it well."""
        if isinstance(value, np.ndarray):
            return self._reduce_array(value)
        if type(value) is self._tensor_type and value.device.type == "cpu":
            return _to_tensor, (value.detach().numpy(),)
        if isinstance(value, self._index_type):
            return self._save_index(value)
        return NotImplemented

    def _reduce_array(self, array: np.ndarray) -> Any:
        location = location_of(array)
        if location is not None:
            return Workspace.read_array, location
        # A memory map would be copied into the pickle, a plain view of it is not.
        return (np.asarray, (np.asarray(array),)) if isinstance(array, np.memmap) else NotImplemented

    def _save_index(self, index: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        self._num_indexes += 1
        path = f"{self._folder}/{self._num_indexes}/{INDEX_FILE}"
        with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
            local_path = Path(folder) / INDEX_FILE
            import_faiss().write_index(index, str(local_path))
            self._workspace.put_file(local_path, path)
        return _read_index, (self._workspace, path)


def _to_tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def _read_index(workspace: Workspace, path: str) -> Any:
    faiss = import_faiss()
    return faiss.read_index(str(workspace.local_file(path)), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
