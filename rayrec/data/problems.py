"""What is wrong with each of some rows."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class Problems:
    """Marks what is wrong with each of R rows; the first reason of a row stays."""

    def __init__(self, rows: int) -> None:
        self._codes = np.zeros(rows, dtype=np.int16)
        self._reasons: list[str] = []

    @property
    def bad(self) -> np.ndarray:
        """bool (R,): rows with a reason against them."""
        return self._codes > 0

    def mark(self, mask: np.ndarray, reason: str) -> None:
        """Give the rows where `mask`, bool (R,), is true a reason to be rejected."""
        new = mask & ~self.bad
        if new.any():
            self._reasons.append(reason)
            self._codes[new] = len(self._reasons)

    def reasons(self) -> list[str]:
        """The reasons of the bad rows, in order."""
        return [self._reasons[code - 1] for code in self._codes[self.bad]]


def missing(values: pa.Array) -> np.ndarray:
    """bool (R,): null or empty strings."""
    return np.asarray(pc.fill_null(pc.equal(values, ""), True).to_numpy(zero_copy_only=False))
