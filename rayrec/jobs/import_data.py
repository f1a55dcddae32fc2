"""The import stage: pieces of files, ranges of songs and buckets of users are read and merged on Ray."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rayrec.display import progress
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.import_run import ImportResult, ImportRun, prepare_append, prepare_import
from rayrec.importing.staging import finish_publishing
from rayrec.jobs.forget import erase_forgotten
from rayrec.jobs.runtime import BucketWorker, ray_cluster, run_buckets
from rayrec.storage.artifacts import DatasetManifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace


@writes("import")
def import_data(workspace: Workspace, config: ImportConfig, *, repeat: bool = False) -> DatasetManifest:
    """Make the data set of a workspace, or add playlists to its plays or plays to its playlists.

    Completed work is kept: repeating the same import returns the existing data set, and a killed import continues with
    the missing units and buckets. An import of other files reuses the units that an unfinished import has read in the
    same way. Existing song rows never change.
    `repeat` replaces the existing plays (or playlists); if the data set has no playlists (or plays) in addition, it
    replaces the song rows too.

    Raises `InputError` for bad input, and if the data set already has other plays (or playlists).
    """
    finish_publishing(workspace)
    erase_forgotten(workspace, reading=config.paths)
    prepared = prepare_import(workspace, config, repeat=repeat)
    return _run_import(prepared).dataset if isinstance(prepared, ImportRun) else prepared


@writes("import --append")
def append_plays(workspace: Workspace, config: ImportConfig) -> ImportResult:
    """Add the plays of files to the data set as a new part; existing parts and song rows stay unchanged.

    Plays that the data set already has are merged and counted: appending the same files again changes nothing, and
    files that were appended under the same names and dates are not read again. The minimum plays of users and songs
    apply to new users and new songs only. A killed append leaves the data set unchanged; the same append continues it.

    Raises `InputError` if the data set has no plays, for playlists, and for plays without times.
    """
    finish_publishing(workspace)
    erase_forgotten(workspace, reading=config.paths)
    prepared = prepare_append(workspace, config)
    return _run_import(prepared) if isinstance(prepared, ImportRun) else ImportResult(dataset=prepared)


def _run_import(import_run: ImportRun) -> ImportResult:
    with ray_cluster():
        return import_run.run(_run_units)


def _run_units(
    title: str,
    make_worker: Callable[..., BucketWorker],
    units: Sequence[Any],
    *,
    arguments: dict[str, Any],
    called: str,
) -> Iterator[Any]:
    with progress(title, len(units)) as bar:
        for result in run_buckets(make_worker, units, arguments=arguments, called=called):
            yield result
            bar.advance()
