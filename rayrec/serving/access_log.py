"""The access log: a JSON object a line for each request."""

import json
import logging
import logging.handlers
import sys
from typing import Any

from rayrec.data.moments import iso_moment, now_ms
from rayrec.errors import InputError


class AccessLog:
    """Writes a line for each request. It names routes, not paths: those hold ids of users."""

    def __init__(self, target: str) -> None:
        """To a file, which may be moved away at any time, or with `-` to standard error.

        Raises `InputError` for a file that cannot be written.
        """
        try:
            handler: logging.Handler = (
                logging.StreamHandler(sys.stderr) if target == "-" else logging.handlers.WatchedFileHandler(target)
            )
        except OSError as error:
            raise InputError(f"access log {target} cannot be written: {error.strerror}; name another file") from error
        self._log = logging.Logger("rayrec.access", logging.INFO)
        self._log.addHandler(handler)

    def write(self, **fields: Any) -> None:
        """Write a line; fields that are None are left out. A line that cannot be written is lost."""
        known = {name: value for name, value in fields.items() if value is not None}
        self._log.info("%s", json.dumps({"at": iso_moment(now_ms()), **known}))

    def close(self) -> None:
        """Close the file."""
        for handler in self._log.handlers:
            handler.close()
