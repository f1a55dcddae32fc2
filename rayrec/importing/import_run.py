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
from rayrec.importing.merging import (
    FORGOTTEN_USER,
    MAX_CONTEXTS,
    BucketMerger,
    KeyCounter,
    MergeSettings,
    PieceImporter,
    SongRange,
    choose_contexts,
)
from rayrec.importing.readers import FORMATS
from rayrec.importing.staging import (
    CONTEXTS_PER_UNIT,
    PieceResult,
    Staging,
    UnitResult,
    delete_other_imports,
    existing_bucket_count,
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
    new_likes: int = 0  # likes that the data set did not hold, also those of known plays
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
            import_task = _Import(self.workspace, self.config, plan, self.base, run_units, append=self.append)
            try:
                dataset = import_task.run()
            except _DamagedFilesError as error:
                plan = plan_import(self.config, {**plan.damaged, **error.files})
                continue
            base = self.base
            count_names = ("plays", "users", "songs") if base is None or dataset.id != base.id else ()
            new_counts = {name: getattr(dataset, name) - (getattr(base, name) if base else 0) for name in count_names}
            return ImportResult(
                dataset=dataset, **import_task.result_fields, **new_counts, new_likes=import_task.new_likes
            )


def prepare_import(workspace: Workspace, config: ImportConfig, *, repeat: bool = False) -> ImportRun | DatasetManifest:
    """Return the import to run, or the data set if the same import already made it.

    Arguments and errors are those of `import_data`.
    """
    plan = plan_import(config)
    existing = Dataset(workspace).manifest if workspace.exists(DATASET_MANIFEST) else None
    if existing is not None and not repeat:
        if _was_made_by(existing, config, plan):
            return existing
        _require_no_rows(workspace, existing, config.produces)
    base = existing if existing is not None and _row_count(existing, _other_kind(config.produces)) else None
    return ImportRun(workspace=workspace, config=config, plan=plan, base=base)


def prepare_append(workspace: Workspace, config: ImportConfig) -> ImportRun | DatasetManifest:
    """Return the import to run, or the data set if it already holds these files; errors are those of `append_plays`."""
    base = _require_appendable(workspace, config)
    plan = plan_import(config)
    if plan.id in [entry["plan"] for entry in base.appended] or _was_made_by(base, config, plan):
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


def _require_no_rows(workspace: Workspace, existing: DatasetManifest, kind: Kind) -> None:
    if not _row_count(existing, kind):
        return
    appended_text = ", some of them appended later" if kind == "plays" and existing.appended else ""
    raise InputError(
        f"workspace {workspace.uri} already contains {_row_count(existing, kind)} {kind} from "
        f"{existing.source}{appended_text}; use another --workspace, "
        "add plays with `rayrec update`, or replace all with --force"
    )


def _row_count(manifest: DatasetManifest, kind: Kind) -> int:
    return manifest.plays if kind == "plays" else manifest.playlists


def _other_kind(kind: Kind) -> Kind:
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
        self.result_fields: dict[str, Any] = {}  # read, merged, rejected, last_import
        self.new_likes = 0
        self.forgotten = read_forgotten(workspace)

    def run(self) -> DatasetManifest:
        piece_results = self._read_pieces()
        delete_other_imports(self.workspace, self.staging)  # only now are the damaged files known
        unit_results = [unit for piece_result in piece_results for unit in piece_result.units]
        summary = self._summarize(piece_results)
        offsets = np.array([piece_result.rows for piece_result in piece_results])
        merge_settings = self._merge_settings(unit_results)
        summary.warnings.extend(_context_warnings(unit_results, merge_settings))
        vocabulary = self._vocabulary(piece_results, merge_settings, offsets)
        songs_digest = self.workspace.write_table(self.staging.out(SONGS_TABLE), vocabulary.table())
        bucket_results = self._merge_buckets(vocabulary, merge_settings, offsets)
        dropped_counts = _sum_counts(bucket_result["dropped"] for bucket_result in bucket_results)
        self.result_fields = {
            "read": sum(unit.read for unit in unit_results),
            "merged": sum(bucket_result["merged"] for bucket_result in bucket_results),
            "likes": sum(bucket_result["likes"] for bucket_result in bucket_results),
            "rejected": _sum_counts([*(unit.rejected for unit in unit_results), dropped_counts]),
            "last_import": summary.to_mapping(),
        }
        self.new_likes = sum(bucket_result["new_likes"] for bucket_result in bucket_results)
        if not self.new_likes and not any(bucket_result["rows"] for bucket_result in bucket_results):
            if self.append and self.base and self.result_fields["merged"]:
                self.workspace.delete(IMPORT_STAGING)
                return self.base
            self._raise_no_rows(dropped_counts, self.result_fields["read"])
        written_files = {SONGS_TABLE: songs_digest, **self._write_rejected(piece_results, merge_settings)}
        manifest = self._manifest(merge_settings, bucket_results, len(vocabulary.keys), written_files)
        self.staging.publish(manifest)
        return manifest

    def _choose_buckets(self) -> int:
        """Return a number of buckets for the size of the files.

        It is that of an unfinished import of some of these files, if the two numbers differ by a factor of at most two.
        """
        best_count = choose_buckets(self.plan.size)
        existing_count = existing_bucket_count(self.workspace, self.plan.piece_names)
        return existing_count if best_count <= 2 * existing_count and existing_count <= 2 * best_count else best_count

    def _merge_settings(self, unit_results: list[UnitResult]) -> MergeSettings:
        base = self.base if self.append and self.base else None
        return MergeSettings(
            pieces=self.plan.pieces,
            offsets=self.plan.line_offsets([unit.lines for unit in unit_results]),
            files=self.plan.unit_files,
            sources=[file.source for file in self.plan.files],
            contexts=choose_contexts(
                _sum_counts(unit.contexts for unit in unit_results), base.contexts if base else []
            ),
            has_skipped=any(unit.has_skipped for unit in unit_results) or (base is not None and base.has_skipped),
            has_likes=any(unit.has_likes for unit in unit_results) or (base is not None and base.has_likes),
            in_lines=self.config.times == "positions",
            base=base,
            forgotten=self.forgotten,
        )

    def _run(
        self, title: str, make_worker: Callable[..., Callable[[Any], Any]], pending: list[Any], **arguments: Any
    ) -> list[Any]:
        """Return the results of workers for all units of `pending`, in any order."""
        worker_arguments = {"staging": self.staging, "config": self.config, **arguments}
        unit_name = "piece of input" if make_worker is PieceImporter else "bucket"
        return list(self._run_units(title, make_worker, pending, arguments=worker_arguments, called=unit_name))

    def _run_groups(
        self, title: str, make_worker: Callable[..., Callable[[Any], Any]], pending: set[int], **arguments: Any
    ) -> Any:
        """Process the buckets in `pending`; return bucket -> result."""
        groups = bucket_groups(len(self.plan.pieces), self.buckets)
        pending_groups = [group for group in groups if not pending.isdisjoint(range(group[0], group[1] + 1))]
        return dict(
            pair
            for group in self._run(title, make_worker, pending_groups, buckets=pending, **arguments)
            for pair in group
        )

    def _read_pieces(self) -> list[PieceResult]:
        """Run the first pass; return the results of all pieces."""
        store, pieces = self.staging.fragments, range(len(self.plan.pieces))
        done_pieces = store.pieces_done()
        pending = [piece for piece in pieces if piece not in done_pieces]
        worker_arguments = {"units": self.plan.units, "pieces": self.plan.pieces, "buckets": self.buckets}
        new_results = dict(self._run("read", PieceImporter, pending, **worker_arguments))
        results = [new_results[piece] if piece in new_results else store.result(piece) for piece in pieces]
        self._require_all_read(results)
        unit_results = [unit for result in results for unit in result.units]
        if not any(unit.read for unit in unit_results):
            self._raise_no_rows({}, 0)
        return results

    def _require_all_read(self, results: list[PieceResult]) -> None:
        """Raise `InputError` if a unit could not be read; the results of the other pieces are kept for the next run.

        Raises `_DamagedFilesError` instead if the settings allow to leave these files out.
        """
        failed_units = {piece: result.units[-1] for piece, result in enumerate(results) if result.units[-1].error}
        if not failed_units:
            return
        all_damaged = all(unit.damaged for unit in failed_units.values())
        error_type, advice = (DamagedInputError, OR_SKIP) if all_damaged else (InputError, "")
        if len(failed_units) == len(results) and not (all_damaged and self.config.skip_damaged):
            self.workspace.delete(IMPORT_STAGING)
            raise error_type(f"{failed_units[0].error}{advice}")
        if all_damaged and self.config.skip_damaged:
            raise _DamagedFilesError(
                {self._file_of(piece, results[piece]): failed_units[piece].error for piece in failed_units}
            )
        first_error, *other_errors = dict.fromkeys(unit.error for unit in failed_units.values())
        others_text = f" (and {len(other_errors)} more)" if other_errors else ""
        raise error_type(f"{first_error}{advice}{others_text}; completed work is kept for the next run")

    def _file_of(self, piece: int, result: PieceResult) -> str:
        """Return the file of the last unit of a piece that was read."""
        unit = self.plan.pieces[piece][len(result.units) - 1]
        return self.plan.files[self.plan.unit_files[unit]].source

    def _summarize(self, results: list[PieceResult]) -> ImportSummary:
        """Return the summary. Raises `TooManyRejectedError` if more rows were rejected than the settings allow."""
        rejected = (
            (self.plan.pieces[piece][unit_index], table)
            for piece, result in enumerate(results)
            for unit_index, table in self._rejected_rows(piece, result)
        )
        unit_results = [unit for result in results for unit in result.units]
        summary = summarize(self.plan, unit_results, rejected, FORMATS[self.config.format].not_plays)
        if summary.rejected == summary.read:
            self.workspace.delete(IMPORT_STAGING)
            reasons_text = ", ".join(f"{entry.rows:,} × {entry.reason}" for entry in summary.reasons)
            paths = ", ".join(self.config.paths[:3])
            raise TooManyRejectedError(
                f"{paths}: all {summary.read:,} rows are rejected: {reasons_text}; check the format and the settings",
                summary,
            )
        if summary.share > self.config.max_rejected:
            rejected_plays, plays = summary.rejected - summary.not_plays, summary.read - summary.not_plays
            raise TooManyRejectedError(
                f"{rejected_plays:,} of {plays:,} rows ({summary.share:.0%}) were rejected, more than "
                f"{self.config.max_rejected:.0%}, so nothing was imported; check the format and the settings, "
                "or allow more with --max-rejected",
                summary,
            )
        return summary

    def _vocabulary(
        self, piece_results: list[PieceResult], merge_settings: MergeSettings, offsets: np.ndarray
    ) -> Vocabulary:
        ranges = range(key_ranges(self.buckets))
        existing_files = set(self.workspace.files(self.staging.folder))
        pending_ranges = [number for number in ranges if self.staging.songs_file(number) not in existing_files]
        self._run(
            "songs", SongRange, pending_ranges, offsets=np.array([piece_result.songs for piece_result in piece_results])
        )
        new_songs = (self.workspace.read_table(self.staging.songs_file(number)) for number in ranges)
        vocabulary = Vocabulary(read_songs(self.workspace, self.base) if self.base else None, new_songs)
        if self.config.min_user_plays > 1 or self.config.min_song_plays > 1:
            pending_buckets = {
                number for number in range(self.buckets) if self.staging.counts_file(number) not in existing_files
            }
            self._run_groups("count songs", KeyCounter, pending_buckets, merge=merge_settings, offsets=offsets)
            vocabulary.keep(self._song_counts(vocabulary.keys) >= self.config.min_song_plays)
        return vocabulary

    def _song_counts(self, keys: np.ndarray) -> np.ndarray:
        """int64 (N,): number of plays of each song by users with enough plays."""
        song_rows, totals = SongRows.of(keys), np.zeros(len(keys), dtype=np.int64)
        for bucket in range(self.buckets):
            table = self.workspace.read_table(self.staging.counts_file(bucket))
            totals[song_rows.find(table.column(KEY).to_numpy())] += table.column("count").to_numpy()
        return totals

    def _merge_buckets(
        self, vocabulary: Vocabulary, merge_settings: MergeSettings, offsets: np.ndarray
    ) -> list[dict[str, Any]]:
        """Run the second pass; return the results of all buckets."""
        results = self.staging.bucket_results()
        pending = {bucket for bucket in range(self.buckets) if bucket not in results}
        song_rows = SongRows.of(vocabulary.keys)
        arguments = {"merge": merge_settings, "offsets": offsets, "keys": song_rows.keys, "rows": song_rows.rows}
        results |= self._run_groups("merge", BucketMerger, pending, **arguments)
        return [results[bucket] for bucket in range(self.buckets)]

    def _write_rejected(self, results: list[PieceResult], merge_settings: MergeSettings) -> dict[str, str]:
        """Write all rows rejected in the first pass to one file, with lines of their files; return path -> checksum."""
        if not any(unit.rejected for result in results for unit in result.units):
            return {}
        path = rejected_rows_file(self.config.produces, merge_settings.part, "rejected")
        with (
            self.workspace.open_output(self.staging.out(path)) as stream,
            pq.ParquetWriter(stream, columns.REJECTED, compression="zstd") as writer,
        ):
            for piece, result in enumerate(results):
                for unit_index, table in self._rejected_rows(piece, result):
                    offset = merge_settings.offsets[merge_settings.pieces[piece][unit_index]]
                    lines = pa.array(table.column("line").to_numpy() + offset)
                    writer.write_table(table.set_column(1, columns.REJECTED.field("line"), lines))
        return {path: stream.sha256}

    def _rejected_rows(self, piece: int, result: PieceResult) -> Iterator[tuple[int, pa.Table]]:
        """Yield the place of each unit in a piece, and its rejected rows, columns.REJECTED.

        If users were deleted, texts are left out: a text may name a deleted user, which cannot be detected since only
        digests of user ids are stored.
        """
        for unit_index, table in self.staging.fragments.rejected(piece, result):
            if self.forgotten:
                field = columns.REJECTED.field("text")
                empty_texts = pa.array([""] * table.num_rows, field.type)
                table = table.set_column(columns.REJECTED.names.index("text"), field, empty_texts)
            yield unit_index, table

    def _raise_no_rows(self, reasons: dict[str, int], rows_read: int) -> None:
        self.workspace.delete(IMPORT_STAGING)
        paths = ", ".join(self.config.paths[:3])
        if not rows_read:
            raise InputError(f"{paths}: no rows to import; check the files")
        reasons_text = ", ".join(
            f"{count} × {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1])
        )
        raise InputError(f"{paths}: all {rows_read} rows are rejected: {reasons_text}; check the settings")

    def _manifest(
        self,
        merge_settings: MergeSettings,
        bucket_results: list[dict[str, Any]],
        song_count: int,
        written_files: dict[str, str],
    ) -> DatasetManifest:
        base = self.base or DatasetManifest(
            id="", source="", buckets=self.buckets, parts=0, users=0, plays=0, songs=0, created_at=""
        )
        for bucket_result in bucket_results:
            written_files = written_files | bucket_result["files"]
        replaced_files = {
            base.current_users_file(bucket).removeprefix(f"{DATASET}/")
            for bucket in range(self.buckets)
            if users_file(merge_settings.part, bucket) in written_files
        }
        unchanged_files = {
            name: digest for name, digest in base.files.items() if self._is_kept(name) and name not in replaced_files
        }
        files = {**unchanged_files, **{name.removeprefix(f"{DATASET}/"): written_files[name] for name in written_files}}
        dataset_id = fingerprint("dataset", {"files": dict(sorted(files.items()))}, {})
        changed_fields = (
            self._appended_fields(merge_settings, base, bucket_results)
            if self.append
            else self._replaced_fields(merge_settings, base, bucket_results)
        )
        if changed_fields["ancestors"]:
            files |= self.staging.keep_manifest(base)
        return replace(
            base,
            id=dataset_id,
            lineage=base.lineage or base.id,
            joined_from="",
            source=_combine_sources(base.source, self.config.format),
            songs=song_count,
            files=dict(sorted(files.items())),
            created_at=datetime.now(timezone.utc).isoformat(),
            **changed_fields,
        )

    def _appended_fields(
        self, merge_settings: MergeSettings, base: DatasetManifest, bucket_results: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the fields of the manifest that an append changes."""
        manifest_fields = self._manifest_fields(merge_settings, bucket_results)
        new_counts = {name: manifest_fields[name] for name in ("plays", "users")}
        added_counts = {**new_counts, **{name: self.result_fields[name] for name in ("read", "merged", "likes")}}
        this_import = {**to_mapping(self.config), "plan": self.plan.id, "part": merge_settings.part, **added_counts}
        return {
            **manifest_fields,
            **{name: getattr(base, name) + count for name, count in added_counts.items()},
            "rejected": _sum_counts([base.rejected, self.result_fields["rejected"]]),
            "last_import": self.result_fields["last_import"],
            "first_play": min(base.first_play, manifest_fields["first_play"]),
            "last_play": max(base.last_play, manifest_fields["last_play"]),
            "ancestors": [*base.ancestors, base.id],
            "appended": [*base.appended, this_import],
        }

    def _replaced_fields(
        self, merge_settings: MergeSettings, base: DatasetManifest, bucket_results: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the fields of the manifest that change if all plays, or all playlists, are added or replaced."""
        other_kind: str = _other_kind(self.config.produces)
        other_config = {other_kind: base.config[other_kind]} if other_kind in base.config else {}
        this_import = {**to_mapping(self.config), "plan": self.plan.id}
        # Artifacts made from replaced plays are no longer valid; new playlists leave artifacts valid.
        extends_base = bool(base.id) and (self.config.produces == "playlists" or not base.plays)
        # The erased plays of deleted users: with them `rayrec verify` accepts a time range that was of more plays.
        erased = base.rejected.get(FORGOTTEN_USER, 0) if self.config.produces == "playlists" else 0
        kept_counts = {FORGOTTEN_USER: erased} if erased else {}
        return {
            **self._manifest_fields(merge_settings, bucket_results),
            **self.result_fields,
            "rejected": _sum_counts([kept_counts, self.result_fields["rejected"]]),
            "ancestors": [*base.ancestors, base.id] if extends_base else [],
            "appended": base.appended if self.config.produces == "playlists" else [],
            "config": {**other_config, str(self.config.produces): this_import},
        }

    def _manifest_fields(self, merge_settings: MergeSettings, bucket_results: list[dict[str, Any]]) -> dict[str, Any]:
        row_count, owner_count = (
            sum(bucket_result[name] for bucket_result in bucket_results) for name in ("rows", "owners")
        )
        if self.config.produces == "playlists":
            return {"playlists": owner_count, "playlist_entries": row_count}
        filled_results = [bucket_result for bucket_result in bucket_results if bucket_result["rows"]]
        base = merge_settings.base
        default_time = base.last_play if base else 0  # for a part with likes only
        first_play = min((bucket_result["first"] for bucket_result in filled_results), default=default_time)
        last_play = max((bucket_result["last"] for bucket_result in filled_results), default=default_time)
        return {
            "plays": row_count,
            "users": owner_count,
            "parts": merge_settings.part + 1,
            "part_times": [*(base.part_times if base else []), (first_play, last_play)],
            "joined_parts": base.joined_parts if base else [],
            "users_parts": [
                merge_settings.part
                if users_file(merge_settings.part, bucket) in bucket_result["files"] or base is None
                else (base.users_parts or [0] * self.buckets)[bucket]
                for bucket, bucket_result in enumerate(bucket_results)
            ],
            "first_play": first_play,
            "last_play": last_play,
            "times": self.config.times,
            "contexts": merge_settings.contexts,
            "has_skipped": merge_settings.has_skipped,
            "has_likes": merge_settings.has_likes,
        }

    def _is_kept(self, name: str) -> bool:
        """True for a file of the base data set that is kept: all files in an append, else those of the other rows."""
        if self.append or name.startswith("earlier/"):
            return True
        other_kind = _other_kind(self.config.produces)
        folders = ("histories/", "users/") if other_kind == "plays" else ("playlists/",)
        return name.startswith((*folders, f"{REJECTED_ROWS.removeprefix(f'{DATASET}/')}/{other_kind}-"))


def _context_warnings(unit_results: Sequence[UnitResult], merge_settings: MergeSettings) -> list[str]:
    """Return a note if there are more context names than a data set holds."""
    names = set(merge_settings.contexts).union(*(unit.contexts for unit in unit_results))
    if len(names) == len(merge_settings.contexts):
        return []
    is_limited = any(len(unit.contexts) == CONTEXTS_PER_UNIT for unit in unit_results)
    kept_first = "those of earlier imports and " if merge_settings.base and merge_settings.base.contexts else ""
    count_text = f"{'At least ' if is_limited else ''}{len(names):,}"
    return [f"{count_text} context names; only {MAX_CONTEXTS} are kept: {kept_first}the most frequent."]


def _combine_sources(earlier_sources: str, new_source: str) -> str:
    """Return the formats that a data set came from, each once."""
    return " + ".join(dict.fromkeys([*filter(None, earlier_sources.split(" + ")), new_source]))


def _sum_counts(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for counts in parts:
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    return totals
