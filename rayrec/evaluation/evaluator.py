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
from rayrec.data.ragged import offsets_of
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
from rayrec.storage.workspace import Workspace, stored_at

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
        drawn = user_hash(histories.user_ids, salt=f"curves {config.seed} ") / 2.0**64 < curve_share
        heard = HeardSongs(histories)
        repeat = heard(queries.rows, queries.seen, histories.songs[plays])
        targets = {
            name: target_songs(histories, queries, name, heard, known_songs, days.get(name))
            for name in (*OFFSETS, *days)
        }
        counted = {name: target.sizes > 0 for name, target in targets.items()}
        last = plays == histories.offsets[queries.rows + 1] - 1
        predicted = np.bincount(histories.rows[plays_to_predict(histories, split)], minlength=len(histories))
        return cls(
            histories=histories,
            queries=queries,
            cells=cells.cells_of(histories.user_ids),
            num_cells=cells.count,
            groups=user_groups(histories, split),
            targets=targets,
            counted={**counted, "next_new": ~repeat, "next_repeat": repeat, LAST: last},
            slices=slice_masks(histories, queries, predicted, contexts, network),
            drawn=drawn[queries.rows],
            heard=heard,
        )

    def sums(self, values: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float64 (C, G, K): the sums of `values`, (Q, K), by cell and group; with `mask`, (Q,), of its queries."""
        chosen = np.arange(len(self.queries)) if mask is None else np.flatnonzero(mask)
        users = self.queries.rows[chosen]
        keys = self.cells[users] * len(GROUPS) + self.groups[users]
        size = self.num_cells * len(GROUPS)
        columns = [np.bincount(keys, weights=column, minlength=size) for column in values[chosen].T]
        return np.stack(columns, axis=1).reshape(self.num_cells, len(GROUPS), -1)

    def sums_of_users(self, values: np.ndarray) -> np.ndarray:
        """float64 (C, ...): the sums of `values`, (U, ...), by cell."""
        sums = np.zeros((self.num_cells, *values.shape[1:]))
        np.add.at(sums, self.cells, values)
        return sums


QUERIES_PER_BLOCK = 1 << 16


class Evaluator:
    """Evaluates recommenders on whole histories.

    `song_plays`, (N,), is the number of plays of each song in the fit range. A song without a play is a miss for every
    model, unless it was added to the model. `query_share` in (0, 1] is the share of the queries that are answered,
    drawn by a hash of user and play. `curve_share` in [0, 1] is the share of users, drawn by hash, for the curves, the
    pairs and the recommended lists. `contexts` names the bits of the plays' contexts. `chosen_users` takes user ids,
    object (U,), and returns which of them are evaluated, bool (U,).
    """

    def __init__(
        self,
        recommenders: Sequence[BaseRecommender],
        *,
        split: Split,
        song_plays: np.ndarray,
        config: EvaluateConfig,
        query_share: float = 1.0,
        curve_share: float = 1.0,
        contexts: Sequence[str] = (),
        chosen_users: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.recommenders = recommenders
        self.split = split
        self.song_plays = song_plays
        self.known_songs = song_plays > 0
        self.config = config
        self.query_share, self.curve_share = query_share, curve_share
        self.contexts, self.chosen_users = contexts, chosen_users
        self.days = day_targets(recommenders)
        self.views = (*VIEWS, *self.days)
        self.curves = curves_of(recommenders)
        self.retrievers = retrievers_of(recommenders)
        self.coverage_songs = coverage_songs(len(song_plays))
        self._negatives = RandomSongs(song_plays, config.seed)
        self._popularity_ranks = popularity_ranks(song_plays)
        from rayrec.recommend.reranking import Starting  # these load torch, which slows the start
        from rayrec.recommend.taste_recommender import TasteRecommender
        from rayrec.recommend.two_step import TwoStepRecommender

        two_step = next((one for one in recommenders if isinstance(one, TwoStepRecommender)), None)
        networks = [one for one in recommenders if isinstance(one, TasteRecommender)]
        self._network = two_step.source.network if two_step else next(iter(networks), None)
        starting = Starting.of(
            song_plays,
            self.known_songs,
            recent_plays=two_step.source.retrieval.recent_plays if two_step else None,
            artist_of_song=two_step.source.retrieval.artists.of_song if two_step else None,
        )
        self._starting_ranks = np.full(len(song_plays), NOT_FOUND)  # rank of each song for a user without plays
        self._starting_ranks[starting.order] = np.arange(1, len(starting.order) + 1)

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
        sums = self.empty(cells.count)
        histories = histories.take(cells.holds(histories.user_ids))
        if self.chosen_users is not None:
            histories = histories.take(self.chosen_users(histories.user_ids))
        self._count_first_plays(sums, histories, cells)
        for users, plays in blocks(histories, self.split, QUERIES_PER_BLOCK, self.query_share):
            block = QueryBlock.of(
                users,
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
            self._count(sums, block)
            for model in range(len(self.recommenders)):
                self._add_model(sums, model, block)
            self._add_curves(sums, block)
        return sums

    def _count_first_plays(self, sums: MetricAccumulator, histories: Histories, cells: CellRange) -> None:
        """Count the first plays of users without earlier plays; all of them get the same songs from every model."""
        place = slices_of(self.contexts).index(("known", "0"))
        users, songs = first_plays(histories, self.split, self.query_share)
        cell, ranks = cells.cells_of(histories.user_ids)[users], np.full(len(users), NOT_FOUND)
        known = in_mask(self.known_songs, songs)
        ranks[known] = self._starting_ranks[songs[known]]
        values = metrics_of(ranks, np.arange(len(users)), np.ones(len(users), np.int64), self.config.ks)
        np.add.at(sums.slice_queries[:, place], cell, 1.0)
        chosen = values[:, self._sliced_columns()]
        for model in range(len(self.recommenders)):
            np.add.at(sums.slice_metrics[:, model, place], cell, chosen)

    def _sliced_columns(self) -> list[int]:
        columns = metric_columns(self.config.ks)
        return [columns.index((metric, usual_k(self.config.ks))) for metric in SLICED]

    def _count(self, sums: MetricAccumulator, block: QueryBlock) -> None:
        """Count the queries of each view and each slice, and the users who have any."""
        for place, view in enumerate(self.views):
            mask = block.counted[view]
            sums.queries[:, place] += block.sums(np.ones((len(mask), 1)), mask)[..., 0]
            groups = block.groups[np.unique(block.queries.rows[mask])]
            sums.users[place] += np.bincount(groups, minlength=len(GROUPS))
        # Slice known 0 gets nothing here, since each of these queries has an earlier play.
        sums.slice_queries += block.sums(block.slices.T.astype(np.float64)).sum(axis=1)

    def _add_model(self, sums: MetricAccumulator, model: int, block: QueryBlock) -> None:
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
        )
        metrics = {
            name: metrics_of(ranked.ranks[name], target.rows, target.sizes, self.config.ks)
            for name, target in block.targets.items()
        }
        self._add_lists(sums, model, block, ranked)
        add_chances(sums, self.recommenders, model, ranked)
        if isinstance(recommender, CandidateRecommender):
            self._add_retrieved(sums, model, block, ranked, recommender.retrievers)
        for place, view in enumerate(self.views):
            sums.metrics[:, model, place] += block.sums(metrics.get(view, metrics["next"]), block.counted[view])
        chosen = metrics["next"][:, self._sliced_columns()]
        for place, mask in enumerate(block.slices):
            sums.slice_metrics[:, model, place] += block.sums(chosen, mask).sum(axis=1)

    def _add_lists(self, sums: MetricAccumulator, model: int, block: QueryBlock, ranked: Ranked) -> None:
        rows, songs = ranked.listed_rows, ranked.listed_songs
        repeats = block.heard(block.queries.rows[rows], block.queries.seen[rows], songs)
        per_query = np.zeros((len(block.queries), 1 + len(LISTED)))
        np.add.at(per_query, rows, np.stack([np.ones(len(songs)), self._popularity_ranks[songs], repeats], axis=1))
        by_cell = block.sums(per_query).sum(axis=1)
        sums.list_counts[:, model] += by_cell[:, 0]
        sums.list_sums[:, model] += by_cell[:, 1:]
        sums.listed[model] |= np.packbits(np.isin(self.coverage_songs, songs))
        sums.lists[model] += np.count_nonzero(block.drawn)

    def _add_retrieved(
        self, sums: MetricAccumulator, model: int, block: QueryBlock, ranked: Ranked, names: Sequence[str]
    ) -> None:
        """Add the shares of the targets that are candidates, of all retrievers together and of each one."""
        columns = [0, *(1 + self.retrievers.index(name) for name in names)]
        for name, proposed in ranked.proposed.items():
            target, place = block.targets[name], list(block.targets).index(name)
            shares = np.zeros((len(block.queries), len(columns)))
            np.add.at(shares, target.rows, proposed / target.sizes[target.rows][:, None])
            sums.retrieved[:, model, place, columns] += block.sums(shares, target.sizes > 0).sum(axis=1)
        if ranked.candidates is not None:
            sums.candidates[:, model, columns] += block.sums(ranked.candidates).sum(axis=1)

    def _add_curves(self, sums: MetricAccumulator, block: QueryBlock) -> None:
        """Add the cosines and pairs of the drawn users."""
        histories, sampled = block.histories, block.queries.take(np.flatnonzero(block.drawn))
        for row, (recommender, horizon) in enumerate(self.curves):
            vectors = recommender.vectors(histories, sampled, horizon)
            cosines, counts = cosine_sums(recommender, vectors, histories, sampled, self.config.offsets)
            sums.curve_sums[:, row] += block.sums_of_users(cosines)
            sums.curve_counts[:, row] += block.sums_of_users(counts)
            for place, target in enumerate(PAIRED):
                if horizon_of(recommender, target) == horizon:
                    won, pairs = pair_sums(recommender, vectors, histories, sampled, target, self._negatives)
                    sums.pairs_won[:, row, place] += block.sums_of_users(won)
                    sums.pairs[:, row, place] += block.sums_of_users(pairs)


def retrievers_of(recommenders: Sequence[BaseRecommender]) -> list[str]:
    """Return the distinct names of the retrievers of all candidate recommenders."""
    named = (one.retrievers for one in recommenders if isinstance(one, CandidateRecommender))
    return list(dict.fromkeys(name for names in named for name in names))


def count_calibrated(recommenders: Sequence[BaseRecommender]) -> int:
    """Return the number of recommenders whose scores are probabilities."""
    return sum(one.scores_are_chances for one in recommenders)


def add_chances(sums: MetricAccumulator, recommenders: Sequence[BaseRecommender], model: int, ranked: Ranked) -> None:
    """Add the calibration sums of recommender number `model`, if its scores are probabilities."""
    if ranked.chances:
        place = count_calibrated(recommenders[:model])
        sums.chances[place] += np.stack([ranked.chances[target] for target in CALIBRATED])


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
            raise ValueError(f"both separators are {self.item_separator!r}; they must differ")
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
        unknown = (self.targets, self.histories.songs)
        return np.array([len(self.targets), *(np.count_nonzero(songs == self.num_songs) for songs in unknown)])


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
    whole = pc.list_value_length(halves).to_numpy() == 2
    if not whole.all():
        line = lines[int(np.argmin(whole))].as_py()
        raise InputError(
            f"{file.path} has a line without the target separator {file.target_separator!r}: "
            f"{line[:SHOWN_CHARACTERS]!r}; expected the songs of a prefix, the separator and the target song"
        )
    flat = pc.list_flatten(halves)
    prefixes, targets = flat.take(pa.array(np.arange(0, len(flat), 2))), flat.take(pa.array(np.arange(1, len(flat), 2)))
    items = pc.split_pattern(prefixes, file.item_separator)
    songs = pc.utf8_trim_whitespace(pc.list_flatten(items))
    is_filled = pc.greater(pc.utf8_length(songs), 0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(lines)), pc.list_value_length(items).to_numpy())[is_filled]
    lengths = np.bincount(rows, minlength=len(lines))
    offsets = offsets_of(lengths)
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
    """int64: the rows of song ids; len(song_ids) for unknown ones."""
    rows = pc.fill_null(pc.index_in(names, value_set=song_ids), len(song_ids))
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
        sums, targets = self.empty(cells.count), self._targets(prefixes)
        histories = replace(prefixes.histories, played_at=self.begin + prefixes.histories.played_at)
        queries = Queries.at_end(histories, self.begin + ASSUMED_GAP_MS * histories.lengths)
        cell, group = cells.cells_of(histories.user_ids), GROUPS.index("new")
        for name, target in targets.items():
            sums.users[VIEWS.index(name), group] = np.count_nonzero(target.sizes)
            np.add.at(sums.queries[:, VIEWS.index(name), group], cell, target.sizes)
        for model, recommender in enumerate(self.recommenders):
            ranked = rank_targets(recommender, histories, queries, targets, self.known_songs, depth=max(self.config.ks))
            add_chances(sums, self.recommenders, model, ranked)
            for name, target in targets.items():
                metrics = metrics_of(ranked.ranks[name], target.rows, target.sizes, self.config.ks)
                np.add.at(sums.metrics[:, model, VIEWS.index(name), group], cell, metrics)
        return sums

    @staticmethod
    def _targets(prefixes: Prefixes) -> dict[str, TargetSongs]:
        """Return the target of each pair; as served, only of pairs whose target is not a song of the prefix."""
        histories, rows = prefixes.histories, np.arange(len(prefixes.histories))
        heard = HeardSongs(histories)(rows, histories.lengths, prefixes.targets)
        new = np.flatnonzero(~heard | (prefixes.targets == prefixes.num_songs))  # unknown songs share a row
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
        arrays, begin = [], 0
        for size in self.sizes:
            arrays.append(mapped[begin : begin + size])
            begin += size + _padding(size)
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
        self._workspace, self._folder, self._indexes = workspace, folder, 0
        self._tensor, self._index = torch.Tensor, import_faiss().Index

    def reducer_override(self, value: Any) -> Any:
        """Return how to rebuild a value in another process, or NotImplemented if pickle handles it well."""
        if isinstance(value, np.ndarray):
            return self._array(value)
        if type(value) is self._tensor and value.device.type == "cpu":
            return _to_tensor, (value.detach().numpy(),)
        if isinstance(value, self._index):
            return self._save_index(value)
        return NotImplemented

    def _array(self, array: np.ndarray) -> Any:
        stored = stored_at(array)
        if stored is not None:
            return Workspace.read_array, stored
        # A memory map would be copied into the pickle, a plain view of it is not.
        return (np.asarray, (np.asarray(array),)) if isinstance(array, np.memmap) else NotImplemented

    def _save_index(self, index: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        self._indexes += 1
        path = f"{self._folder}/{self._indexes}/{INDEX_FILE}"
        with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
            local = Path(folder) / INDEX_FILE
            import_faiss().write_index(index, str(local))
            self._workspace.put_file(local, path)
        return _read_index, (self._workspace, path)


def _to_tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def _read_index(workspace: Workspace, path: str) -> Any:
    faiss = import_faiss()
    return faiss.read_index(str(workspace.local_file(path)), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
