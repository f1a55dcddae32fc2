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
    for model, model_state in state.models.items():
        shape = list(model_state.hidden.shape)
        start_layers = [] if model_state.start_hidden is model_state.hidden else _pack_layers(model_state.start_hidden)
        counters = [_time_or_none(model_state.before_at), model_state.log_plays, model_state.restarts, model_state.turn]
        models.append([model, shape, _pack_layers(model_state.hidden), start_layers, *counters])
    counts = [state.log_plays, state.folded, state.rejected, state.turn, state.restarts]
    window = _play_arrays(state.window) if len(state.window) else []
    fields = [_time_or_none(state.before_at), _time_or_none(state.forgotten_at), counts, window, models]
    return _seal(STATE_MARK, [*fields, *_like_fields(state.likes)])


def pack_new_states(model: str, states: States, plays: np.ndarray, likes: Sequence[Plays] | None = None) -> list[bytes]:
    """Return for each of U users the result of `pack_state` for `UserState.start` with `plays`, int (U,), and `likes`.

    All users are packed together, which avoids Python objects for the fields of each user.
    """
    users, layers, _ = states.hidden.shape
    has_likes = [] if likes is None else [bool(len(user_likes)) for user_likes in likes]
    time_part, count_part = _number_part(states.last_played_at, states.last_played_at == NEVER), _number_part(plays)
    empty_list, zeros = msgpack.packb([]), bytes(4)
    parts = [
        _constant_part(users, b"\x95")
        if not any(has_likes)
        else _bytes_part(np.where(has_likes, 0x96, 0x95).astype(np.uint8)[:, None]),
        time_part,
        _constant_part(users, msgpack.packb(None) + b"\x95"),
        count_part,
        _constant_part(users, zeros + empty_list + b"\x91\x98" + msgpack.packb(model)),
        _constant_part(users, msgpack.packb(list(states.hidden.shape[1:])) + msgpack.packb([None] * layers)[:-layers]),
        *(part for layer in range(layers) for part in _layer_parts(states.hidden[:, layer])),
        _constant_part(users, empty_list),
        time_part,
        count_part,
        _constant_part(users, zeros[:2]),
    ]
    bodies = _concatenate_parts(parts)
    if likes is not None:
        bodies = [
            body + msgpack.packb(_play_arrays(user_likes)) if len(user_likes) else body
            for body, user_likes in zip(bodies, likes, strict=True)
        ]
    return [_add_checksum(STATE_MARK, body) for body in bodies]


def unpack_state(data: bytes) -> UserState:
    """Return the state that `pack_state` packed. Raises `DamagedArtifactError` for other bytes."""
    fields = _unseal(STATE_MARK, data, "user state")
    try:
        before_at, forgotten_at, (log_plays, folded, rejected, turn, restarts), window, models, *likes = fields
        return UserState(
            window=_unpack_play_arrays(window) if window else Plays.of([], []),
            before_at=_time_or_never(before_at),
            log_plays=log_plays,
            folded=folded,
            rejected=rejected,
            turn=turn,
            restarts=restarts,
            forgotten_at=_time_or_never(forgotten_at),
            models={name: _model_state(*model_fields) for name, *model_fields in models},
            likes=_unpack_play_arrays(likes[0]) if likes else Plays.of([], []),
        )
    except (IndexError, KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedArtifactError(f"a user state is damaged: {error!r}; {REMEDY}") from error


def pack_plays(plays: Plays) -> bytes:
    """Return a piece of a user's log as bytes."""
    return _seal(PLAYS_MARK, _play_arrays(plays))


def pack_histories(histories: Histories) -> list[bytes]:
    """Return the result of `pack_plays` for each user; every user must have plays."""
    offsets = histories.offsets
    time_steps = np.diff(histories.played_at, prepend=np.int64(0))
    time_steps[offsets[:-1]] = 0
    arrays = [histories.songs.astype("<i4"), time_steps.astype("<i8")]
    arrays += [] if histories.contexts is None else [histories.contexts.astype("<i4")]
    # One row with the bytes of all numbers per play. Transposed, a user's rows are the byte planes.
    table = np.concatenate([array.view(np.uint8).reshape(-1, array.itemsize) for array in arrays], axis=1)
    has_contexts, has_skips = (_has_nonzero(values, offsets) for values in (histories.contexts, histories.skipped))
    first_times, bounds, codec = histories.played_at[offsets[:-1]].tolist(), offsets.tolist(), pa.Codec(CODEC)
    width = arrays[0].itemsize + arrays[1].itemsize
    skips = _pack_bits(histories.skipped, offsets) if any(has_skips) else []
    packed, packer = [], msgpack.Packer(autoreset=True)
    for row, (start, end) in enumerate(pairwise(bounds)):
        columns = table[start:end] if has_contexts[row] else table[start:end, :width]
        compressed = codec.compress(columns.T.tobytes(), asbytes=True)
        fields = [end - start, first_times[row], has_contexts[row], compressed, skips[row] if has_skips[row] else b""]
        packed.append(_add_checksum(PLAYS_MARK, packer.pack(fields)))
    return packed


def unpack_plays(pieces: Sequence[bytes]) -> Plays:
    """Return the plays of a log's pieces. Raises `DamagedArtifactError` for bytes that `pack_plays` did not make."""
    try:
        return Plays.concatenate([_unpack_play_arrays(_unseal(PLAYS_MARK, piece, "log of plays")) for piece in pieces])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedArtifactError(f"a log of plays is damaged: {error!r}; {REMEDY}") from error


def pack_heard(songs: np.ndarray) -> bytes:
    """Return a set of songs, int32 ascending, as bytes."""
    return _seal(HEARD_MARK, [len(songs), _compress([np.diff(songs, prepend=0).astype("<u4")])])


def unpack_heard(data: bytes | None) -> np.ndarray:
    """int32, ascending: the songs that `pack_heard` packed; empty for None. Raises `DamagedArtifactError` otherwise."""
    if data is None:
        return np.zeros(0, np.int32)
    try:
        count, compressed = _unseal(HEARD_MARK, data, "set of heard songs")
        return np.cumsum(_decompress(compressed, count, ["<u4"])[0]).astype(np.int32)
    except (TypeError, ValueError, OSError) as error:
        raise DamagedArtifactError(f"a set of heard songs is damaged: {error!r}; {REMEDY}") from error


def _model_state(
    shape: list[int],
    packed_hidden: list[Any],
    packed_before: list[Any],
    before_at: int | None,
    log_plays: int,
    restarts: int,
    turn: int,
) -> ModelState:
    hidden_layers = _unpack_layers(packed_hidden, shape)
    return ModelState(
        hidden=hidden_layers,
        start_hidden=_unpack_layers(packed_before, shape) if packed_before else hidden_layers,
        before_at=_time_or_never(before_at),
        log_plays=log_plays,
        restarts=restarts,
        turn=turn,
    )


def _pack_layers(hidden: np.ndarray) -> list[bytes]:
    """Return the bytes of each layer of a network state, without zeros at the end."""
    return [row.tobytes().rstrip(b"\0") for row in _to_fixed_point(hidden)]


def _to_fixed_point(layers: np.ndarray) -> np.ndarray:
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
    max_number = (1 << NUMBER_BITS) - 1
    numbers = np.clip(np.rint(np.ldexp(blocks, NUMBER_BITS - exponents[..., None])), -max_number, max_number)
    digits = numbers.astype("<i4").view(np.uint8).reshape(*padded.shape, 4)[:, :width, :NUMBER_BYTES]
    digits = digits.reshape(count, width * NUMBER_BYTES)
    return np.concatenate([exponents.astype(np.int8).view(np.uint8), digits], axis=1)


Part = tuple[np.ndarray, np.ndarray]  # a field of U users: bytes, uint8 (U, n), and how many are used, int (U,)


def _constant_part(users: int, data: bytes) -> Part:
    """Return a field with the same bytes for all users."""
    return _bytes_part(np.broadcast_to(np.frombuffer(data, np.uint8), (users, len(data))))


def _bytes_part(values: np.ndarray) -> Part:
    return values, np.full(len(values), values.shape[1])


def _layer_parts(hidden: np.ndarray) -> list[Part]:
    """Return one layer of the users' states, float32 (U, H), as the msgpack fields of `_pack_layers`."""
    data = _to_fixed_point(hidden)
    is_nonzero = data[:, ::-1] != 0
    sizes = np.where(is_nonzero.any(axis=1), data.shape[1] - is_nonzero.argmax(axis=1), 0)
    return [_header_part(sizes), (data, sizes)]


def _header_part(sizes: np.ndarray) -> Part:
    """Return the msgpack headers of byte strings of `sizes`, int (U,)."""
    return _encode_numbers(sizes, [(0xC4, 1, sizes < 1 << 8), (0xC5, 2, sizes < 1 << 16), (0xC6, 4, sizes < 1 << 32)])


def _number_part(values: np.ndarray, missing: np.ndarray | None = None) -> Part:
    """Return numbers, int64 (U,), in msgpack; nil where `missing`, bool (U,), is true."""
    data, sizes = _encode_numbers(
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


def _encode_numbers(values: np.ndarray, codes: list[tuple[int | None, int, np.ndarray]]) -> Part:
    """Return each number in the first of the `codes` that fits it.

    A code is the byte that is written first (None: no such byte), the count of the number's own bytes, and bool (U,),
    the numbers that it fits.
    """
    digits = values.astype(">i8").view(np.uint8).reshape(-1, 8)
    data, sizes = np.zeros((len(values), 9), np.uint8), np.zeros(len(values), np.int64)
    for code, count, is_fitting in codes:
        rows = np.flatnonzero(is_fitting & (sizes == 0))
        prefix_size = 0 if code is None else 1
        data[rows, :prefix_size] = code or 0
        data[rows, prefix_size : prefix_size + count] = digits[rows, 8 - count :]
        sizes[rows] = prefix_size + count
    return data, sizes


def _concatenate_parts(parts: Sequence[Part]) -> list[bytes]:
    """Return the joined parts of each user. Users whose parts have the same sizes are joined together."""
    sizes_UP = np.stack([sizes for _, sizes in parts], axis=1)
    kinds, first_users = np.zeros(len(sizes_UP), np.int64), np.zeros(1, np.int64)
    for column in np.flatnonzero((sizes_UP != sizes_UP[:1]).any(axis=0)):
        keys = kinds * (int(sizes_UP[:, column].max()) + 1) + sizes_UP[:, column]
        _, first_users, kinds = np.unique(keys, return_index=True, return_inverse=True)
    rows: list[bytes] = [b""] * len(sizes_UP)
    for kind, sizes in enumerate(sizes_UP[first_users[: len(rows)]].tolist()):
        users, total = np.flatnonzero(kinds == kind), sum(sizes)
        user_bytes = np.concatenate([data[users, :size] for (data, _), size in zip(parts, sizes, strict=True)], axis=1)
        data = user_bytes.tobytes()
        for index, user in enumerate(users.tolist()):
            rows[user] = data[index * total : (index + 1) * total]
    return rows


def _like_fields(likes: Plays) -> list[list[Any]]:
    """Return a list with the last field of a state, which exists only for users with likes."""
    return [_play_arrays(likes)] if len(likes) else []


def _has_nonzero(values: np.ndarray | None, offsets: np.ndarray) -> list[bool]:
    """Return for each user whether any value is not zero."""
    if values is None:
        return [False] * (len(offsets) - 1)
    counts = np.concatenate([[0], np.cumsum(values != 0)])[offsets]
    has_nonzero: list[bool] = (np.diff(counts) > 0).tolist()
    return has_nonzero


def _pack_bits(values: np.ndarray | None, offsets: np.ndarray) -> list[bytes]:
    """Return the bits of each user, padded to whole bytes."""
    if values is None:
        return []
    lengths = np.diff(offsets)
    sizes = -(-lengths // 8)
    ends = np.cumsum(sizes)
    bits = np.zeros(8 * int(sizes.sum()), dtype=np.bool_)
    bits[np.arange(len(values)) + np.repeat(8 * (ends - sizes) - offsets[:-1], lengths)] = values
    data = np.packbits(bits).tobytes()
    return [data[start:end] for start, end in zip((ends - sizes).tolist(), ends.tolist(), strict=True)]


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
    time_steps = np.diff(plays.played_at, prepend=plays.played_at[:1])
    arrays = [plays.songs.astype("<i4"), time_steps.astype("<i8")]
    has_contexts = bool(plays.contexts.any())
    arrays += [plays.contexts.astype("<i4")] if has_contexts else []
    skipped = np.packbits(plays.skipped).tobytes() if plays.skipped.any() else b""
    return [len(plays), int(plays.played_at[0]) if len(plays) else 0, has_contexts, _compress(arrays), skipped]


def _unpack_play_arrays(arrays: list[Any]) -> Plays:
    count, first_time, has_contexts, compressed, skipped = arrays
    songs, time_steps, *context_arrays = _decompress(
        compressed, count, ["<i4", "<i8", *(["<i4"] if has_contexts else [])]
    )
    return Plays(
        songs=songs,
        played_at=first_time + np.cumsum(time_steps),
        contexts=context_arrays[0] if has_contexts else np.zeros(count, np.int32),
        skipped=np.unpackbits(np.frombuffer(skipped, np.uint8), count=count).astype(np.bool_)
        if skipped
        else np.zeros(count, np.bool_),
    )


def _compress(arrays: list[np.ndarray]) -> bytes:
    """Compress arrays by byte plane: the high bytes of small numbers are all equal, and take almost no space."""
    planes = b"".join(array.view(np.uint8).reshape(-1, array.itemsize).T.tobytes() for array in arrays)
    compressed: bytes = pa.compress(planes, codec=CODEC, asbytes=True)
    return compressed


def _decompress(data: bytes, count: int, dtypes: list[str]) -> list[np.ndarray]:
    sizes = [np.dtype(dtype).itemsize for dtype in dtypes]
    planes = pa.decompress(data, decompressed_size=sum(sizes) * count, codec=CODEC, asbytes=True)
    arrays, start = [], 0
    for dtype, size in zip(dtypes, sizes, strict=True):
        part = np.frombuffer(planes, np.uint8, size * count, start).reshape(size, count)
        arrays.append(np.ascontiguousarray(part.T).reshape(-1).view(dtype))
        start += size * count
    return arrays


def _time_or_none(at: int) -> int | None:
    return None if at == NEVER else at


def _time_or_never(at: int | None) -> int:
    return NEVER if at is None else at


def _seal(mark: bytes, fields: list[Any]) -> bytes:
    return _add_checksum(mark, msgpack.packb(fields))


def _add_checksum(mark: bytes, body: bytes) -> bytes:
    return mark + zlib.crc32(body).to_bytes(4, "little") + body


def _unseal(mark: bytes, data: bytes, description: str) -> list[Any]:
    if data[:4] != mark:
        raise DamagedArtifactError(
            f"a {description} begins with {data[:4]!r}, expected {mark!r}; another version of rayrec wrote it, or it "
            f"is damaged: {REMEDY}"
        )
    body = data[8:]
    if zlib.crc32(body).to_bytes(4, "little") != data[4:8]:
        raise DamagedArtifactError(f"a {description} does not match its checksum; {REMEDY}")
    fields: list[Any] = msgpack.unpackb(body)
    return fields
