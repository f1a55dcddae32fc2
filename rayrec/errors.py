"""The errors that rayrec raises.

Every message says what was given, what was expected and what to do. The command line prints the
message as one line and exits with `exit_code`; anything that is not a `RayrecError` is our bug.
"""

import tempfile


class RayrecError(Exception):
    """A command failed. Exit code 1."""

    exit_code = 1


class InputError(RayrecError):
    """Bad input or wrong use: a path, format, column, id or value. Exit code 2."""

    exit_code = 2


class FieldError(InputError):
    """A field whose value fits no song, day or page; `where` is its name, as flags and requests spell it."""

    def __init__(self, where: str, detail: str) -> None:
        super().__init__(where, detail)
        self.where, self.detail = where, detail

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}"


class NotFoundError(InputError):
    """Something named is not in the workspace."""


class TooFewQueriesError(InputError):
    """The validation range holds too few queries to learn a ranker from."""


class DamagedInputError(InputError):
    """A file to import that cannot be read to its end, or is of another format than its name says."""


class MismatchError(InputError):
    """Artifacts that do not belong together, such as a model and an index of another model."""


class MissingDependencyError(InputError):
    """An optional package is not installed; the message names it."""


class LeakError(RayrecError):
    """Training data holds plays that it must not: of the test range, or of a held-out user."""


class DivergedError(RayrecError):
    """A training whose loss or weights are not finite any more."""


class StorageError(RayrecError):
    """A disk is full, or object storage keeps failing."""


class BusyError(RayrecError):
    """Another command writes to the workspace."""


class DamagedArtifactError(RayrecError):
    """A stored file does not match the checksum in its manifest, or has an unknown format version, or is cut off."""


def first_line(error: BaseException) -> str:
    """The first line of what another library raised, at most 200 characters; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def ray_not_started(error: Exception, where: str = "Ray could not be started on this machine") -> RayrecError:
    """What to raise where `ray.init` raised a bare error, as it does of many types."""
    text = first_line(error).rstrip(".")
    if "AF_UNIX" in text:
        return InputError(
            f"the folder for temporary files, {tempfile.gettempdir()}, has too long a path for Ray's sockets; "
            "set RAY_TMPDIR=/tmp"
        )
    return RayrecError(f"{where}: {text}; check its logs below /tmp/ray, and the memory and CPUs that are free")
