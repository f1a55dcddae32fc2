"""Import files of plays or playlists as the canonical data set, in two passes over staged fragments.

First pass: each unit of input is read, checked and written in buckets by user. Between the passes:
the song vocabulary and the set of contexts. Second pass: each bucket is merged and sorted. Both
passes run on Ray Data and hold a bounded number of rows per worker, whatever the number of users.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from rayrec.artifacts import fingerprint
from rayrec.config import to_mapping
from rayrec.data import columns
from rayrec.data.dataset import Dataset, DatasetManifest
from rayrec.data.fragments import UnitResult
from rayrec.data.import_workers import BucketMerger, MergeSettings, SongCounter, UnitImporter
from rayrec.data.importing import ImportConfig, Kind, Plan, choose_buckets, make_plan
from rayrec.data.merging import choose_contexts
from rayrec.data.staging import Staging, discard_others, finish_publishing
from rayrec.data.vocabulary import KEY, SongRows, Vocabulary
from rayrec.errors import InputError
from rayrec.jobs.buckets import BucketWorker
from rayrec.jobs.cluster import ray_cluster
from rayrec.progress import progress
from rayrec.workspace import (
    DATASET,
    DATASET_MANIFEST,
    SET_ASIDE,
    SONGS_TABLE,
    Workspace,
)


def import_data(workspace: Workspace, config: ImportConfig, *, repeat: bool = False) -> DatasetManifest:
    """Make the data set of a workspace, or add playlists to its plays or plays to its playlists.

    Work that is done already is kept: the same import again returns the data set that is there, and
    one that was killed goes on with the units and buckets that are missing. Song rows that exist
    never change. `repeat` replaces the plays (or playlists) that are there; without playlists (or
    plays) beside them it replaces the vocabulary too.

    Raises `InputError` for bad input, and where other plays (or playlists) are there already.
    """
    finish_publishing(workspace)
    plan = make_plan(config)
    existing = Dataset(workspace).manifest if workspace.exists(DATASET_MANIFEST) else None
    if existing is not None and not repeat:
        if _was_made_by(existing, config, plan):
            return existing
        _require_room(workspace, existing, config.produces)
    base = existing if existing is not None and _rows_of(existing, _other(config.produces)) else None
    task = _Import(workspace, config, plan, base)
    discard_others(workspace, task.staging)
    with ray_cluster():
        return task.run()


def _was_made_by(existing: DatasetManifest, config: ImportConfig, plan: Plan) -> bool:
    made = existing.config.get(config.produces)
    return isinstance(made, dict) and made.get("plan") == plan.id


def _require_room(workspace: Workspace, existing: DatasetManifest, kind: Kind) -> None:
    if _rows_of(existing, kind):
        raise InputError(
            f"workspace {workspace.uri} holds {_rows_of(existing, kind)} {kind} from {existing.source} already; "
            "import into another --workspace, or replace them with --force"
        )


def _rows_of(manifest: DatasetManifest, kind: Kind) -> int:
    return manifest.plays if kind == "plays" else manifest.playlists


def _other(kind: Kind) -> Kind:
    return "playlists" if kind == "plays" else "plays"


class _Import:
    """One run of an import; `base` is the data set whose songs and other kind of rows stay."""

    def __init__(self, workspace: Workspace, config: ImportConfig, plan: Plan, base: DatasetManifest | None) -> None:
        self.workspace, self.config, self.plan, self.base = workspace, config, plan, base
        self.buckets = base.buckets if base else config.buckets or choose_buckets(plan.size)
        if config.buckets not in (0, self.buckets):
            raise InputError(
                f"the data set has {self.buckets} buckets, {config.buckets} were asked for; leave the number out"
            )
        inputs = {"base": base.id if base else "", "buckets": str(self.buckets)}
        self.staging = Staging(workspace, fingerprint("staging", {"plan": plan.id}, inputs))

    def run(self) -> DatasetManifest:
        units = self._read_units()
        merge = MergeSettings(
            units=units,
            offsets=self.plan.line_offsets([unit.lines for unit in units]),
            files=self.plan.unit_files,
            sources=[file.source for file in self.plan.files],
            contexts=choose_contexts(_added(unit.contexts for unit in units)),
            has_skipped=any(unit.has_skipped for unit in units),
            in_lines=self.config.times == "positions",
        )
        vocabulary = self._vocabulary(units, merge)
        self.workspace.write_table(self.staging.out(SONGS_TABLE), vocabulary.table())
        buckets = self._merge_buckets(vocabulary, merge)
        if not any(bucket["rows"] for bucket in buckets):
            self._refuse(_added(bucket["dropped"] for bucket in buckets), sum(unit.read for unit in units))
        rejected = self._write_rejected(merge)
        manifest = self._manifest(merge, buckets, len(vocabulary.keys), rejected)
        self.staging.publish(manifest)
        return manifest

    def _run(self, title: str, make_worker: Callable[..., BucketWorker], todo: list[int], **arguments: Any) -> None:
        if not todo:
            return
        stored = ray.put({"staging": self.staging, "config": self.config, **arguments})
        # Tasks and not actors: they start at once in workers that are there, and have next to no state to load.
        done = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            _work, fn_kwargs={"make_worker": make_worker, "stored": [stored]}, batch_size=1, num_cpus=1
        )
        with progress(title, len(todo)) as bar:
            for _ in done.iter_rows():
                bar.advance()

    def _read_units(self) -> list[UnitResult]:
        """The first pass."""
        store, numbers = self.staging.fragments, range(len(self.plan.units))
        todo = [unit for unit in numbers if not store.is_done(unit)]
        self._run("read", UnitImporter, todo, units=self.plan.units, buckets=self.buckets)
        results = [store.result(unit) for unit in numbers]
        for result in results:
            if result.error:
                self.workspace.delete(self.staging.folder)
                raise InputError(result.error)
        if not any(result.kept for result in results):
            self._refuse(_added(result.rejected for result in results), sum(result.read for result in results))
        return results

    def _vocabulary(self, units: list[UnitResult], merge: MergeSettings) -> Vocabulary:
        vocabulary = Vocabulary(self.workspace.read_table(SONGS_TABLE) if self.base else None)
        for number, unit in enumerate(units):
            vocabulary.add(self.staging.fragments.songs(number, unit))
        if self.config.min_user_plays > 1 or self.config.min_song_plays > 1:
            todo = [number for number in range(self.buckets) if not self._exists(self.staging.counts_file(number))]
            self._run("count songs", SongCounter, todo, merge=merge)
            vocabulary.keep(self._song_counts(vocabulary.keys) >= self.config.min_song_plays)
        return vocabulary

    def _song_counts(self, keys: np.ndarray) -> np.ndarray:
        """int64 (N,): plays of each song by users with enough plays."""
        rows, totals = SongRows.of(keys), np.zeros(len(keys), dtype=np.int64)
        for bucket in range(self.buckets):
            table = self.workspace.read_table(self.staging.counts_file(bucket))
            totals[rows.find(table.column(KEY).to_numpy())] += table.column("count").to_numpy()
        return totals

    def _merge_buckets(self, vocabulary: Vocabulary, merge: MergeSettings) -> list[dict[str, Any]]:
        """The second pass."""
        numbers = range(self.buckets)
        todo = [number for number in numbers if not self._exists(self.staging.bucket_file(number))]
        songs = SongRows.of(vocabulary.keys)
        self._run("merge", BucketMerger, todo, merge=merge, keys=songs.keys, rows=songs.rows)
        return [self.workspace.read_json(self.staging.bucket_file(number)) for number in numbers]

    def _exists(self, path: str) -> bool:
        return self.workspace.exists(path)

    def _write_rejected(self, merge: MergeSettings) -> dict[str, str]:
        """All rejects of the first pass in one file, with the lines of their files; its path and checksum."""
        if not any(unit.rejected for unit in merge.units):
            return {}
        path = f"{SET_ASIDE}/{self.config.produces}-rejected.parquet"
        with (
            self.workspace.open_output(self.staging.out(path)) as stream,
            pq.ParquetWriter(stream, columns.REJECTED, compression="zstd") as writer,
        ):
            for number, (unit, offset) in enumerate(zip(merge.units, merge.offsets, strict=True)):
                for table in self.staging.fragments.rejected(number, unit):
                    lines = pa.array(table.column("line").to_numpy() + offset)
                    writer.write_table(table.set_column(1, columns.REJECTED.field("line"), lines))
        return {path: self.staging.checksum(path)}

    def _refuse(self, reasons: dict[str, int], read: int) -> None:
        self.workspace.delete(self.staging.folder)
        where = ", ".join(self.config.paths[:3])
        if not read:
            raise InputError(f"{where}: there are no rows to import; check the files")
        told = ", ".join(f"{count} × {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
        raise InputError(f"{where}: none of {read} rows can be used: {told}; check the format and the settings")

    def _manifest(
        self, merge: MergeSettings, buckets: list[dict[str, Any]], songs: int, rejected: dict[str, str]
    ) -> DatasetManifest:
        base = self.base or DatasetManifest(
            id="", source="", buckets=self.buckets, parts=0, users=0, plays=0, songs=0, created_at=""
        )
        written = {SONGS_TABLE: self.staging.checksum(SONGS_TABLE), **rejected}
        for bucket in buckets:
            written |= bucket["files"]
        kept = {name: digest for name, digest in base.files.items() if self._stays(name)}
        files = dict(sorted({**kept, **{name.removeprefix(f"{DATASET}/"): written[name] for name in written}}.items()))
        made = {**to_mapping(self.config), "plan": self.plan.id}
        other: str = _other(self.config.produces)
        beside = {other: base.config[other]} if other in base.config else {}
        return replace(
            base,
            id=fingerprint("dataset", {"files": files}, {}),
            source=self.config.format if not base.source else f"{base.source} + {self.config.format}",
            songs=songs,
            read=sum(unit.read for unit in merge.units),
            merged=sum(bucket["merged"] for bucket in buckets),
            set_aside=_added([*(unit.rejected for unit in merge.units), *(bucket["dropped"] for bucket in buckets)]),
            config={**beside, str(self.config.produces): made},
            files=files,
            created_at=datetime.now(timezone.utc).isoformat(),
            **self._figures(merge, buckets),
        )

    def _figures(self, merge: MergeSettings, buckets: list[dict[str, Any]]) -> dict[str, Any]:
        rows, owners = (sum(bucket[name] for bucket in buckets) for name in ("rows", "owners"))
        if self.config.produces == "playlists":
            return {"playlists": owners, "playlist_entries": rows}
        filled = [bucket for bucket in buckets if bucket["rows"]]
        return {
            "plays": rows,
            "users": owners,
            "parts": 1,
            "first_play": min(bucket["first"] for bucket in filled),
            "last_play": max(bucket["last"] for bucket in filled),
            "times": self.config.times,
            "contexts": merge.contexts,
            "has_skipped": merge.has_skipped,
        }

    def _stays(self, name: str) -> bool:
        """True for a file of the base that the other kind of rows needs."""
        other = _other(self.config.produces)
        folder = "histories/" if other == "plays" else "playlists/"
        return name.startswith((folder, f"{SET_ASIDE.removeprefix(f'{DATASET}/')}/{other}-"))


def _work(batch: dict[str, np.ndarray], make_worker: Callable[..., BucketWorker], stored: list[Any]) -> dict[str, Any]:
    worker = make_worker(**ray.get(stored[0]))
    return {"done": [worker(unit) for unit in batch["item"]]}


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for count in counts:
        for name, number in count.items():
            totals[name] = totals.get(name, 0) + number
    return totals
