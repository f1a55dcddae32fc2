"""Plays in order without times: one history or session per line, `user<separator>song<separator>song ...`.

Instead of a time, a row has its place in the line. The second pass of the import, which has all lines of a user, turns
these places into positions. Without a user separator all lines are those of the user of the options, or without one
each line is a user of its own, named `file:line`.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.ragged import ranges
from rayrec.data.spelling import Problems, missing, spell_ids
from rayrec.importing.readers import reader
from rayrec.importing.readers.delimited import line_faults
from rayrec.importing.readers.reader import (
    Batch,
    Block,
    ReadOptions,
    Unit,
    byte_ranges,
    file_name,
    read_blocks,
    require_text,
)

# Small, because a play may be only a few characters, and a row takes ten times as much memory as its text.
BLOCK_BYTES = 4 << 20
EMPTY_LINE = "empty line"


class SequenceReader:
    """Reads text files with one ordered list of songs per line."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Split the file into byte ranges if the users are known.

        Otherwise the file is one unit: users are named after line numbers, which are counted from its start.
        """
        require_text(source)
        has_users = self.options.user_separator or self.options.user
        return byte_ranges(source, size, unit_bytes) if has_users else [Unit(source=source)]

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield one batch per block of 4 MiB; `played_at` is the place in the line, from 0."""
        for block in read_blocks(unit, BLOCK_BYTES):
            yield self._batch(block, unit.source)

    def _batch(self, block: Block, source: str) -> Batch:
        problems = Problems(len(block))
        users, songs = self._split_users(_line_texts(block, problems), block, source, problems)
        usable_lines = np.flatnonzero(~problems.bad)
        song_lists = pc.split_pattern(songs.take(pa.array(usable_lines)), self.options.song_separator)
        lengths = pc.list_value_length(song_lists).to_numpy()
        row_lines = np.repeat(usable_lines, lengths)
        row_problems = Problems(len(row_lines))
        song_ids = spell_ids(pc.list_flatten(song_lists), row_problems, column="song", reason=reader.NO_SONG)
        rejected_lines = np.flatnonzero(problems.bad)
        return reader.batch(
            columns.PLAYS,
            {
                columns.USER: users.take(pa.array(row_lines)),
                columns.SONG_ID: song_ids,
                columns.PLAYED_AT: pa.array(ranges(0, lengths)),
            },
            source=source,
            lines=block.numbers(row_lines),
            problems=row_problems,
            texts=lambda rejected_rows: block.texts(row_lines[rejected_rows]),
            covered=len(block),
            also=reader.rejected(
                source, block.numbers(rejected_lines), problems.reasons(), block.texts(rejected_lines)
            ),
        )

    def _split_users(self, texts: pa.Array, block: Block, source: str, problems: Problems) -> tuple[pa.Array, pa.Array]:
        """Return the user of each line and the songs of each line, both as strings (L,)."""
        separator = self.options.user_separator
        if not separator and self.options.user:
            return pa.repeat(self.options.user, len(block)), texts
        if not separator:
            numbers = pa.array(block.numbers(np.arange(len(block)))).cast(pa.string())
            return pc.binary_join_element_wise(f"{file_name(source)}:", numbers, ""), texts
        parts = pc.split_pattern(texts, separator, max_splits=1)
        problems.mark(pc.list_value_length(parts).to_numpy() < 2, f"no {separator!r} between user and songs")
        flat_parts, offsets = pc.list_flatten(parts), parts.offsets.to_numpy()
        users = spell_ids(flat_parts.take(pa.array(offsets[:-1])), problems, column="user", reason=reader.NO_USER)
        return users, flat_parts.take(pa.array(offsets[1:] - 1))


def _line_texts(block: Block, problems: Problems) -> pa.Array:
    """Return the lines without surrounding spaces, strings (L,); lines that are not valid text are marked and empty."""
    bounds = np.append(np.stack([block.starts, block.ends], axis=1).ravel(), len(block.data)).astype(np.int32)
    line_parts = pa.StringArray.from_buffers(2 * len(block), pa.py_buffer(bounds), pa.py_buffer(block.data))
    faults = line_faults(block)
    for reason in sorted(set(faults.values())):
        problems.mark(np.isin(np.arange(len(block)), [line for line in faults if faults[line] == reason]), reason)
    lines = line_parts.take(pa.array(np.where(problems.bad, 1, 2 * np.arange(len(block)))))
    texts = pc.utf8_trim_whitespace(lines)
    problems.mark(missing(texts), EMPTY_LINE)
    return texts
