"""User states, logs of plays and sets of heard songs as bytes: a mark, a checksum, then msgpack with raw arrays.

Reading executes no code. Bytes of another version or with a changed bit are rejected. Numbers of network states are
stored in three bytes each. Arrays of plays are stored by byte plane (the first bytes of all numbers, then all second
bytes, and so on) and compressed; times are stored as differences.
"""

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa

from rayrec.data.histories import Histories
from rayrec.data.windows import NEVER
from rayrec.errors import DamagedArtifactError, DivergedError
from rayrec.model.taste_table import States
from rayrec.online.user_state import ModelState, Plays, UserState

STATE_MARK, PLAYS_MARK, HEARD_MARK = b"RrS3", b"RrP2", b"RrH1"  # the digit is the format's version
NUMBER_BYTES = 3  # per number of a network state; half precision reorders the first 20 songs of 4 % of the users
NUMBER_BITS = 8 * NUMBER_BYTES - 1  # without the sign
BLOCK = 16  # numbers that share an exponent; averages of many plays and of few plays are rarely in the same block
CODEC = "lz4_raw"  # as small as zlib on such short arrays, in a seventh of its time
REMEDY = "restore the store from a backup, or load the states into a new store with `rayrec states load`"


def pack_state(state: UserState) -> bytes:
    """Return a user's state as bytes."""
    models = []
    for model, own in state.models.items():
        shape = list(own.hidden.shape)
        before = [] if own.before is own.hidden else _pack_layers(own.before)
        place = [_moment(own.before_at), own.left, own.restarts, own.turn]
        models.append([model, shape, _pack_layers(own.hidden), before, *place])
    counts = [state.left, state.folded, state.rejected, state.turn, state.restarts]
    window = _play_arrays(state.window) if len(state.window) else []
    fields = [_moment(state.before_at), _moment(state.forgotten_at), counts, window, models]
    return _seal(STATE_MARK, [*fields, *_likes(state.likes)])


def pack_new_states(model: str, states: States, plays: np.ndarray, likes: Sequence[Plays] | None = None) -> list[bytes]:
    """Return for each of U users the result of `pack_state` for `UserState.start` with `plays`, int (U,), and `likes`.

    All users are packed together, which avoids Python objects for the fields of each user.
    """
    users, layers, _ = states.hidden.shape
    liked = [] if likes is None else [bool(len(own)) for own in likes]
    at, left = _numbers(states.last_played_at, states.last_played_at == NEVER), _numbers(plays)
    nothing, zeros = msgpack.packb([]), bytes(4)
    parts = [
        _constant(users, b"\x95") if not any(liked) else _bytes(np.where(liked, 0x96, 0x95).astype(np.uint8)[:, None]),
        at,
        _constant(users, msgpack.packb(None) + b"\x95"),
        left,
        _constant(users, zeros + nothing + b"\x91\x98" + msgpack.packb(model)),
        _constant(users, msgpack.packb(list(states.hidden.shape[1:])) + msgpack.packb([None] * layers)[:-layers]),
        *(part for layer in range(layers) for part in _layer_parts(states.hidden[:, layer])),
        _constant(users, nothing),
        at,
        left,
        _constant(users, zeros[:2]),
    ]
    bodies = _rows(parts)
    if likes is not None:
        bodies = [
            body + msgpack.packb(_play_arrays(own)) if len(own) else body
            for body, own in zip(bodies, likes, strict=True)
        ]
    return [_sealed(STATE_MARK, body) for body in bodies]


def unpack_state(data: bytes) -> UserState:
    """Return the state that `pack_state` packed. Raises `DamagedArtifactError` for other bytes."""
    fields = _open(STATE_MARK, data, "user state")
    try:
        before_at, forgotten_at, (left, folded, rejected, turn, restarts), window, models, *likes = fields
        return UserState(
            window=_plays(window) if window else Plays.of([], []),
            before_at=_time(before_at),
            left=left,
            folded=folded,
            rejected=rejected,
            turn=turn,
            restarts=restarts,
            forgotten_at=_time(forgotten_at),
            models={name: _model_state(*rest) for name, *rest in models},
            likes=_plays(likes[0]) if likes else Plays.of([], []),
        )
    except (IndexError, KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedArtifactError(f"a user state is damaged: {error!r}; {REMEDY}") from error


def pack_plays(plays: Plays) -> bytes:
    """Return a piece of a user's log as bytes."""
    return _seal(PLAYS_MARK, _play_arrays(plays))


def pack_histories(histories: Histories) -> list[bytes]:
    """Return the result of `pack_plays` for each user; every user must have plays."""
    offsets = histories.offsets
    steps = np.diff(histories.played_at, prepend=np.int64(0))
    steps[offsets[:-1]] = 0
    numbers = [histories.songs.astype("<i4"), steps.astype("<i8")]
    numbers += [] if histories.contexts is None else [histories.contexts.astype("<i4")]
    # One row with the bytes of all numbers per play. Transposed, a user's rows are the byte planes.
    table = np.concatenate([array.view(np.uint8).reshape(-1, array.itemsize) for array in numbers], axis=1)
    with_contexts, with_skips = (_any_of(values, offsets) for values in (histories.contexts, histories.skipped))
    firsts, bounds, codec = histories.played_at[offsets[:-1]].tolist(), offsets.tolist(), pa.Codec(CODEC)
    width = numbers[0].itemsize + numbers[1].itemsize
    skips = _packed_bits(histories.skipped, offsets) if any(with_skips) else []
    packed, packer = [], msgpack.Packer(autoreset=True)
    for row, (begin, end) in enumerate(pairwise(bounds)):
        columns = table[begin:end] if with_contexts[row] else table[begin:end, :width]
        squeezed = codec.compress(columns.T.tobytes(), asbytes=True)
        fields = [end - begin, firsts[row], with_contexts[row], squeezed, skips[row] if with_skips[row] else b""]
        packed.append(_sealed(PLAYS_MARK, packer.pack(fields)))
    return packed


def unpack_plays(pieces: Sequence[bytes]) -> Plays:
    """Return the plays of a log's pieces. Raises `DamagedArtifactError` for bytes that `pack_plays` did not make."""
    try:
        return Plays.joined([_plays(_open(PLAYS_MARK, piece, "log of plays")) for piece in pieces])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedArtifactError(f"a log of plays is damaged: {error!r}; {REMEDY}") from error


def pack_heard(songs: np.ndarray) -> bytes:
    """Return a set of songs, int32 ascending, as bytes."""
    return _seal(HEARD_MARK, [len(songs), _squeeze([np.diff(songs, prepend=0).astype("<u4")])])


def unpack_heard(data: bytes | None) -> np.ndarray:
    """int32, ascending: the songs that `pack_heard` packed; empty for None. Raises `DamagedArtifactError` otherwise."""
    if data is None:
        return np.zeros(0, np.int32)
    try:
        count, squeezed = _open(HEARD_MARK, data, "set of heard songs")
        return np.cumsum(_expand(squeezed, count, ["<u4"])[0]).astype(np.int32)
    except (TypeError, ValueError, OSError) as error:
        raise DamagedArtifactError(f"a set of heard songs is damaged: {error!r}; {REMEDY}") from error


def _model_state(
    shape: list[int], hidden: list[Any], before: list[Any], before_at: int | None, left: int, restarts: int, turn: int
) -> ModelState:
    after = _unpack_layers(hidden, shape)
    return ModelState(
        hidden=after,
        before=_unpack_layers(before, shape) if before else after,
        before_at=_time(before_at),
        left=left,
        restarts=restarts,
        turn=turn,
    )


def _pack_layers(hidden: np.ndarray) -> list[bytes]:
    """Return the bytes of each layer of a network state, without zeros at the end."""
    return [row.tobytes().rstrip(b"\0") for row in _fixed_point(hidden)]


def _fixed_point(layers: np.ndarray) -> np.ndarray:
    """Return layers, float32 (n, H), as uint8 (n, bytes): an int8 exponent per block, then three bytes per number.

    The three bytes are an integer x with the value x * 2 ** (exponent - NUMBER_BITS); the exponent is the smallest one
    for which all numbers of a block fit. Sums over all plays become large, but a new play is added to them as exactly
    as in single precision. Raises `DivergedError` if a number is not finite.
    """
    if not np.isfinite(layers).all():
        raise DivergedError("a network state is not finite; train the model again, with a lower learning rate")
    count, width = layers.shape
    num_blocks = -(-width // BLOCK)
    padded = np.zeros((count, num_blocks * BLOCK), np.float32)
    padded[:, :width] = layers
    blocks = padded.reshape(count, num_blocks, BLOCK)
    exponents = np.frexp(np.abs(blocks).max(axis=2))[1].clip(-128, 127)
    most = (1 << NUMBER_BITS) - 1
    numbers = np.clip(np.rint(np.ldexp(blocks, NUMBER_BITS - exponents[..., None])), -most, most)
    digits = numbers.astype("<i4").view(np.uint8).reshape(*padded.shape, 4)[:, :width, :NUMBER_BYTES]
    digits = digits.reshape(count, width * NUMBER_BYTES)
    return np.concatenate([exponents.astype(np.int8).view(np.uint8), digits], axis=1)


Part = tuple[np.ndarray, np.ndarray]  # a field of U users: bytes, uint8 (U, n), and how many are used, int (U,)


def _constant(users: int, data: bytes) -> Part:
    """Return a field with the same bytes for all users."""
    return _bytes(np.broadcast_to(np.frombuffer(data, np.uint8), (users, len(data))))


def _bytes(values: np.ndarray) -> Part:
    return values, np.full(len(values), values.shape[1])


def _layer_parts(hidden: np.ndarray) -> list[Part]:
    """Return one layer of the users' states, float32 (U, H), as the msgpack fields of `_pack_layers`."""
    data = _fixed_point(hidden)
    filled = data[:, ::-1] != 0
    sizes = np.where(filled.any(axis=1), data.shape[1] - filled.argmax(axis=1), 0)
    return [_headers(sizes), (data, sizes)]


def _headers(sizes: np.ndarray) -> Part:
    """Return the msgpack headers of byte strings of `sizes`, int (U,)."""
    return _coded(sizes, [(0xC4, 1, sizes < 1 << 8), (0xC5, 2, sizes < 1 << 16), (0xC6, 4, sizes < 1 << 32)])


def _numbers(values: np.ndarray, missing: np.ndarray | None = None) -> Part:
    """Return numbers, int64 (U,), in msgpack; nil where `missing`, bool (U,), is true."""
    data, sizes = _coded(
        values,
        [
            (None, 1, (values >= -32) & (values < 128)),
            *((0xCC + step, 1 << step, (values >= 0) & (values < 1 << (8 << step))) for step in range(3)),
            (0xCF, 8, values >= 0),
            *((0xD0 + step, 1 << step, values >= -(1 << ((8 << step) - 1))) for step in range(4)),
        ],
    )
    if missing is not None:
        data[missing, 0], sizes[missing] = 0xC0, 1
    return data, sizes


def _coded(values: np.ndarray, codes: list[tuple[int | None, int, np.ndarray]]) -> Part:
    """Return each number in the first of the `codes` that fits it.

    A code is the byte that is written first (None: no such byte), the count of the number's own bytes, and bool (U,),
    the numbers that it fits.
    """
    digits = values.astype(">i8").view(np.uint8).reshape(-1, 8)
    data, sizes = np.zeros((len(values), 9), np.uint8), np.zeros(len(values), np.int64)
    for code, count, fits in codes:
        rows = np.flatnonzero(fits & (sizes == 0))
        begin = 0 if code is None else 1
        data[rows, :begin] = code or 0
        data[rows, begin : begin + count] = digits[rows, 8 - count :]
        sizes[rows] = begin + count
    return data, sizes


def _rows(parts: Sequence[Part]) -> list[bytes]:
    """Return the joined parts of each user. Users whose parts have the same sizes are joined together."""
    sizes_UP = np.stack([sizes for _, sizes in parts], axis=1)
    kinds, first = np.zeros(len(sizes_UP), np.int64), np.zeros(1, np.int64)
    for column in np.flatnonzero((sizes_UP != sizes_UP[:1]).any(axis=0)):
        keys = kinds * (int(sizes_UP[:, column].max()) + 1) + sizes_UP[:, column]
        _, first, kinds = np.unique(keys, return_index=True, return_inverse=True)
    rows: list[bytes] = [b""] * len(sizes_UP)
    for kind, sizes in enumerate(sizes_UP[first[: len(rows)]].tolist()):
        users, total = np.flatnonzero(kinds == kind), sum(sizes)
        joined = np.concatenate([data[users, :size] for (data, _), size in zip(parts, sizes, strict=True)], axis=1)
        data = joined.tobytes()
        for place, user in enumerate(users.tolist()):
            rows[user] = data[place * total : (place + 1) * total]
    return rows


def _likes(likes: Plays) -> list[list[Any]]:
    """Return a list with the last field of a state, which exists only for users with likes."""
    return [_play_arrays(likes)] if len(likes) else []


def _any_of(values: np.ndarray | None, offsets: np.ndarray) -> list[bool]:
    """Return for each user whether any value is not zero."""
    if values is None:
        return [False] * (len(offsets) - 1)
    counts = np.concatenate([[0], np.cumsum(values != 0)])[offsets]
    some: list[bool] = (np.diff(counts) > 0).tolist()
    return some


def _packed_bits(values: np.ndarray | None, offsets: np.ndarray) -> list[bytes]:
    """Return the bits of each user, padded to whole bytes."""
    if values is None:
        return []
    lengths = np.diff(offsets)
    sizes = -(-lengths // 8)
    ends = np.cumsum(sizes)
    bits = np.zeros(8 * int(sizes.sum()), dtype=np.bool_)
    bits[np.arange(len(values)) + np.repeat(8 * (ends - sizes) - offsets[:-1], lengths)] = values
    data = np.packbits(bits).tobytes()
    return [data[begin:end] for begin, end in zip((ends - sizes).tolist(), ends.tolist(), strict=True)]


def _unpack_layers(layers: list[bytes], shape: list[int]) -> np.ndarray:
    count, width = shape
    num_blocks = -(-width // BLOCK)
    size = num_blocks + NUMBER_BYTES * width
    data = np.frombuffer(b"".join(layer.ljust(size, b"\0") for layer in layers), np.uint8).reshape(count, size)
    exponents = np.repeat(data[:, :num_blocks].view(np.int8), BLOCK, axis=1)[:, :width].astype(np.int32)
    digits = np.zeros((count, width, 4), np.uint8)  # the upper three bytes are set, so that the sign bit fits int32
    digits[..., 4 - NUMBER_BYTES :] = data[:, num_blocks:].reshape(count, width, NUMBER_BYTES)
    return np.asarray(np.ldexp(digits.view("<i4")[..., 0].astype(np.float32), exponents - 31))


def _play_arrays(plays: Plays) -> list[Any]:
    """Return number of plays, first time, whether there are contexts, arrays, and skips (empty if none is skipped)."""
    times = np.diff(plays.played_at, prepend=plays.played_at[:1])
    numbers = [plays.songs.astype("<i4"), times.astype("<i8")]
    contexts = bool(plays.contexts.any())
    numbers += [plays.contexts.astype("<i4")] if contexts else []
    skipped = np.packbits(plays.skipped).tobytes() if plays.skipped.any() else b""
    return [len(plays), int(plays.played_at[0]) if len(plays) else 0, contexts, _squeeze(numbers), skipped]


def _plays(arrays: list[Any]) -> Plays:
    count, first, contexts, squeezed, skipped = arrays
    songs, times, *rest = _expand(squeezed, count, ["<i4", "<i8", *(["<i4"] if contexts else [])])
    return Plays(
        songs=songs,
        played_at=first + np.cumsum(times),
        contexts=rest[0] if contexts else np.zeros(count, np.int32),
        skipped=np.unpackbits(np.frombuffer(skipped, np.uint8), count=count).astype(np.bool_)
        if skipped
        else np.zeros(count, np.bool_),
    )


def _squeeze(arrays: list[np.ndarray]) -> bytes:
    """Compress arrays by byte plane: the high bytes of small numbers are all equal, and take almost no space."""
    planes = b"".join(array.view(np.uint8).reshape(-1, array.itemsize).T.tobytes() for array in arrays)
    compressed: bytes = pa.compress(planes, codec=CODEC, asbytes=True)
    return compressed


def _expand(data: bytes, count: int, dtypes: list[str]) -> list[np.ndarray]:
    sizes = [np.dtype(dtype).itemsize for dtype in dtypes]
    planes = pa.decompress(data, decompressed_size=sum(sizes) * count, codec=CODEC, asbytes=True)
    arrays, begin = [], 0
    for dtype, size in zip(dtypes, sizes, strict=True):
        part = np.frombuffer(planes, np.uint8, size * count, begin).reshape(size, count)
        arrays.append(np.ascontiguousarray(part.T).reshape(-1).view(dtype))
        begin += size * count
    return arrays


def _moment(at: int) -> int | None:
    return None if at == NEVER else at


def _time(at: int | None) -> int:
    return NEVER if at is None else at


def _seal(mark: bytes, fields: list[Any]) -> bytes:
    return _sealed(mark, msgpack.packb(fields))


def _sealed(mark: bytes, body: bytes) -> bytes:
    return mark + zlib.crc32(body).to_bytes(4, "little") + body


def _open(mark: bytes, data: bytes, what: str) -> list[Any]:
    if data[:4] != mark:
        raise DamagedArtifactError(
            f"a {what} begins with {data[:4]!r}, expected {mark!r}; another version of rayrec wrote it, or it is "
            f"damaged: {REMEDY}"
        )
    body = data[8:]
    if zlib.crc32(body).to_bytes(4, "little") != data[4:8]:
        raise DamagedArtifactError(f"a {what} does not match its checksum; {REMEDY}")
    fields: list[Any] = msgpack.unpackb(body)
    return fields
