"""User states and logs of plays as bytes: a mark, a checksum, then msgpack with raw little-endian arrays.

Reading runs no code. Bytes of another version or with a changed bit are refused, never half understood.
"""

import zlib
from typing import Any

import msgpack
import numpy as np

from rayrec.data.windows import NEVER
from rayrec.errors import DamagedArtifactError
from rayrec.online.user_state import Plays, UserState

STATE_MARK, PLAYS_MARK = b"RrS1", b"RrP1"  # the digit is the format's version
DTYPES = {"songs": "<i4", "played_at": "<i8", "contexts": "<i4", "skipped": "|b1", "events": "<u8"}
ALWAYS = ("songs", "played_at")  # the other arrays are left out where they hold zeros alone


def pack_state(state: UserState) -> bytes:
    """A user's state as bytes."""
    fields: dict[str, Any] = {
        "model": state.model,
        "shape": list(state.hidden.shape),
        "hidden": state.hidden.astype("<f4").tobytes(),
        "before_at": None if state.before_at == NEVER else state.before_at,
        "left": state.left,
        "rejected": state.rejected,
    }
    if len(state.window):
        fields |= {"before": state.before.astype("<f4").tobytes(), "window": _fields(state.window)}
    return _sealed(STATE_MARK, fields)


def unpack_state(data: bytes) -> UserState:
    """What `pack_state` packed. Raises `DamagedArtifactError` for anything else."""
    fields = _opened(STATE_MARK, data, "user state")
    try:
        shape = tuple(fields["shape"])
        hidden = np.frombuffer(fields["hidden"], "<f4").reshape(shape)
        return UserState(
            model=fields["model"],
            hidden=hidden,
            before=np.frombuffer(fields["before"], "<f4").reshape(shape) if "before" in fields else hidden,
            before_at=NEVER if fields["before_at"] is None else fields["before_at"],
            left=fields["left"],
            window=_plays(fields["window"]) if "window" in fields else Plays.of([], []),
            rejected=fields["rejected"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedArtifactError(f"a user state is not as it was written: {error!r}; {_REMEDY}") from error


def pack_plays(plays: Plays) -> bytes:
    """A piece of a user's log as bytes."""
    return _sealed(PLAYS_MARK, _fields(plays))


def unpack_plays(pieces: list[bytes]) -> Plays:
    """The plays of a log's pieces. Raises `DamagedArtifactError` for what `pack_plays` did not pack."""
    try:
        return Plays.joined([_plays(_opened(PLAYS_MARK, piece, "log of plays")) for piece in pieces])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedArtifactError(f"a log of plays is not as it was written: {error!r}; {_REMEDY}") from error


_REMEDY = "bring the store back from a copy, or load the states again with `rayrec states load`"


def _fields(plays: Plays) -> dict[str, bytes]:
    arrays = {name: getattr(plays, name) for name in DTYPES}
    return {
        name: array.astype(DTYPES[name]).tobytes() for name, array in arrays.items() if name in ALWAYS or array.any()
    }


def _plays(fields: dict[str, bytes]) -> Plays:
    count = len(fields["songs"]) // 4
    return Plays(
        **{
            name: np.frombuffer(fields[name], dtype) if name in fields or name in ALWAYS else np.zeros(count, dtype)
            for name, dtype in DTYPES.items()
        }
    )


def _sealed(mark: bytes, fields: dict[str, Any]) -> bytes:
    body: bytes = msgpack.packb(fields)
    return mark + zlib.crc32(body).to_bytes(4, "little") + body


def _opened(mark: bytes, data: bytes, what: str) -> dict[str, Any]:
    if data[:4] != mark:
        raise DamagedArtifactError(
            f"a {what} begins with {data[:4]!r}, expected {mark!r}; another version of rayrec wrote it, or it is "
            f"damaged: {_REMEDY}"
        )
    body = data[8:]
    if zlib.crc32(body).to_bytes(4, "little") != data[4:8]:
        raise DamagedArtifactError(f"a {what} does not match its checksum; {_REMEDY}")
    fields: dict[str, Any] = msgpack.unpackb(body)
    return fields
