"""Where a network stands with users, apart from the network: what stores states needs no torch."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class States:
    """Where the network stands after each user's last play, U users."""

    # float32 (U, state layers, H): the outputs of the layers, the cells of an LSTM, the sums of the averages
    hidden: np.ndarray
    last_played_at: np.ndarray  # int64 (U,), ms UTC; NEVER for a user without plays
