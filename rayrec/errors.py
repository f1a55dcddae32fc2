"""The errors that rayrec raises.

Every message says what was given, what was expected and what to do. The command line prints the message as one line
and exits with `exit_code`. Any other exception is a bug of rayrec.
"""

import tempfile


class RayrecError(Exception):
    """A command failed. Exit code 1."""

    exit_code = 1


class InputError(RayrecError):
    """Bad input or wrong use: a path, format, column, id or value. Exit code 2."""

    exit_code = 2


class FieldError(InputError):
    """The value of one field cannot be used, such as an unknown artist or a day that does not exist.

    `where` is the field's name in flags and requests.
    """

    def __init__(self, where: str, detail: str) -> None:
        super().__init__(where, detail)
        self.where, self.detail = where, detail

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}"


class NotFoundError(InputError):
    """Something that was named, such as an artifact, user or song, does not exist."""


class TooFewQueriesError(InputError):
    """The validation range holds too few queries to learn a ranker from."""


class DamagedInputError(InputError):
    """A file to import cannot be read to its end, or has another format than its name says."""


class MismatchError(InputError):
    """Artifacts do not belong together, such as a model and an index of another model."""


class MissingDependencyError(InputError):
    """An optional package is not installed; the message names it."""


class LeakError(RayrecError):
    """Training data contains plays that it must not contain: of the test range, or of a held-out user."""


class DivergedError(RayrecError):
    """The loss or the weights of a training are no longer finite."""


class StorageError(RayrecError):
    """A disk is full, or object storage keeps failing."""


class BusyError(RayrecError):
    """Another command writes to the workspace."""


class DamagedArtifactError(RayrecError):
    """A stored file does not match the checksum in its manifest, or has an unknown format version, or is cut off."""


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, up to 200 characters; its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def token_rejected(address: str) -> InputError:
    """Return the error to raise if the Ray cluster at `address` rejects the token, or if there is none."""
    return InputError(
        f"the cluster at {address} rejects the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's "
        "token, or RAY_AUTH_TOKEN_PATH to its file"
    )


def ray_not_started(error: Exception, summary: str = "Ray could not be started on this machine") -> RayrecError:
    """Return the error to raise after an error of `ray.init`, which raises many types of exceptions."""
    text = first_line(error).rstrip(".")
    if "AF_UNIX" in text:
        return InputError(
            f"the path of the folder for temporary files, {tempfile.gettempdir()}, is too long for Ray's sockets; "
            "set RAY_TMPDIR=/tmp"
        )
    return RayrecError(f"{summary}: {text}; check Ray's logs in /tmp/ray, and the free memory and CPUs")
