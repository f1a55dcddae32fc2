"""Byte ranges of line-based files, as blocks of whole lines that know their numbers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, cast

import numpy as np

from rayrec.errors import DamagedInputError
from rayrec.importing.readers.files import is_compressed, open_plain, open_source
from rayrec.importing.readers.reader import Unit

BLOCK_BYTES = 16 << 20
TAIL_BYTES = 64 << 10  # read at a time to find the end of a range's last line
LINE_LIMIT = 64 << 20  # a longer line says that this is no text file
NEWLINE, RETURN = 10, 13
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Block:
    """L whole lines. Line i of the block is data[starts[i]:ends[i]], without its line end."""

    def __init__(self, data: bytes, first: int) -> None:
        self.data = data
        self.first = first  # number of the first line, from the start of the unit
        self.bytes = np.frombuffer(data, dtype=np.uint8)
        breaks = np.flatnonzero(self.bytes == NEWLINE)
        if len(data) and data[-1] != NEWLINE:
            breaks = np.append(breaks, len(data))
        self.starts = np.concatenate([[0], breaks[:-1] + 1]).astype(np.int64)[: len(breaks)]
        returned = (breaks > self.starts) & (self.bytes[np.maximum(breaks, 1) - 1] == RETURN) if len(breaks) else breaks
        self.ends = breaks - returned

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, index: int | np.integer) -> bytes:
        """The bytes of one line."""
        return self.data[self.starts[index] : self.ends[index]]

    def texts(self, indices: Iterable[int | np.integer]) -> list[str]:
        """Lines as text; bytes that are not UTF-8 are replaced."""
        return [self.line(index).decode("utf-8", errors="replace") for index in indices]

    def numbers(self, indices: np.ndarray) -> np.ndarray:
        """int64: line numbers, counted from the start of the unit."""
        return indices + self.first


def byte_ranges(source: str, size: int, unit_bytes: int) -> list[Unit]:
    """A line-based file in units of at most `unit_bytes`; a compressed one whole."""
    if is_compressed(source):
        return [Unit(source=source)]
    starts = range(0, size, unit_bytes)
    return [Unit(source=source, start=start, stop=min(start + unit_bytes, size)) for start in starts]


def read_blocks(unit: Unit, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The lines that begin within the unit's byte range, whole, in blocks of about `block_bytes`.

    Raises `DamagedInputError` for a line longer than 64 MiB.
    """
    first, rest = 1, b""
    with _open_at(unit) as stream:
        left = None if unit.stop is None else unit.stop - unit.start
        if unit.start and left is not None:
            left -= _skip_line(stream, left)
        while left is None or left > 0:
            piece = stream.read(block_bytes if left is None else min(block_bytes, left))
            if not piece:
                break
            left = None if left is None else left - len(piece)
            end = piece.rfind(b"\n") + 1
            if left == 0 and end < len(piece):
                piece += _rest_of_line(stream, unit)
                end = len(piece)
            if not end:
                rest += piece
                _check_length(rest, unit)
                continue
            block = Block(_without_mark(rest + piece[:end], unit, first), first)
            rest, first = piece[end:], first + len(block)
            yield block
        if rest:
            yield Block(_without_mark(rest, unit, first), first)


def _without_mark(data: bytes, unit: Unit, first: int) -> bytes:
    """Lines without the byte order mark that the first of a file may begin with."""
    return data.removeprefix(BYTE_ORDER_MARK) if first == 1 and not unit.start else data


def first_line(source: str) -> bytes:
    """A file's first line, without line end and byte order mark; empty for an empty file."""
    with open_plain(source) as stream:
        line = stream.read(TAIL_BYTES)
        while line and b"\n" not in line and len(line) < LINE_LIMIT and (more := stream.read(TAIL_BYTES)):
            line += more
    return line.split(b"\n", 1)[0].removesuffix(b"\r").removeprefix(BYTE_ORDER_MARK)


@contextmanager
def _open_at(unit: Unit) -> Iterator[IO[bytes]]:
    if not unit.start:
        with open_plain(unit.source) as stream:
            yield stream
        return
    with open_source(unit.source) as raw:
        raw.seek(unit.start - 1)
        yield cast(IO[bytes], raw)


def _skip_line(stream: IO[bytes], left: int) -> int:
    """Go to the first line that begins in the range; return how many of its bytes were skipped.

    The stream stands one byte before the range: a line break there means that the range begins with a line.
    """
    skipped = -1
    while skipped < left:
        piece = stream.read(TAIL_BYTES)
        if not piece:
            return left
        end = piece.find(b"\n") + 1
        if end:
            stream.seek(end - len(piece), 1)
            return skipped + end
        skipped += len(piece)
    return left


def _rest_of_line(stream: IO[bytes], unit: Unit) -> bytes:
    rest = b""
    while piece := stream.read(TAIL_BYTES):
        end = piece.find(b"\n") + 1
        if end:
            return rest + piece[:end]
        rest += piece
        _check_length(rest, unit)
    return rest


def _check_length(rest: bytes, unit: Unit) -> None:
    if len(rest) > LINE_LIMIT:
        raise DamagedInputError(
            f"{unit.source} has a line longer than {LINE_LIMIT >> 20} MiB; check that it is a text file of plays"
        )
