"""What a play costs after many plays, against what it costs after few: it must be the same."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from rayrec.bench.rounds import BenchResult, Measured, compare
from rayrec.serving.serve_config import MAX_PLAYS

FEW, MANY = 10, 10_000  # plays of the users that are compared
LONG_USERS = 8  # that take turns
GAP_MS = 200_000  # between two plays of a user

Post = Callable[[dict[str, Any]], None]  # sends one body to /v1/plays; raises where it is not taken


class _Listeners:
    """Users whose plays are in the store, all of the same number of plays but for the last few."""

    def __init__(self, post: Post, songs: Sequence[str], name: str, users: int, plays: int, begin: int) -> None:
        self._songs = songs
        self._names = [f"{name}-{number}" for number in range(users)]
        self._begin = begin
        self._taken = dict.fromkeys(self._names, 0)
        waiting: list[dict[str, Any]] = []
        for user in self._names:
            for _ in range(plays):
                waiting.append(self._next(user))
                if len(waiting) == MAX_PLAYS:
                    post({"plays": waiting})
                    waiting = []
        if waiting:
            post({"plays": waiting})

    def turns(self) -> Iterator[dict[str, Any]]:
        """One play of each user in turn, for ever."""
        return (self._next(self._names[number % len(self._names)]) for number in count())

    def _next(self, user: str) -> dict[str, Any]:
        place = self._taken[user]
        self._taken[user] += 1
        return {
            "event_id": f"{user}-{place}",
            "user_id": user,
            "song_id": self._songs[(place * 7919 + len(user)) % len(self._songs)],
            "played_at": self._begin + place * GAP_MS,
        }


def bench_history_lengths(
    post: Post, songs: Sequence[str], *, name: str, rounds: int = 10, plays: int = 50, few: int = FEW, many: int = MANY
) -> BenchResult:
    """Plays a second of users with `many` plays over those with `few`, in alternating rounds of `plays` single calls.

    `name` begins the ids of the users that this makes. Each user of few plays gets one more and no
    other; those of many take turns, so that now and then the older plays of a full window leave it.
    """
    begin = time.time_ns() // 1_000_000 - (many + rounds * plays) * GAP_MS
    short = _Listeners(post, songs, f"{name}-few", rounds * plays, few, begin).turns()
    long = _Listeners(post, songs, f"{name}-many", LONG_USERS, many, begin).turns()

    def way(listeners: Iterator[dict[str, Any]]) -> Callable[[], Measured]:
        def measured() -> Measured:
            bodies = [next(listeners) for _ in range(plays)]
            began = time.perf_counter()
            for body in bodies:
                post(body)
            return Measured(plays, time.perf_counter() - began)

        return measured

    return compare("plays-by-history", "plays", way(long), way(short), rounds=rounds, few_plays=few, many_plays=many)
