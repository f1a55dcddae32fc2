"""User states, logs of plays and sets of heard songs as bytes: a mark, a checksum, then msgpack with raw arrays.

Reading runs no code. Bytes of another version or with a changed bit are refused. Network states are stored in half
precision where that is enough; arrays of plays are stored as differences, byte plane by byte plane, and compressed.
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
from rayrec.errors import DamagedArtifactError
from rayrec.model.inference import States
from rayrec.online.user_state import ModelState, Plays, UserState

STATE_MARK, PLAYS_MARK, HEARD_MARK = b"RrS2", b"RrP2", b"RrH1"  # the digit is the format's version
HALF, SINGLE = "<f2", "<f4"
CODEC = "lz4_raw"  # as small as zlib on such short arrays, in a seventh of its time
REMEDY = "restore the store from a backup, or load the states again with `rayrec states load --force`"


def pack_state(state: UserState) -> bytes:
    """A user's state as bytes."""
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
    """What `pack_state` makes of `UserState.start` for each user: `plays`, int (U,), are in their logs, and their likes
    are `likes`, where there are any."""
    layers = _pack_all_layers(states.hidden)
    shape = list(states.hidden.shape[1:])
    packed = []
    for row, (hidden, at, left) in enumerate(zip(layers, states.last_played_at.tolist(), plays.tolist(), strict=True)):
        folded = [model, shape, hidden, [], _moment(at), left, 0, 0]
        liked = [] if likes is None else _likes(likes[row])
        packed.append(_seal(STATE_MARK, [_moment(at), None, [left, 0, 0, 0, 0], [], [folded], *liked]))
    return packed


def unpack_state(data: bytes) -> UserState:
    """What `pack_state` packed. Raises `DamagedArtifactError` for anything else."""
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
        raise DamagedArtifactError(f"a user state is not as it was written: {error!r}; {REMEDY}") from error


def pack_plays(plays: Plays) -> bytes:
    """A piece of a user's log as bytes."""
    return _seal(PLAYS_MARK, _play_arrays(plays))


def pack_histories(histories: Histories) -> list[bytes]:
    """What `pack_plays` makes of the plays of each user; everybody has some."""
    offsets = histories.offsets
    steps = np.diff(histories.played_at, prepend=np.int64(0))
    steps[offsets[:-1]] = 0
    numbers = [histories.songs.astype("<i4"), steps.astype("<i8")]
    numbers += [] if histories.contexts is None else [histories.contexts.astype("<i4")]
    # Number by number, as many bytes each; turned around they are the planes of one user.
    table = np.concatenate([array.view(np.uint8).reshape(-1, array.itemsize) for array in numbers], axis=1)
    with_contexts, with_skips = (_any_of(values, offsets) for values in (histories.contexts, histories.skipped))
    firsts, bounds, codec = histories.played_at[offsets[:-1]].tolist(), offsets.tolist(), pa.Codec(CODEC)
    width = numbers[0].itemsize + numbers[1].itemsize
    packed = []
    for row, (begin, end) in enumerate(pairwise(bounds)):
        columns = table[begin:end] if with_contexts[row] else table[begin:end, :width]
        squeezed = codec.compress(columns.T.tobytes(), asbytes=True)
        skipped = b""
        if with_skips[row] and histories.skipped is not None:
            skipped = np.packbits(histories.skipped[begin:end]).tobytes()
        packed.append(_seal(PLAYS_MARK, [end - begin, firsts[row], with_contexts[row], squeezed, skipped]))
    return packed


def unpack_plays(pieces: Sequence[bytes]) -> Plays:
    """The plays of a log's pieces. Raises `DamagedArtifactError` for what `pack_plays` did not pack."""
    try:
        return Plays.joined([_plays(_open(PLAYS_MARK, piece, "log of plays")) for piece in pieces])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DamagedArtifactError(f"a log of plays is not as it was written: {error!r}; {REMEDY}") from error


def pack_heard(songs: np.ndarray) -> bytes:
    """A set of songs, int32 ascending, as bytes."""
    return _seal(HEARD_MARK, [len(songs), _squeeze([np.diff(songs, prepend=0).astype("<u4")])])


def unpack_heard(data: bytes | None) -> np.ndarray:
    """int32, ascending: what `pack_heard` packed; empty for None. Raises `DamagedArtifactError` for anything else."""
    if data is None:
        return np.zeros(0, np.int32)
    try:
        count, squeezed = _open(HEARD_MARK, data, "set of heard songs")
        return np.cumsum(_expand(squeezed, count, ["<u4"])[0]).astype(np.int32)
    except (TypeError, ValueError, OSError) as error:
        raise DamagedArtifactError(f"a set of heard songs is not as it was written: {error!r}; {REMEDY}") from error


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


def _pack_layers(hidden: np.ndarray) -> list[Any]:
    """Type and bytes of each layer of a network state, without the zeros at its end."""
    return _pack_all_layers(hidden[None])[0]


def _pack_all_layers(hidden: np.ndarray) -> list[list[Any]]:
    """Type and bytes of each layer of the states of users, float32 (U, L, H), without the zeros at its end.

    Outputs of a recurrent layer lie within -1 and 1 and lose nothing that matters in half precision. Sums over all
    plays grow, and half precision would swallow what one more play adds.
    """
    users, layers, width = hidden.shape
    wide = (np.abs(hidden).max(axis=2, initial=0.0) > 1).tolist()
    halves = np.where(np.abs(hidden) > 1, 0, hidden).astype(HALF).tobytes()
    singles = hidden.astype(SINGLE).tobytes()
    packed = []
    for user in range(users):
        own = []
        for layer in range(layers):
            dtype, size, data = (SINGLE, 4, singles) if wide[user][layer] else (HALF, 2, halves)
            begin = (user * layers + layer) * width * size
            own.append([dtype, data[begin : begin + width * size].rstrip(b"\0")])
        packed.append(own)
    return packed


def _likes(likes: Plays) -> list[list[Any]]:
    """The last field of a state, which only those of users with likes have."""
    return [_play_arrays(likes)] if len(likes) else []


def _any_of(values: np.ndarray | None, offsets: np.ndarray) -> list[bool]:
    """Whether any value of each user is not zero."""
    if values is None:
        return [False] * (len(offsets) - 1)
    counts = np.concatenate([[0], np.cumsum(values != 0)])[offsets]
    some: list[bool] = (np.diff(counts) > 0).tolist()
    return some


def _unpack_layers(layers: list[Any], shape: list[int]) -> np.ndarray:
    hidden: np.ndarray = np.zeros(shape, np.float32)
    for row, (dtype, data) in enumerate(layers):
        size = {HALF: 2, SINGLE: 4}[dtype] * shape[1]
        hidden[row] = np.frombuffer(data.ljust(size, b"\0"), dtype)
    return hidden


def _play_arrays(plays: Plays) -> list[Any]:
    """Number, first time, whether there are contexts, then the arrays; skips are left out where there are none."""
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
    """Byte plane by byte plane: the high bytes of small numbers are all alike, and take no room compressed."""
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
    body: bytes = msgpack.packb(fields)
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
