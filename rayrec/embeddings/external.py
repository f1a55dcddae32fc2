"""Song vectors from outside: any table of song ids and vectors, matched to the catalog and normalized."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.catalog import Catalog
from rayrec.embeddings.vectors import SongVectors
from rayrec.errors import InputError
from rayrec.importing.vector_files import read_vector_file


@dataclass(frozen=True)
class OutsideVectors:
    """What a file gave."""

    vectors: SongVectors  # (N, D), in the order of the catalog
    rows: int  # rows of the file
    unknown_ids: int  # rows whose song is not in the catalog; left out
    zero_vectors: int  # rows of zeros; their songs stay without a vector


def read_outside(path: str | Path, catalog: Catalog) -> OutsideVectors:
    """Vectors of a local file, as `read_vector_file` reads it, for the songs of the catalog.

    A .npy file without ids has one row per song in the order of the catalog.

    Raises `InputError` for a file that cannot be read so, numbers that are not finite, and a file that has no vector
    for any song of the catalog.
    """
    raw, song_ids = read_vector_file(path)
    if song_ids is None:
        if len(raw) != len(catalog):
            raise InputError(
                f"vectors file {path} has {len(raw)} rows, the catalog {len(catalog)} songs; "
                f"give one row per song in the order of the catalog, or the ids in {Path(path).stem}.ids.txt beside it"
            )
        targets = np.arange(len(catalog))
    else:
        rows = pc.index_in(song_ids, value_set=catalog.table.column(columns.SONG_ID))
        targets = np.asarray(pc.fill_null(rows, -1).to_numpy(zero_copy_only=False), dtype=np.int64)
    found = targets >= 0
    placed = np.zeros((len(catalog), raw.shape[1]), dtype=raw.dtype)
    placed[targets[found]] = raw[found]
    try:
        vectors = SongVectors.normalized(placed)
    except InputError as error:
        raise InputError(f"vectors file {path}: {error}") from error
    if not vectors.known.any():
        raise InputError(
            f"vectors file {path} has a vector for none of the {len(catalog)} songs of the catalog "
            f"({int((~found).sum())} of its {len(raw)} ids are unknown); check its song ids"
        )
    return OutsideVectors(vectors, len(raw), int((~found).sum()), int((~raw.any(axis=1)).sum()))
