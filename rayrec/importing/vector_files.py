"""Files of vectors by song id: .npy with a file of ids next to it, or .parquet. Pickled data is never loaded."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.spelling import Problems, plain, spell_id, spell_ids
from rayrec.errors import InputError, first_line
from rayrec.importing.readers.reader import naming, open_source
from rayrec.importing.readers.tabular import open_parquet, read_columns
from rayrec.storage.artifacts import fingerprint, sha256
from rayrec.storage.workspace import Workspace

VECTOR = "vector"  # name of the Parquet column


def read_vector_file(path: str | Path) -> tuple[np.ndarray, pa.Array | None]:
    """Return the vectors of a local file, numbers (rows, D), and their song ids, strings; None if it has no ids.

    A .parquet file has the columns song_id (string) and vector (lists of one length). A .npy file
    has shape (rows, D), and its ids are in NAME.ids.txt (one id per line) or NAME.ids.json (a list) next to NAME.npy.

    Raises `InputError` for a file of another form, for different numbers of rows and ids, and for ids that occur twice.
    """
    path = Path(path)
    _require_file(path)
    if path.suffix not in (".npy", ".parquet"):
        raise InputError(f"vectors file {path} ends in {path.suffix!r}; give a .npy or .parquet file")
    raw, ids = _read_parquet(path) if path.suffix == ".parquet" else _read_npy(path)
    if ids is not None:
        _require_distinct(path, ids)
    return raw, ids


def file_id(name: str) -> str:
    """Return a fingerprint, twelve hex digits, of the content of a local file and of the file of its ids.

    Raises `InputError` if the file does not exist.
    """
    path = Path(name).absolute()
    _require_file(path)
    ids = _ids_file(path) if path.suffix == ".npy" else None
    files = [path] if ids is None else [path, ids]
    return fingerprint(VECTOR, {}, {file.name: sha256(Workspace(file.parent), file.name) for file in files})


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"vectors file {path} does not exist; give a .npy or .parquet file")


def _read_npy(path: Path) -> tuple[np.ndarray, pa.Array | None]:
    try:
        raw = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python: a damaged one may raise SyntaxError or other errors
        raise InputError(
            f"vectors file {path} is not an array of numbers: {first_line(error)}; "
            "write it with numpy.save(..., allow_pickle=False)"
        ) from error
    _require_matrix(path, raw)
    ids = _read_ids(path)
    if ids is not None and len(ids) != len(raw):
        raise InputError(
            f"vectors file {path} has {len(raw)} rows, but its file of IDs has {len(ids)}; give one ID per row"
        )
    return raw, None if ids is None else _spell_song_ids(path, ids)


def _spell_song_ids(path: Path, ids: pa.Array) -> pa.Array:
    """Return ids in the spelling of all imports. Raises `InputError` if a row has no id."""
    problems = Problems(len(ids))
    with naming(str(path)):
        spelled_ids = spell_ids(ids, problems, column=columns.SONG_ID, reason="no song ID")
    if problems.bad.any():
        raise InputError(
            f"vectors file {path} has {int(problems.bad.sum())} rows without a song ID, the first is row "
            f"{int(problems.bad.argmax()) + 1}; remove these rows"
        )
    return spelled_ids


def _require_matrix(path: Path, raw: np.ndarray) -> None:
    if raw.ndim != 2 or raw.shape[1] == 0 or raw.dtype.kind not in "fiu":
        raise InputError(
            f"vectors file {path} contains {raw.dtype} of shape {raw.shape}; expected numbers of shape (songs, D)"
        )


def _ids_file(path: Path) -> Path | None:
    """Return the file of the ids of NAME.npy, or None if it does not exist."""
    candidates = (path.with_suffix(suffix) for suffix in (".ids.txt", ".ids.json"))
    return next((file for file in candidates if file.is_file()), None)


def _read_ids(path: Path) -> pa.Array | None:
    file = _ids_file(path)
    if file is None:
        return None
    try:
        if file.suffix == ".txt":
            lines = file.read_bytes().decode("utf-8-sig").split("\n")  # an id may contain other line separators
            while lines and not lines[-1].strip():
                lines.pop()
            return pa.array([line.removesuffix("\r") for line in lines], pa.string())
        values = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(values, list):
            raise ValueError("expected a JSON list of IDs")
        return pa.array([spell_id(value) for value in values], pa.string())
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(
            f"the file of IDs of {path} cannot be read: {error}; give one ID per line, or a JSON list"
        ) from error


def _read_parquet(path: Path) -> tuple[np.ndarray, pa.Array]:
    with open_source(str(path)) as stream:
        file = open_parquet(str(path), stream)
        missing = {columns.SONG_ID, VECTOR} - set(file.schema_arrow.names)
        if missing:
            raise InputError(
                f"vectors file {path} has no column {sorted(missing)[0]!r}; "
                f"expected {columns.SONG_ID} (string) and {VECTOR} (list of numbers)"
            )
        table = read_columns(str(path), file, [columns.SONG_ID, VECTOR])
    ids = _spell_song_ids(path, table.column(columns.SONG_ID).combine_chunks())
    return _to_matrix(path, plain(table.column(VECTOR))), ids


def _to_matrix(path: Path, lists: pa.Array) -> np.ndarray:
    """Return a column of lists of one length as an array (rows, D)."""
    type_checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(lists.type) for is_kind in type_checks):
        raise InputError(f"vectors file {path}, column {VECTOR} has type {lists.type}; expected lists of numbers")
    if pa.types.is_fixed_size_list(lists.type):
        lists = lists.cast(pa.list_(lists.type.value_type))  # flattening a fixed-size list leaves out null lists
    lengths = pc.unique(pc.list_value_length(lists)).to_pylist()
    if len(lengths) != 1 or lengths[0] in (None, 0):
        raise InputError(
            f"vectors file {path}, column {VECTOR} has lists of lengths {sorted(map(str, lengths))[:5]}; "
            "expected lists of one length, without nulls"
        )
    flat_values = pc.list_flatten(lists)
    values = np.asarray(
        (flat_values.cast(pa.float64()) if pa.types.is_decimal(flat_values.type) else flat_values).to_numpy(False)
    )
    raw = values.reshape(-1, lengths[0])
    _require_matrix(path, raw)
    return raw


def _require_distinct(path: Path, song_ids: pa.Array) -> None:
    counts = pc.value_counts(song_ids)
    repeated_ids = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(repeated_ids):
        raise InputError(
            f"vectors file {path} has {len(song_ids) - len(counts)} repeated IDs, such as "
            f"{repeated_ids[0].as_py()!r}; give each ID once"
        )
