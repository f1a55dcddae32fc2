"""Songs that were described before anybody played them: they get rows of the catalog, behind those that are there."""

from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.catalog import DESCRIPTIONS_FILE
from rayrec.data.content import CONTENT_FILE, CONTENT_IDS
from rayrec.data.dataset import Dataset
from rayrec.importing.staging import Staging
from rayrec.storage.artifacts import fingerprint
from rayrec.storage.workspace import DATASET, SONGS_TABLE


def take_in_described_songs(dataset: Dataset) -> int:
    """Append the described songs that the catalog lacks to it, in the order of the descriptions; how many they were.

    The data set gets another id and descends from the one that was there; plays and other rows stay as they are.
    """
    workspace, base = dataset.workspace, dataset.manifest
    songs = workspace.read_table(SONGS_TABLE).slice(0, base.songs)
    parts = [pa.array([], pa.string())]
    for description in dataset.descriptions():
        names = [DESCRIPTIONS_FILE, *([CONTENT_IDS] if CONTENT_FILE in description.files else [])]
        for name in names:
            column = workspace.read_table(description.path(name), [columns.SONG_ID]).column(columns.SONG_ID)
            parts.append(columns.one_array(column).cast(pa.string()))
    described = pc.unique(pa.concat_arrays(parts))
    known = pc.is_in(described, value_set=columns.one_array(songs.column(columns.SONG_ID)).cast(pa.string()))
    new = described.filter(pc.invert(known))
    if not len(new):
        return 0
    rows = pa.array(np.arange(base.songs, base.songs + len(new), dtype=np.int32))
    nothing = pa.nulls(len(new), pa.string())  # titles and artists come from the descriptions
    grown = pa.concat_tables([songs, pa.table([rows, new, nothing, nothing], schema=columns.SONGS_TABLE)])
    staging = Staging(workspace, fingerprint("described songs", {"songs": len(grown)}, {"dataset": base.id}))
    digest = workspace.write_table(staging.out(SONGS_TABLE), grown)
    files = base.files | {SONGS_TABLE.removeprefix(f"{DATASET}/"): digest} | staging.keep_manifest(base)
    manifest = replace(
        base,
        id=fingerprint("dataset", {"files": dict(sorted(files.items()))}, {}),
        lineage=base.lineage or base.id,
        ancestors=[*base.ancestors, base.id],
        joined_from=base.plays_id,  # the plays are the same
        songs=len(grown),
        files=dict(sorted(files.items())),
        created_at=datetime.now(timezone.utc).isoformat(),
    )
    staging.publish(manifest)
    dataset.manifest = manifest
    return len(new)
