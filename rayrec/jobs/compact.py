"""Compaction: joins the parts of the histories, so that reading takes few requests, and erases deleted users."""

from dataclasses import dataclass, replace
from datetime import datetime, timezone

from rayrec.data.dataset import Dataset
from rayrec.data.impressions import compact_impressions
from rayrec.display import progress
from rayrec.importing.merging import BucketJoiner, Spans, joined_spans
from rayrec.importing.staging import Staging, finish_publishing
from rayrec.jobs.forget import Erased, erase_forgotten
from rayrec.jobs.runtime import ray_cluster, run_buckets
from rayrec.storage import artifacts
from rayrec.storage.artifacts import DatasetManifest, fingerprint
from rayrec.storage.locking import writes
from rayrec.storage.releases import list_releases, read_active
from rayrec.storage.workspace import DATASET, HISTORIES, SENT_PLAYS, Workspace

NEWEST_RELEASES = 2  # newest releases that keep parts separate, in addition to the live release and the one before it


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
    Parts that taste vectors cover are not joined with later parts if a later `rayrec taste` continues these taste
    vectors, or if a release uses them: the live one, the one that a rollback makes live, or one of the last two that
    were created. Running readers keep reading the old files, which stay until `rayrec clean`. A killed compaction
    leaves the data set unchanged; the next one continues with the missing buckets. The impression log is compacted,
    too.
    """
    compact_impressions(workspace)
    finish_publishing(workspace)
    workspace.delete(SENT_PLAYS)  # a killed import may have left them after the users' rows were erased
    erased = erase_forgotten(workspace)
    dataset = Dataset(workspace)
    base = dataset.manifest
    spans = joined_spans(base.parts, _cuts(dataset))
    new = [span for span in spans if span not in base.spans]
    if not new:
        return Compacted(dataset=base, spans_before=base.spans, spans=base.spans, erased=erased)
    staging = Staging(workspace, fingerprint("compact", {"spans": spans}, {"dataset": base.id}))
    written = staging.bucket_results()
    todo = [bucket for bucket in range(base.buckets) if bucket not in written]
    with ray_cluster(), progress("compact", len(todo)) as bar:
        arguments = {"staging": staging, "dataset": dataset, "spans": new}
        for bucket, files in run_buckets(BucketJoiner, todo, arguments=arguments):
            written[bucket] = files
            bar.advance()
    manifest = _manifest(base, spans, written, staging)
    staging.publish(manifest)
    return Compacted(dataset=manifest, spans_before=base.spans, spans=manifest.spans, erased=erased)


def _cuts(dataset: Dataset) -> set[int]:
    """Return the parts at which files are cut: no file may hold plays from before such a part and from it on."""
    tastes = artifacts.listing(dataset.workspace, "tastes")
    fitting = [each for each in tastes if dataset.descends_from(each.inputs["dataset"])]
    all_releases, state = list_releases(dataset.workspace), read_active(dataset.workspace)
    kept = {state["active"], *state["history"][-1:], *(release.id for release in all_releases[-NEWEST_RELEASES:])}
    used = {release.inputs["tastes"] for release in all_releases if release.id in kept}
    parts = {each.id: dataset.earlier(each.inputs["dataset"]).parts for each in fitting}
    newest: dict[str, int] = {}
    for each in fitting:
        model = each.inputs["models"]
        newest[model] = max(newest.get(model, 0), parts[each.id])
    return {*newest.values(), *(parts[each] for each in used if each in parts)}


def _manifest(
    base: DatasetManifest, spans: Spans, written: dict[int, dict[str, str]], staging: Staging
) -> DatasetManifest:
    new = {path.removeprefix(f"{DATASET}/"): digest for files in written.values() for path, digest in files.items()}
    joined = [span for span in spans if span[0] < span[1]]
    manifest = replace(base, joined=joined)
    current_files = {path for bucket in range(base.buckets) for path in manifest.histories_files(bucket)}
    histories = HISTORIES.removeprefix(f"{DATASET}/")
    files = {
        path: digest
        for path, digest in base.files.items()
        if not path.startswith(f"{histories}/") or f"{DATASET}/{path}" in current_files
    } | new
    return replace(
        manifest,
        id=fingerprint("dataset", {"files": dict(sorted(files.items())), "parts": spans}, {}),
        lineage=base.lineage or base.id,
        ancestors=[*base.ancestors, base.id],
        joined_from=base.plays_id,
        joined_at=datetime.now(timezone.utc).isoformat(),
        files=dict(sorted((files | staging.keep_manifest(base)).items())),
    )
