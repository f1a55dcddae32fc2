"""Audit a whole workspace, in bounded memory: a file, or a bucket of users, at a time."""

import posixpath

import pyarrow.fs as pafs

from rayrec.data.dataset import Dataset
from rayrec.errors import NotFoundError
from rayrec.jobs.verifying.audit import Audit
from rayrec.jobs.verifying.datasets import check_dataset, check_splits
from rayrec.jobs.verifying.parts import check_artifacts
from rayrec.progress import progress
from rayrec.storage import releases
from rayrec.storage.workspace import DATASET_MANIFEST, IMPORT_STAGING, LEASE, LOCK, LOCK_HOLDER, Workspace

STORED = (".npy", ".safetensors", ".parquet", ".faiss", ".arrow")  # files that must stand under a checksum


def verify_workspace(workspace: Workspace) -> Audit:
    """Compare every file with its checksum and every count with its like; look into every artifact.

    Problems: a file that is missing, differs or is listed in no manifest, a user who is missing or
    there twice, vectors that are not finite and normalized, an index that is not that of its model,
    a release whose parts do not fit. Notes: what unfinished jobs have left, and what was made of
    something that is not there any more.
    """
    with progress("verify") as bar:
        audit = Audit(workspace=workspace, bar=bar)
        dataset = None
        with audit.reading(DATASET_MANIFEST):
            try:
                dataset = Dataset(workspace)
            except NotFoundError:
                audit.note(DATASET_MANIFEST, "is missing: no data set, or one being replaced")
        if dataset is not None:
            check_dataset(audit, dataset)
            with audit.reading("splits"):
                check_splits(audit, dataset)
        check_artifacts(audit, dataset)
        with audit.reading(releases.ACTIVE):
            releases.active_release(workspace)
        _check_leftovers(audit)
    return audit


def _check_leftovers(audit: Audit) -> None:
    """Files that no manifest speaks of: problems where they look like artifacts, notes where a job left them."""
    unfinished = tuple(f"{note.path}/" for note in audit.notes)
    selector = pafs.FileSelector(audit.workspace.root, allow_not_found=True, recursive=True)
    staged = 0
    for info in audit.workspace.filesystem.get_file_info(selector):
        path = posixpath.relpath(info.path, audit.workspace.root)
        if info.type != pafs.FileType.File or path in audit.covered or path.startswith(unfinished):
            continue
        if path.startswith(f"{IMPORT_STAGING}/"):
            staged += 1
        elif path in (LOCK, LOCK_HOLDER, LEASE):
            continue
        elif posixpath.basename(path).startswith(".") or "/." in path:
            audit.note(path, "is a leftover temporary file; it can be deleted")
        elif path.endswith(STORED):
            audit.problem(path, "is listed in no manifest")
    if staged:
        audit.note(IMPORT_STAGING, f"holds {staged} files of an unfinished import; the next one reuses or deletes them")
