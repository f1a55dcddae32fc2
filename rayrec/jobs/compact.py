"""Compaction: joins the parts of the histories, so that reading takes few requests, and erases deleted users."""

from dataclasses import dataclass, replace
from datetime import datetime, timezone

from rayrec.data.dataset import Dataset
from rayrec.data.impressions import compact_impressions
from rayrec.data.lineage import CleanConfig, kept_releases
from rayrec.display import progress
from rayrec.importing.merging import BucketJoiner, Spans, merge_spans
from rayrec.importing.staging import Staging, finish_publishing
from rayrec.jobs.forget import Erased, erase_forgotten
from rayrec.jobs.runtime import ray_cluster, run_buckets
from rayrec.storage import artifacts
from rayrec.storage.artifacts import DatasetManifest, fingerprint
from rayrec.storage.locking import writes
from rayrec.storage.workspace import DATASET, HISTORIES, SENT_PLAYS, Workspace


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """The result of a compaction."""

    dataset: DatasetManifest
    spans_before: Spans  # first and last part of each set of histories files, before the compaction
    spans: Spans  # the same, after it
    erased: Erased


@writes("compact")
def compact(workspace: Workspace) -> Compacted:
    """Erase the rows of deleted users from all files, and join the parts of the data set.

    Other plays and all artifacts stay valid.
    A release is in use if `rayrec clean` keeps it with its default settings, and a model if it is the current one or
    that of a release in use. Parts stay apart where a command reads only some of them. `rayrec taste` reads the parts
    since the newest taste vectors of a model in use. `rayrec songs add` reads the parts since the training of a model
    in use. `rayrec states load` reads the parts up to the taste vectors of a release in use.

    Running readers keep reading the old files, which stay until `rayrec clean`. A killed compaction leaves the data set
    unchanged; the next one continues with the missing buckets. The impression log is compacted, too.
    """
    compact_impressions(workspace)
    finish_publishing(workspace)
    workspace.delete(SENT_PLAYS)  # a killed import may have left them after the users' rows were erased
    erased = erase_forgotten(workspace)
    dataset = Dataset(workspace)
    base = dataset.manifest
    spans = merge_spans(base.parts, _cut_parts(dataset))
    new_spans = [span for span in spans if span not in base.spans]
    if not new_spans:
        return Compacted(dataset=base, spans_before=base.spans, spans=base.spans, erased=erased)
    staging = Staging(workspace, fingerprint("compact", {"spans": spans}, {"dataset": base.id}))
    bucket_files = staging.bucket_results()
    pending_buckets = [bucket for bucket in range(base.buckets) if bucket not in bucket_files]
    with ray_cluster(), progress("compact", len(pending_buckets)) as bar:
        arguments = {"staging": staging, "dataset": dataset, "spans": new_spans}
        for bucket, files in run_buckets(BucketJoiner, pending_buckets, arguments=arguments):
            bucket_files[bucket] = files
            bar.advance()
    manifest = _manifest(base, spans, bucket_files, staging)
    staging.publish(manifest)
    return Compacted(dataset=manifest, spans_before=base.spans, spans=manifest.spans, erased=erased)


def _cut_parts(dataset: Dataset) -> set[int]:
    """Return the parts at which files are cut: no file may hold plays from before such a part and from it on."""
    tastes = artifacts.listing(dataset.workspace, "tastes")
    matching_tastes = [item for item in tastes if dataset.descends_from(item.inputs["dataset"])]
    used_releases = kept_releases(dataset.workspace, CleanConfig())
    used_tastes_ids = {release.inputs["tastes"] for release in used_releases}
    part_counts = {item.id: dataset.earlier(item.inputs["dataset"]).parts for item in matching_tastes}
    current_model = artifacts.latest(dataset.workspace, "models")
    used_model_ids = {release.inputs["models"] for release in used_releases} | (
        set() if current_model is None else {current_model.id}
    )
    newest_part_counts: dict[str, int] = {}
    for item in matching_tastes:
        model_id = item.inputs["models"]
        if model_id in used_model_ids:
            newest_part_counts[model_id] = max(newest_part_counts.get(model_id, 0), part_counts[item.id])
    return {
        *newest_part_counts.values(),
        *(part_counts[item] for item in used_tastes_ids if item in part_counts),
        *(  # `songs add` reads only the plays since the training
            dataset.earlier(model.inputs["dataset"]).parts
            for model in artifacts.listing(dataset.workspace, "models")
            if model.id in used_model_ids and dataset.descends_from(model.inputs["dataset"])
        ),
    }


def _manifest(
    base: DatasetManifest, spans: Spans, bucket_files: dict[int, dict[str, str]], staging: Staging
) -> DatasetManifest:
    new_files = {
        path.removeprefix(f"{DATASET}/"): digest for files in bucket_files.values() for path, digest in files.items()
    }
    multi_part_spans = [span for span in spans if span[0] < span[1]]
    manifest = replace(base, joined_parts=multi_part_spans)
    current_files = {path for bucket in range(base.buckets) for path in manifest.histories_files(bucket)}
    histories_folder = HISTORIES.removeprefix(f"{DATASET}/")
    files = {
        path: digest
        for path, digest in base.files.items()
        if not path.startswith(f"{histories_folder}/") or f"{DATASET}/{path}" in current_files
    } | new_files
    return replace(
        manifest,
        id=fingerprint("dataset", {"files": dict(sorted(files.items())), "parts": spans}, {}),
        lineage=base.lineage or base.id,
        ancestors=[*base.ancestors, base.id],
        joined_from=base.plays_id,
        joined_at=datetime.now(timezone.utc).isoformat(),
        files=dict(sorted((files | staging.keep_manifest(base)).items())),
    )
