"""An import: turns files of plays or playlists into the canonical data set, in two passes over staged fragments.

The first pass reads and checks each piece of input and writes its rows in buckets of users. Between the passes, the
song vocabulary and the set of contexts are determined. The second pass merges and sorts each bucket. In both passes a
worker holds a bounded number of rows, for any number of users. The caller provides a function that runs the workers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.config import to_mapping
from rayrec.data import columns
from rayrec.data.dataset import Dataset, read_forgotten
from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.import_plan import (
    OR_SKIP,
    ImportConfig,
    ImportPlan,
    ImportSummary,
    Kind,
    TooManyRejectedError,
    bucket_groups,
    choose_buckets,
    plan_import,
    summarize,
)
from rayrec.importing.merging import BucketMerger, KeyCounter, MergeSettings, PieceImporter, SongRange, choose_contexts
from rayrec.importing.readers import FORMATS
from rayrec.importing.staging import (
    PieceResult,
    Staging,
    UnitResult,
    buckets_read,
    discard_others,
    piece_names,
)
from rayrec.importing.vocabulary import KEY, SongRows, Vocabulary, key_ranges
from rayrec.storage.artifacts import DatasetManifest, fingerprint, read_songs
from rayrec.storage.workspace import (
    DATASET,
    DATASET_MANIFEST,
    IMPORT_STAGING,
    REJECTED_ROWS,
    SONGS_TABLE,
    Workspace,
    rejected_rows_file,
    users_file,
)


class RunUnits(Protocol):
    """A function that runs workers, on a cluster or in this process."""

    def __call__(
        self,
        title: str,
        make_worker: Callable[..., Callable[[Any], Any]],
        units: Sequence[Any],
        *,
        arguments: dict[str, Any],
        called: str,
    ) -> Iterable[Any]:
        """Return the results of workers for all `units`, in any order.

        `make_worker`, called with `arguments`, creates a worker, which is called with a unit. `title` is the text for a
        progress display, and `called` is the word for a unit in messages.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """The result of an import."""

    dataset: DatasetManifest  # unchanged if nothing was new
    read: int = 0  # rows of the files
    merged: int = 0  # exact duplicates, within the files and of existing plays
    likes: int = 0  # rows that are likes and no plays
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> rows
    plays: int = 0  # new plays
    users: int = 0  # new users
    songs: int = 0  # new songs
    last_import: dict[str, object] = field(default_factory=dict)  # ImportSummary as a dict


@dataclass(frozen=True, kw_only=True)
class ImportRun:
    """An import that is ready to run."""

    workspace: Workspace
    config: ImportConfig
    plan: ImportPlan
    base: DatasetManifest | None  # data set to append to, or whose songs and other kind of rows are kept
    append: bool = False

    def run(self, run_units: RunUnits) -> ImportResult:
        """Run both passes; damaged files are left out if the settings allow it.

        Raises `InputError` for bad input; completed work is kept for the next run.
        """
        plan = self.plan
        while True:
            task = _Import(self.workspace, self.config, plan, self.base, run_units, append=self.append)
            try:
                dataset = task.run()
            except _DamagedFilesError as error:
                plan = plan_import(self.config, {**plan.damaged, **error.files})
                continue
            base = self.base
            names = ("plays", "users", "songs") if base is None or dataset.id != base.id else ()
            new = {name: getattr(dataset, name) - (getattr(base, name) if base else 0) for name in names}
            return ImportResult(dataset=dataset, **task.came_to, **new)


def prepare_import(workspace: Workspace, config: ImportConfig, *, repeat: bool = False) -> ImportRun | DatasetManifest:
    """Return the import to run, or the data set if the same import already made it.

    Arguments and errors are those of `import_data`.
    """
    plan = plan_import(config)
    existing = Dataset(workspace).manifest if workspace.exists(DATASET_MANIFEST) else None
    if existing is not None and not repeat:
        if _was_made_by(existing, config, plan):
            return existing
        _require_room(workspace, existing, config.produces)
    base = existing if existing is not None and _rows_of(existing, _other(config.produces)) else None
    return ImportRun(workspace=workspace, config=config, plan=plan, base=base)


def prepare_append(workspace: Workspace, config: ImportConfig) -> ImportRun | DatasetManifest:
    """Return the import to run, or the data set if it already holds these files; errors are those of `append_plays`."""
    base = _require_appendable(workspace, config)
    plan = plan_import(config)
    if plan.id in [each["plan"] for each in base.appended] or _was_made_by(base, config, plan):
        return base
    return ImportRun(workspace=workspace, config=config, plan=plan, base=base, append=True)


class _DamagedFilesError(Exception):
    """Damaged files, with the reasons, that the settings allow to leave out."""

    def __init__(self, files: dict[str, str]) -> None:
        super().__init__(files)
        self.files = files


def _require_appendable(workspace: Workspace, config: ImportConfig) -> DatasetManifest:
    base = Dataset(workspace).manifest
    if not base.plays:
        raise InputError(f"workspace {workspace.uri} has no plays to append to; omit --append")
    if config.produces == "playlists":
        raise InputError("Playlists cannot be appended; replace all playlists with --force")
    if "positions" in (base.times, config.times):
        raise InputError("Plays without times cannot be appended: their order is unknown; import all files together")
    return base


def _was_made_by(existing: DatasetManifest, config: ImportConfig, plan: ImportPlan) -> bool:
    earlier_import = existing.config.get(config.produces)
    return isinstance(earlier_import, dict) and earlier_import.get("plan") == plan.id


def _require_room(workspace: Workspace, existing: DatasetManifest, kind: Kind) -> None:
    if not _rows_of(existing, kind):
        return
    appended = ", some of them appended later" if kind == "plays" and existing.appended else ""
    raise InputError(
        f"workspace {workspace.uri} already contains {_rows_of(existing, kind)} {kind} from "
        f"{existing.source}{appended}; use another --workspace, "
        "add plays with `rayrec update`, or replace all with --force"
    )


def _rows_of(manifest: DatasetManifest, kind: Kind) -> int:
    return manifest.plays if kind == "plays" else manifest.playlists


def _other(kind: Kind) -> Kind:
    return "playlists" if kind == "plays" else "plays"


class _Import:
    """One run of an import; `base` is the data set to append to, or whose songs and other kind of rows are kept."""

    def __init__(
        self,
        workspace: Workspace,
        config: ImportConfig,
        plan: ImportPlan,
        base: DatasetManifest | None,
        run_units: RunUnits,
        *,
        append: bool = False,
    ) -> None:
        self._run_units = run_units
        self.workspace, self.config, self.plan, self.base, self.append = workspace, config, plan, base, append
        self.buckets = base.buckets if base else config.buckets or self._choose_buckets()
        if config.buckets not in (0, self.buckets):
            raise InputError(
                f"buckets is {config.buckets}; expected {self.buckets}, the number fixed at the first import"
            )
        inputs = {"base": base.id if base else "", "buckets": str(self.buckets)} | ({"append": "yes"} if append else {})
        inputs["damaged"] = repr(sorted(plan.damaged))  # a killed run may have left out files that are whole now
        print_id = fingerprint("staging", {"plan": plan.id}, inputs)
        self.staging = Staging(workspace, print_id, piece_names(plan.piece_names, self.buckets))
        self.came_to: dict[str, Any] = {}  # read, merged, rejected, last_import
        self.forgotten = read_forgotten(workspace)

    def run(self) -> DatasetManifest:
        pieces = self._read_pieces()
        discard_others(self.workspace, self.staging)  # only now are the damaged files known
        units = [unit for piece in pieces for unit in piece.units]
        summary = self._summarize(pieces)
        offsets = np.array([piece.rows for piece in pieces])
        merge = self._merge_settings(units)
        vocabulary = self._vocabulary(pieces, merge, offsets)
        songs = self.workspace.write_table(self.staging.out(SONGS_TABLE), vocabulary.table())
        buckets = self._merge_buckets(vocabulary, merge, offsets)
        dropped = _added(bucket["dropped"] for bucket in buckets)
        self.came_to = {
            "read": sum(unit.read for unit in units),
            "merged": sum(bucket["merged"] for bucket in buckets),
            "likes": sum(bucket["likes"] for bucket in buckets),
            "rejected": _added([*(unit.rejected for unit in units), dropped]),
            "last_import": summary.to_mapping(),
        }
        if not any(bucket["rows"] or bucket["likes"] for bucket in buckets):
            if self.append and self.base and self.came_to["merged"]:
                self.workspace.delete(IMPORT_STAGING)
                return self.base
            self._refuse(dropped, self.came_to["read"])
        written = {SONGS_TABLE: songs, **self._write_rejected(pieces, merge)}
        manifest = self._manifest(merge, buckets, len(vocabulary.keys), written)
        self.staging.publish(manifest)
        return manifest

    def _choose_buckets(self) -> int:
        """Return a number of buckets for the size of the files.

        It is that of an unfinished import of some of these files, if the two numbers differ by a factor of at most two.
        """
        best_count, existing_count = choose_buckets(self.plan.size), buckets_read(self.workspace, self.plan.piece_names)
        return existing_count if best_count <= 2 * existing_count and existing_count <= 2 * best_count else best_count

    def _merge_settings(self, units: list[UnitResult]) -> MergeSettings:
        before = self.base if self.append and self.base else None
        return MergeSettings(
            pieces=self.plan.pieces,
            offsets=self.plan.line_offsets([unit.lines for unit in units]),
            files=self.plan.unit_files,
            sources=[file.source for file in self.plan.files],
            contexts=choose_contexts(_added(unit.contexts for unit in units), before.contexts if before else []),
            has_skipped=any(unit.has_skipped for unit in units) or (before is not None and before.has_skipped),
            has_likes=any(unit.has_likes for unit in units) or (before is not None and before.has_likes),
            in_lines=self.config.times == "positions",
            base=before,
            forgotten=self.forgotten,
        )

    def _run(
        self, title: str, make_worker: Callable[..., Callable[[Any], Any]], todo: list[Any], **arguments: Any
    ) -> list[Any]:
        """Return the results of workers for all units of `todo`, in any order."""
        worker_arguments = {"staging": self.staging, "config": self.config, **arguments}
        called = "piece of input" if make_worker is PieceImporter else "bucket"
        return list(self._run_units(title, make_worker, todo, arguments=worker_arguments, called=called))

    def _run_groups(
        self, title: str, make_worker: Callable[..., Callable[[Any], Any]], todo: set[int], **arguments: Any
    ) -> Any:
        """Process the buckets in `todo`; return bucket -> result."""
        groups = bucket_groups(len(self.plan.pieces), self.buckets)
        left = [group for group in groups if not todo.isdisjoint(range(group[0], group[1] + 1))]
        return dict(pair for group in self._run(title, make_worker, left, buckets=todo, **arguments) for pair in group)

    def _read_pieces(self) -> list[PieceResult]:
        """Run the first pass; return the results of all pieces."""
        store, numbers = self.staging.fragments, range(len(self.plan.pieces))
        done = store.pieces_done()
        todo = [piece for piece in numbers if piece not in done]
        how = {"units": self.plan.units, "pieces": self.plan.pieces, "buckets": self.buckets}
        new_results = dict(self._run("read", PieceImporter, todo, **how))
        results = [new_results[piece] if piece in new_results else store.result(piece) for piece in numbers]
        self._require_whole(results)
        units = [unit for result in results for unit in result.units]
        if not any(unit.read for unit in units):
            self._refuse({}, 0)
        return results

    def _require_whole(self, results: list[PieceResult]) -> None:
        """Raise `InputError` if a unit could not be read; the results of the other pieces are kept for the next run.

        Raises `_DamagedFilesError` instead if the settings allow to leave these files out.
        """
        failed = {number: result.units[-1] for number, result in enumerate(results) if result.units[-1].error}
        if not failed:
            return
        damaged = all(unit.damaged for unit in failed.values())
        kind, advice = (DamagedInputError, OR_SKIP) if damaged else (InputError, "")
        if len(failed) == len(results) and not (damaged and self.config.skip_damaged):
            self.workspace.delete(IMPORT_STAGING)
            raise kind(f"{failed[0].error}{advice}")
        for number in failed:
            self.staging.fragments.forget(number)
        if damaged and self.config.skip_damaged:
            raise _DamagedFilesError(
                {self._file_of(number, results[number]): failed[number].error for number in failed}
            )
        first, *more = dict.fromkeys(unit.error for unit in failed.values())
        others = f" (and {len(more)} more)" if more else ""
        raise kind(f"{first}{advice}{others}; completed work is kept for the next run")

    def _file_of(self, piece: int, result: PieceResult) -> str:
        """Return the file of the last unit of a piece that was read."""
        unit = self.plan.pieces[piece][len(result.units) - 1]
        return self.plan.files[self.plan.unit_files[unit]].source

    def _summarize(self, pieces: list[PieceResult]) -> ImportSummary:
        """Return the summary. Raises `TooManyRejectedError` if more rows were rejected than the settings allow."""
        rejected = (
            (self.plan.pieces[number][place], table)
            for number, piece in enumerate(pieces)
            for place, table in self._rejected_rows(number, piece)
        )
        units = [unit for piece in pieces for unit in piece.units]
        summary = summarize(self.plan, units, rejected, FORMATS[self.config.format].beside)
        if summary.rejected == summary.read:
            self.workspace.delete(IMPORT_STAGING)
            counts = ", ".join(f"{each.rows:,} × {each.reason}" for each in summary.reasons)
            where = ", ".join(self.config.paths[:3])
            raise TooManyRejectedError(
                f"{where}: all {summary.read:,} rows are rejected: {counts}; check the format and the settings",
                summary,
            )
        if summary.share > self.config.max_rejected:
            lost, plays = summary.rejected - summary.beside, summary.read - summary.beside
            raise TooManyRejectedError(
                f"{lost:,} of {plays:,} rows ({summary.share:.0%}) were rejected, more than "
                f"{self.config.max_rejected:.0%}, so nothing was imported; check the format and the settings, "
                "or allow more with --max-rejected",
                summary,
            )
        return summary

    def _vocabulary(self, pieces: list[PieceResult], merge: MergeSettings, offsets: np.ndarray) -> Vocabulary:
        ranges = range(key_ranges(self.buckets))
        existing_files = set(self.workspace.files(self.staging.folder))
        todo = [number for number in ranges if self.staging.songs_file(number) not in existing_files]
        self._run("songs", SongRange, todo, offsets=np.array([piece.songs for piece in pieces]))
        new = (self.workspace.read_table(self.staging.songs_file(number)) for number in ranges)
        vocabulary = Vocabulary(read_songs(self.workspace, self.base) if self.base else None, new)
        if self.config.min_user_plays > 1 or self.config.min_song_plays > 1:
            left = {number for number in range(self.buckets) if self.staging.counts_file(number) not in existing_files}
            self._run_groups("count songs", KeyCounter, left, merge=merge, offsets=offsets)
            vocabulary.keep(self._song_counts(vocabulary.keys) >= self.config.min_song_plays)
        return vocabulary

    def _song_counts(self, keys: np.ndarray) -> np.ndarray:
        """int64 (N,): number of plays of each song by users with enough plays."""
        rows, totals = SongRows.of(keys), np.zeros(len(keys), dtype=np.int64)
        for bucket in range(self.buckets):
            table = self.workspace.read_table(self.staging.counts_file(bucket))
            totals[rows.find(table.column(KEY).to_numpy())] += table.column("count").to_numpy()
        return totals

    def _merge_buckets(self, vocabulary: Vocabulary, merge: MergeSettings, offsets: np.ndarray) -> list[dict[str, Any]]:
        """Run the second pass; return the results of all buckets."""
        results = self.staging.bucket_results()
        todo = {number for number in range(self.buckets) if number not in results}
        songs = SongRows.of(vocabulary.keys)
        arguments = {"merge": merge, "offsets": offsets, "keys": songs.keys, "rows": songs.rows}
        results |= self._run_groups("merge", BucketMerger, todo, **arguments)
        return [results[number] for number in range(self.buckets)]

    def _write_rejected(self, pieces: list[PieceResult], merge: MergeSettings) -> dict[str, str]:
        """Write all rows rejected in the first pass to one file, with lines of their files; return path -> checksum."""
        if not any(unit.rejected for piece in pieces for unit in piece.units):
            return {}
        path = rejected_rows_file(self.config.produces, merge.part, "rejected")
        with (
            self.workspace.open_output(self.staging.out(path)) as stream,
            pq.ParquetWriter(stream, columns.REJECTED, compression="zstd") as writer,
        ):
            for number, piece in enumerate(pieces):
                for place, table in self._rejected_rows(number, piece):
                    offset = merge.offsets[merge.pieces[number][place]]
                    lines = pa.array(table.column("line").to_numpy() + offset)
                    writer.write_table(table.set_column(1, columns.REJECTED.field("line"), lines))
        return {path: stream.sha256}

    def _rejected_rows(self, number: int, piece: PieceResult) -> Iterator[tuple[int, pa.Table]]:
        """Yield the place of each unit in a piece, and its rejected rows, columns.REJECTED.

        If users were deleted, texts are left out: a text may name a deleted user, which cannot be detected since only
        digests of user ids are stored.
        """
        for place, table in self.staging.fragments.rejected(number, piece):
            if self.forgotten:
                field = columns.REJECTED.field("text")
                empty = pa.array([""] * table.num_rows, field.type)
                table = table.set_column(columns.REJECTED.names.index("text"), field, empty)
            yield place, table

    def _refuse(self, reasons: dict[str, int], read: int) -> None:
        self.workspace.delete(IMPORT_STAGING)
        where = ", ".join(self.config.paths[:3])
        if not read:
            raise InputError(f"{where}: no rows to import; check the files")
        counts = ", ".join(
            f"{count} × {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1])
        )
        raise InputError(f"{where}: all {read} rows are rejected: {counts}; check the settings")

    def _manifest(
        self, merge: MergeSettings, buckets: list[dict[str, Any]], songs: int, written: dict[str, str]
    ) -> DatasetManifest:
        base = self.base or DatasetManifest(
            id="", source="", buckets=self.buckets, parts=0, users=0, plays=0, songs=0, created_at=""
        )
        for bucket in buckets:
            written = written | bucket["files"]
        replaced = {
            base.current_users_file(number).removeprefix(f"{DATASET}/")
            for number in range(self.buckets)
            if users_file(merge.part, number) in written
        }
        unchanged_files = {
            name: digest for name, digest in base.files.items() if self._stays(name) and name not in replaced
        }
        files = {**unchanged_files, **{name.removeprefix(f"{DATASET}/"): written[name] for name in written}}
        made_id = fingerprint("dataset", {"files": dict(sorted(files.items()))}, {})
        figures = self._appended(merge, base, buckets) if self.append else self._replaced(merge, base, buckets)
        if figures["ancestors"]:
            files |= self.staging.keep_manifest(base)
        return replace(
            base,
            id=made_id,
            lineage=base.lineage or base.id,
            joined_from="",
            source=_joined(base.source, self.config.format),
            songs=songs,
            files=dict(sorted(files.items())),
            created_at=datetime.now(timezone.utc).isoformat(),
            **figures,
        )

    def _appended(self, merge: MergeSettings, base: DatasetManifest, buckets: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the fields of the manifest that an append changes."""
        figures = self._figures(merge, buckets)
        new = {name: figures[name] for name in ("plays", "users")}
        came_to = {**new, **{name: self.came_to[name] for name in ("read", "merged", "likes")}}
        this_import = {**to_mapping(self.config), "plan": self.plan.id, "part": merge.part, **came_to}
        return {
            **figures,
            **{name: getattr(base, name) + count for name, count in came_to.items()},
            "rejected": _added([base.rejected, self.came_to["rejected"]]),
            "last_import": self.came_to["last_import"],
            "first_play": min(base.first_play, figures["first_play"]),
            "last_play": max(base.last_play, figures["last_play"]),
            "ancestors": [*base.ancestors, base.id],
            "appended": [*base.appended, this_import],
        }

    def _replaced(self, merge: MergeSettings, base: DatasetManifest, buckets: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the fields of the manifest that change if all plays, or all playlists, are added or replaced."""
        other: str = _other(self.config.produces)
        beside = {other: base.config[other]} if other in base.config else {}
        this_import = {**to_mapping(self.config), "plan": self.plan.id}
        # Artifacts made from replaced plays are no longer valid; new playlists leave artifacts valid.
        goes_on = bool(base.id) and (self.config.produces == "playlists" or not base.plays)
        return {
            **self._figures(merge, buckets),
            **self.came_to,
            "ancestors": [*base.ancestors, base.id] if goes_on else [],
            "appended": base.appended if self.config.produces == "playlists" else [],
            "config": {**beside, str(self.config.produces): this_import},
        }

    def _figures(self, merge: MergeSettings, buckets: list[dict[str, Any]]) -> dict[str, Any]:
        rows, owners = (sum(bucket[name] for bucket in buckets) for name in ("rows", "owners"))
        if self.config.produces == "playlists":
            return {"playlists": owners, "playlist_entries": rows}
        filled = [bucket for bucket in buckets if bucket["rows"]]
        earlier = merge.base
        nothing = earlier.last_play if earlier else 0  # for a part with likes only
        first = min((bucket["first"] for bucket in filled), default=nothing)
        last = max((bucket["last"] for bucket in filled), default=nothing)
        return {
            "plays": rows,
            "users": owners,
            "parts": merge.part + 1,
            "part_times": [*(earlier.part_times if earlier else []), (first, last)],
            "joined": earlier.joined if earlier else [],
            "users_parts": [
                merge.part
                if users_file(merge.part, number) in bucket["files"] or earlier is None
                else (earlier.users_parts or [0] * self.buckets)[number]
                for number, bucket in enumerate(buckets)
            ],
            "first_play": first,
            "last_play": last,
            "times": self.config.times,
            "contexts": merge.contexts,
            "has_skipped": merge.has_skipped,
            "has_likes": merge.has_likes,
        }

    def _stays(self, name: str) -> bool:
        """True for a file of the base data set that is kept: all files in an append, else those of the other rows."""
        if self.append or name.startswith("earlier/"):
            return True
        other = _other(self.config.produces)
        folders = ("histories/", "users/") if other == "plays" else ("playlists/",)
        return name.startswith((*folders, f"{REJECTED_ROWS.removeprefix(f'{DATASET}/')}/{other}-"))


def _joined(before: str, source: str) -> str:
    """Return the formats that a data set came from, each once."""
    return " + ".join(dict.fromkeys([*filter(None, before.split(" + ")), source]))


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for count in counts:
        for name, number in count.items():
            totals[name] = totals.get(name, 0) + number
    return totals
