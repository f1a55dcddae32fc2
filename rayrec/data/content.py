"""Content vectors of songs: what an outside model says of their sound, texts or tags, stored by song id.

N songs, C numbers per content vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

CONTENT_FILE = "content.npy"  # float32 (n, C) in the folder of a description
CONTENT_IDS = "content_ids.parquet"  # song_id of each row


@dataclass(frozen=True, kw_only=True)
class Content:
    """The content vectors of a catalog's songs; only those that are asked for are read."""

    parts: Sequence[np.ndarray]  # float32 (n, C) each, memory-mapped
    places: np.ndarray  # int64 (N,), of each song among the rows of all parts; -1 without content

    @classmethod
    def load(cls, workspace: Workspace, descriptions: Sequence[Manifest], song_ids: pa.Array) -> "Content":
        """Of the songs with these ids; where several descriptions have a song, the last counts."""
        parts, start = [], 0
        places = np.full(len(song_ids), -1, dtype=np.int64)
        for description in descriptions:
            if CONTENT_FILE in description.files:
                ids = workspace.read_table(description.path(CONTENT_IDS)).column(columns.SONG_ID).combine_chunks()
                rows = pc.fill_null(pc.index_in(song_ids, value_set=ids), -1).to_numpy(zero_copy_only=False)
                places = np.where(rows >= 0, start + rows.astype(np.int64), places)
                parts.append(workspace.read_array(description.path(CONTENT_FILE), description.files[CONTENT_FILE]))
                start += len(ids)
        return cls(parts=parts, places=places)

    @property
    def dim(self) -> int:
        """C; 0 where no song has content."""
        return self.parts[0].shape[1] if self.parts else 0

    def vectors(self, songs: np.ndarray) -> np.ndarray:
        """float32 (n, C): the content of songs, int (n,) rows; zeros where a song has none."""
        rows_of_vectors = np.zeros((len(songs), self.dim), dtype=np.float32)
        places, start = self.places[songs], 0
        for part in self.parts:
            here = np.flatnonzero((places >= start) & (places < start + len(part)))
            rows_of_vectors[here] = part[places[here] - start]
            start += len(part)
        return rows_of_vectors
