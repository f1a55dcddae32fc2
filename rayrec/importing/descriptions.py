"""Song metadata by song id, next to the data set: titles, artists, albums, release days, markets, content vectors.

The input is a csv file with a header line, or a Parquet file. Roles of its columns: song, and any of title, artist,
album, released (YYYY-MM-DD, YYYY-MM or YYYY) and markets (names separated by `|`). In Parquet, released may also be a
column of dates, and markets a column of lists.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from rayrec.config import Settings, to_mapping
from rayrec.data import columns
from rayrec.data.catalog import CONTENT_FILE, CONTENT_IDS, DESCRIPTIONS, DESCRIPTIONS_FILE
from rayrec.data.columns import one_array
from rayrec.data.dataset import Dataset
from rayrec.data.spelling import (
    NOT_UTF8,
    Problems,
    plain,
    spell_artists,
    spell_ids,
    spell_lists,
    spell_texts,
    spell_values,
)
from rayrec.errors import InputError
from rayrec.importing.readers import delimited
from rayrec.importing.readers.delimited import Delimiter
from rayrec.importing.readers.reader import (
    NO_SONG,
    Unit,
    find_files,
    mapped_columns,
    naming,
    open_plain,
    plain_name,
    unterminated_file_warnings,
)
from rayrec.importing.readers.tabular import open_parquet, read_columns
from rayrec.importing.staging import Staging
from rayrec.importing.vector_files import read_vector_file
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest, read_songs
from rayrec.storage.locking import writes
from rayrec.storage.workspace import DATASET, Workspace, later_songs_file

ROLES = {
    "song": columns.SONG_ID,
    "title": columns.TITLE,
    "artist": columns.ARTIST,
    "album": columns.ALBUM,
    "released": columns.RELEASED,
    "markets": columns.MARKETS,
}
DAY = r"^\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?$"
FIRST_DAY, LAST_DAY = -719_162, 2_932_896  # years 1 to 9999, the range of Python's dates, in days since 1970
NO_DAY = "release day is not YYYY-MM-DD, YYYY-MM or YYYY"
IDS_SHOWN = 3  # ids of a file and of the catalog in a message, if none is in both
DAY_OUT_OF_RANGE = "release day is not in the years 1 to 9999"


class DescribeConfig(Settings):
    """Settings of song metadata: the columns of the file, content vectors, and whether to append."""

    columns: dict[str, str] = Field(
        {},
        description=f"Column of each role, as role=column; roles: {', '.join(ROLES)}; default: the name of the role",
    )
    delimiter: Delimiter = Field(",", description="csv: column delimiter; \\t for a tab")
    vectors: str | None = Field(
        None,
        description="Content vectors, of audio, text or tags: .parquet with columns song_id and vector, or NAME.npy "
        "with song IDs in NAME.ids.txt next to it",
    )
    append: bool = Field(False, description="Keep the existing metadata of songs that are not in the files")


@dataclass(frozen=True, kw_only=True)
class SongMetadata:
    """Song metadata read from a file."""

    table: pa.Table  # the columns of columns.DESCRIPTIONS that the file has
    rejected: dict[str, int]  # reason -> rows
    invalid: dict[str, int]  # reason -> values that were replaced by null


@dataclass(frozen=True, kw_only=True)
class DescribeResult:
    """The result of `describe`."""

    id: str  # id of the metadata
    inputs: dict[str, str]  # role -> id, of the data set and of the metadata that was kept
    songs: int  # songs of the catalog
    described: int  # songs of the catalog with a row in the file
    unknown: int  # songs of the file that are not in the catalog; their metadata is used once they are added
    titles: int  # songs of the catalog with a title now
    artists: int  # songs with an artist
    albums: int  # songs with an album
    released: int  # songs with a release day
    markets: int  # songs with a list of markets
    content: int  # songs with a content vector
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> rows of the file
    invalid: dict[str, int] = field(default_factory=dict)  # reason -> values that were replaced by null
    warnings: list[str] = field(default_factory=list)


@writes("describe")
def describe(workspace: Workspace, config: DescribeConfig, path: str | None = None) -> DescribeResult:
    """Read a table of songs, content vectors or both, and store them next to the data set.

    They replace the existing metadata; with `config.append` the metadata of all other songs is kept. Only with
    `config.append` may a file name no song of the catalog: `rayrec songs add` can then add its songs.

    Raises `NotFoundError` without a data set. Raises `InputError` as `read_descriptions` and `read_vector_file` do, and
    if neither file is given, if a file names no song of the catalog, or if content vectors have another length than the
    existing ones that are kept. After an error the existing metadata is unchanged.
    """
    dataset = Dataset(workspace)
    if path is None and config.vectors is None:
        raise InputError("no input; give a table of songs, or content vectors with --vectors FILE")
    metadata = SongMetadata(table=columns.DESCRIPTIONS.empty_table(), rejected={}, invalid={})
    if path is not None:
        metadata = read_descriptions(path, config.columns, config.delimiter)
    vectors = None if config.vectors is None else _read_content(dataset, config)
    catalog_ids = one_array(read_songs(workspace, dataset.manifest, [columns.SONG_ID]).column(columns.SONG_ID))
    ids_of_files = [] if path is None else [(path, one_array(metadata.table.column(columns.SONG_ID)))]
    if vectors is not None:
        ids_of_files.append((str(config.vectors), vectors[0].cast(pa.string())))
    matched_counts = [pc.sum(pc.is_in(ids, value_set=catalog_ids)).as_py() or 0 for _, ids in ids_of_files]
    unmatched_messages = [
        f"no song of {source} is in the catalog: the file has IDs such as {_id_examples(ids)}, the catalog "
        f"{_id_examples(catalog_ids)}"
        for (source, ids), count in zip(ids_of_files, matched_counts, strict=True)
        if not count
    ]
    if unmatched_messages and not config.append:
        raise InputError(
            f"{'; '.join(unmatched_messages)}; check the column of song IDs, or pass --append if you will add these "
            "songs later"
        )
    stored_manifest = store_descriptions(dataset, metadata.table, {**to_mapping(config), "path": path or ""}, vectors)
    table = dataset.catalog().table
    described_count = 0 if path is None else matched_counts[0]

    def count_values(name: str) -> int:
        return len(table) - int(table.column(name).null_count)

    return DescribeResult(
        id=stored_manifest.id,
        inputs=stored_manifest.inputs,
        songs=len(table),
        described=described_count,
        unknown=len(metadata.table) - described_count,
        titles=count_values(columns.TITLE),
        artists=count_values(columns.ARTIST),
        albums=count_values(columns.ALBUM),
        released=count_values(columns.RELEASED),
        markets=count_values(columns.MARKETS),
        content=int((dataset.content().places >= 0).sum()),
        rejected=metadata.rejected,
        invalid=metadata.invalid,
        warnings=[
            *(f"{message}." for message in unmatched_messages),
            *(
                []
                if path is None or plain_name(path).endswith(".parquet")
                else unterminated_file_warnings(find_files([path], ()))
            ),
        ],
    )


def _id_examples(ids: pa.Array) -> str:
    return ", ".join(map(repr, ids[:IDS_SHOWN].to_pylist()))


def _read_content(dataset: Dataset, config: DescribeConfig) -> tuple[pa.Array, np.ndarray]:
    """Return song ids and their content vectors, float32 (n, C)."""
    path = str(config.vectors)
    raw, ids = read_vector_file(path)
    if ids is None:
        ids = one_array(dataset.catalog().table.column(columns.SONG_ID))
        if len(raw) != len(ids):
            raise InputError(
                f"vectors file {path} has {len(raw)} rows, but the catalog has {len(ids)} songs; give the IDs of the "
                "rows in NAME.ids.txt next to it"
            )
    vectors = np.asarray(raw, dtype=np.float32)
    invalid_rows = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(invalid_rows):
        raise InputError(
            f"{len(invalid_rows)} of {len(vectors)} rows of vectors file {path} contain NaN or infinite numbers, the "
            f"first is row {invalid_rows[0] + 1}; remove these rows"
        )
    dim = dataset.content().dim
    if config.append and dim not in (0, vectors.shape[1]):
        raise InputError(
            f"vectors file {path} has vectors of {vectors.shape[1]} numbers, but the existing vectors have {dim}; "
            "give vectors from the same model, or omit --append to replace all existing vectors"
        )
    return ids, vectors


def store_descriptions(
    dataset: Dataset,
    table: pa.Table,
    config: dict[str, Any],
    vectors: tuple[pa.Array, np.ndarray] | None = None,
) -> Manifest:
    """Store `table`, some columns of columns.DESCRIPTIONS, as the metadata of songs, in place of the existing metadata.

    `vectors` are song ids and their content vectors, float32 (n, C). If append is true in `config`, the existing
    metadata is kept too, except in the columns of `table` for its songs.
    """
    workspace, inputs = dataset.workspace, {"dataset": dataset.manifest.id}
    is_append = bool(config.get("append"))
    existing = artifacts.listing(workspace, DESCRIPTIONS)
    if is_append and existing:
        inputs["descriptions"] = existing[-1].id
    # The id depends on the content: later stages are cached by it, and the number of a deleted attempt is used again.
    print_id = artifacts.fingerprint("describe", config, {**inputs, "content": _digest(table, vectors)})
    metadata_id, _ = artifacts.new_id(workspace, DESCRIPTIONS, print_id, repeat=True)
    manifest = Manifest(kind=DESCRIPTIONS, id=metadata_id, config=config, inputs=inputs)
    workspace.write_table(manifest.path(DESCRIPTIONS_FILE), table)
    file_names = [DESCRIPTIONS_FILE]
    if vectors is not None:
        workspace.write_array(manifest.path(CONTENT_FILE), vectors[1])
        workspace.write_table(manifest.path(CONTENT_IDS), pa.table({columns.SONG_ID: vectors[0]}))
        file_names += [CONTENT_FILE, CONTENT_IDS]
    stored_manifest = artifacts.publish(workspace, manifest, file_names)
    for replaced in [] if is_append else existing:
        workspace.delete(replaced.path("manifest.json"))  # first: an artifact without a manifest does not exist
        workspace.delete(replaced.folder)
    return stored_manifest


def unused_metadata_notes(dataset: Dataset, last_step: str = "fit the models") -> list[str]:
    """Return a note if all stored metadata belongs to a data set that was replaced; else an empty list.

    The note ends with `last_step`, what to do once the songs are described again.
    """
    if dataset.descriptions() or not artifacts.listing(dataset.workspace, DESCRIPTIONS):
        return []
    return [
        "The song metadata belongs to the data set that was replaced and is not used; run `rayrec describe` again, and "
        f"then {last_step}"
    ]


def _digest(table: pa.Table, vectors: tuple[pa.Array, np.ndarray] | None) -> str:
    """The sha256 of metadata and content vectors."""
    digest = hashlib.sha256()
    for part in [table] if vectors is None else [table, pa.table({columns.SONG_ID: vectors[0]})]:
        digest.update(part.schema.serialize())
        for batch in part.combine_chunks().to_batches():
            digest.update(batch.serialize())
    if vectors is not None:
        digest.update(repr(vectors[1].shape).encode() + np.ascontiguousarray(vectors[1]).tobytes())
    return digest.hexdigest()


def add_described_songs(dataset: Dataset) -> int:
    """Append to the catalog all songs that have metadata but are not in it; return their number.

    They are added in the order of the metadata. The data set gets a new id and descends from the previous data set;
    plays and existing song rows are unchanged.
    """
    workspace, base = dataset.workspace, dataset.manifest
    songs = read_songs(workspace, base, [columns.SONG_ID])
    id_chunks = [pa.array([], pa.string())]
    for description in dataset.descriptions():
        file_names = [DESCRIPTIONS_FILE, *([CONTENT_IDS] if CONTENT_FILE in description.files else [])]
        for name in file_names:
            column = workspace.read_table(description.path(name), [columns.SONG_ID]).column(columns.SONG_ID)
            id_chunks.append(columns.one_array(column).cast(pa.string()))
    described_ids = pc.unique(pa.concat_arrays(id_chunks))
    is_known = pc.is_in(described_ids, value_set=columns.one_array(songs.column(columns.SONG_ID)).cast(pa.string()))
    new_ids = described_ids.filter(pc.invert(is_known))
    if not len(new_ids):
        return 0
    song_rows = pa.array(np.arange(base.songs, base.songs + len(new_ids), dtype=np.int32))
    null_texts = pa.nulls(len(new_ids), pa.string())  # titles and artists come from the descriptions
    table = pa.table([song_rows, new_ids, null_texts, null_texts], schema=columns.SONGS_TABLE)
    path = later_songs_file(base.songs)
    song_count = base.songs + len(new_ids)
    staging = Staging(workspace, artifacts.fingerprint("described songs", {"songs": song_count}, {"dataset": base.id}))
    digest = workspace.write_table(staging.out(path), table)
    files = base.files | {path.removeprefix(f"{DATASET}/"): digest} | staging.keep_manifest(base)
    manifest = replace(
        base,
        id=artifacts.fingerprint("dataset", {"files": dict(sorted(files.items()))}, {}),
        lineage=base.lineage or base.id,
        ancestors=[*base.ancestors, base.id],
        joined_from=base.plays_id,  # the plays are the same
        songs=song_count,
        files=dict(sorted(files.items())),
        created_at=datetime.now(timezone.utc).isoformat(),
    )
    staging.publish(manifest)
    dataset.manifest = manifest
    return len(new_ids)


def read_descriptions(source: str, names: Mapping[str, str] | None = None, delimiter: str = ",") -> SongMetadata:
    """Return the metadata of a file, local or on object storage; `names` maps roles to its columns.

    The first row of a song is used. A row without a song id, or a line that cannot be read, is rejected; any other
    value that cannot be read is replaced by null. Raises `InputError` for a file that is neither csv nor Parquet, for a
    role or column that does not exist, and if no row can be used.
    """
    path = plain_name(source)
    rejected: dict[str, int] = {}
    invalid: dict[str, int] = {}
    if path.endswith(".parquet"):
        role_columns = _read_parquet(source, names or {})
    elif path.endswith((".csv", ".tsv")):
        role_columns, rejected = _read_csv(source, names or {}, delimiter)
    else:
        raise InputError(
            f"the file {source} is not .csv, .tsv or .parquet; give a table of songs in one of these formats"
        )
    column_names = {role: (names or {}).get(role, role) for role in role_columns}
    problems = Problems(len(role_columns["song"]))
    with naming(source):
        ids = spell_ids(role_columns["song"], problems, column=column_names["song"], reason=NO_SONG)
    rejected |= _reason_counts(problems)
    usable_rows = np.flatnonzero(~problems.bad)
    if not len(usable_rows):
        reasons = ", ".join(f"{count} × {reason}" for reason, count in rejected.items()) or "the file has no rows"
        raise InputError(f"{source}: no row can be used: {reasons}; check the format and the delimiter")
    row_numbers = pa.array(usable_rows[_first_rows(ids.take(pa.array(usable_rows)))])
    values = {columns.SONG_ID: ids.take(row_numbers)}
    readers = {"artist": spell_artists, "released": _read_days, "markets": spell_lists}
    for role in [role for role in ROLES if role in role_columns and role != "song"]:
        problems = Problems(len(row_numbers))
        with naming(source):
            column = readers.get(role, spell_texts)(
                plain(role_columns[role]).take(row_numbers), problems, column=column_names[role]
            )
        is_bad = pa.array(problems.bad)
        values[ROLES[role]] = pc.if_else(is_bad, pa.scalar(None, column.type), column) if problems.bad.any() else column
        for reason, count in _reason_counts(problems).items():
            invalid[f"{role}: {reason}" if reason == NOT_UTF8 else reason] = count
    schema = pa.schema([item for item in columns.DESCRIPTIONS if item.name in values])
    return SongMetadata(table=pa.table(values, schema=schema), rejected=rejected, invalid=invalid)


def _read_csv(source: str, names: Mapping[str, str], delimiter: str) -> tuple[dict[str, pa.Array], dict[str, int]]:
    """Return role -> column, and reject reason -> number of lines."""

    def find_positions(header: list[str]) -> dict[str, int]:
        delimited.require_delimiter(source, header, delimiter)
        return _find_columns(source, header, names)

    parts: list[pa.Table] = []
    reject_reasons: list[pa.ChunkedArray] = []
    for rows in delimited.read_delimited(Unit(source=source), delimiter, find_positions):
        parts.append(pa.table(rows.values))
        reject_reasons.append(rows.rejected.column("reason"))
    table = pa.concat_tables(parts)
    reason_counts = pc.value_counts(
        pa.chunked_array([chunk for column in reject_reasons for chunk in column.chunks], pa.string())
    )
    return (
        {role: one_array(table.column(role)) for role in table.column_names},
        {pair["values"]: pair["counts"] for pair in reason_counts.to_pylist()},
    )


def _read_parquet(source: str, names: Mapping[str, str]) -> dict[str, pa.Array]:
    with open_plain(source) as stream:
        file = open_parquet(source, pa.BufferReader(stream.read()))
    header = file.schema_arrow.names
    column_of = {role: header[position] for role, position in _find_columns(source, header, names).items()}
    table = read_columns(source, file, list(column_of.values()))
    return {role: one_array(table.column(name)) for role, name in column_of.items()}


def _find_columns(source: str, header: list[str], names: Mapping[str, str]) -> dict[str, int]:
    """Return role -> position of its column in the file."""
    position_of = mapped_columns(source, header, names, list(ROLES), ["song"])
    if len(position_of) == 1:
        raise InputError(f"{source} has no metadata column; expected at least one of {', '.join(list(ROLES)[1:])}")
    return position_of


def _first_rows(ids: pa.Array) -> np.ndarray:
    """int64: the row of the first occurrence of each id, ascending."""
    codes = np.asarray(ids.dictionary_encode().indices)
    return np.sort(np.unique(codes, return_index=True)[1])


def _reason_counts(problems: Problems) -> dict[str, int]:
    reasons = problems.reasons()
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}


def _read_days(values: pa.Array, problems: Problems, *, column: str) -> pa.Array:
    """date32 (R,): release days; for a month or a year, its first day.

    Values that are not dates, or not in the years 1 to 9999, are marked in `problems`.
    """
    if pa.types.is_date(values.type) or pa.types.is_timestamp(values.type):
        days = values.cast(pa.date32(), safe=False)
    else:
        texts = spell_values(values, problems, column=column)
        is_valid = pc.fill_null(pc.match_substring_regex(texts, DAY), True)
        full_dates = pc.utf8_slice_codeunits(pc.binary_join_element_wise(texts, "-01-01", ""), 0, 10)
        problems.mark(~is_valid.to_numpy(zero_copy_only=False), NO_DAY)
        days = _cast_days(pc.if_else(is_valid, full_dates, None), problems)
    day_numbers = pc.fill_null(days.cast(pa.int32()), 0).to_numpy(zero_copy_only=False)
    is_out_of_range = (day_numbers < FIRST_DAY) | (day_numbers > LAST_DAY)
    problems.mark(is_out_of_range, DAY_OUT_OF_RANGE)
    return pc.if_else(pa.array(is_out_of_range), pa.scalar(None, pa.date32()), days)


def _cast_days(texts: pa.Array, problems: Problems) -> pa.Array:
    """Convert YYYY-MM-DD to date32; dates that do not exist, such as February 30, are marked in `problems`."""
    try:
        return texts.cast(pa.date32())
    except pa.ArrowInvalid:
        days = [_parse_day(text) for text in texts.to_pylist()]
    problems.mark(np.array([day is None for day in days], dtype=bool) & texts.is_valid().to_numpy(False), NO_DAY)
    return pa.array(days, pa.date32())


def _parse_day(text: str | None) -> date | None:
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        return None
