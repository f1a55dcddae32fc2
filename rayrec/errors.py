"""The errors that users of rayrec can meet.

Every message says what came, what was expected and what to do. The command line prints the
message as one line and exits with `exit_code`; anything that is not a `RayrecError` is our bug.
"""


class RayrecError(Exception):
    """A job could not be done. Exit code 1."""

    exit_code = 1


class InputError(RayrecError):
    """Bad input or wrong use: a path, format, column, id or value. Exit code 2."""

    exit_code = 2


class NotFoundError(InputError):
    """Something asked for by name is not in the workspace."""


class DamagedInputError(InputError):
    """A file to import that cannot be read to its end, or is of another format than its name says."""


class MismatchError(InputError):
    """Parts that do not belong together, such as a model and an index of another model."""


class MissingDependencyError(InputError):
    """An optional package is not installed; the message says which one to install."""


class LeakError(RayrecError):
    """A fit was handed plays that it must not see: past the cut, or of a held-out user."""


class StorageError(RayrecError):
    """A disk is full, or object storage goes on failing."""


class BusyError(RayrecError):
    """Another run writes to the workspace."""


class DamagedArtifactError(RayrecError):
    """A stored file does not match the checksum in its manifest, or has an unknown format version."""
