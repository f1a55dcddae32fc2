"""Plays with a known answer: the songs form a ring, and each song is mostly followed by the next one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

BEGIN = 1_700_000_000  # Unix seconds
DAY = 24 * 3600
SESSION, PAUSE = 10, 240  # plays per session, and seconds between plays
HEAD = "user_id,track,timestamp,title,artist\n"


def ring_plays(
    users: Sequence[int],
    *,
    songs: int = 60,
    plays: int = 40,
    follow: float = 0.9,
    begin: float = 0.0,
    days: float = 20.0,
    seed: int = 0,
) -> list[str]:
    """Return CSV rows under HEAD: each user plays through the ring for about `days` days from day `begin` on."""
    random = np.random.default_rng([seed, users[0], int(begin)])
    rows = []
    for user in users:
        song = int(random.integers(songs))
        starts = np.sort(random.uniform(begin * DAY, (begin + days) * DAY - SESSION * PAUSE, size=-(-plays // SESSION)))
        moments = np.sort((starts[:, None] + PAUSE * np.arange(SESSION)).ravel()[:plays]).astype(int)
        for moment in moments.tolist():
            song = (song + 1) % songs if random.random() < follow else int(random.integers(songs))
            rows.append(f"u{user},s{song},{BEGIN + moment},Song {song},Artist {song % 7}\n")
    return rows


def write_rows(path: Path, rows: list[str]) -> str:
    """Write the rows to a CSV file; return its path."""
    path.write_text(HEAD + "".join(rows))
    return str(path)
