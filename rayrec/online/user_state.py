"""One user's state between requests: where the network stands, and the last plays, which may still change places.

Plays come one by one, and not always in the order of time. The latest are held back in a window, with the network's
state from before it. A play that comes in its turn costs one step of the network; one that comes late, but
after the last play that has left the window, is put in its place and the window is run over again. Of older ones
there is nothing to go back to: they are rejected. When the window has grown to twice its size its
older half leaves, so a play costs the same whatever came before it. The state always equals that of the
batch job over the plays taken, in the order of time.

P plays, L state layers, H hidden units.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Literal, get_args

import numpy as np

from rayrec.data.histories import Histories
from rayrec.data.windows import NEVER
from rayrec.model.inference import States

WINDOW = 64  # plays held back, at least, where there are as many; at most twice that
NO_EVENT = 0  # in place of the digest of an event id: the play came without one

Outcome = Literal["taken", "repeated", "rejected"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Run = Callable[[Histories, States], States]  # the network's states after plays, from the states before them


@dataclass(frozen=True, kw_only=True)
class Plays:
    """P plays of one user."""

    songs: np.ndarray  # int32 (P,), rows of the song table
    played_at: np.ndarray  # int64 (P,), ms UTC
    contexts: np.ndarray  # int32 (P,), bit sets
    skipped: np.ndarray  # bool (P,)
    events: np.ndarray  # uint64 (P,), digests of event ids, NO_EVENT where there was none

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, name)) for name in PLAY_FIELDS}
        if len(lengths) != 1:
            raise ValueError(f"the arrays of plays differ in length: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.songs)

    @classmethod
    def of(
        cls,
        songs: Sequence[int] | np.ndarray,
        played_at: Sequence[int] | np.ndarray,
        *,
        contexts: Sequence[int] | np.ndarray | None = None,
        skipped: Sequence[bool] | np.ndarray | None = None,
        events: Sequence[str] | None = None,
    ) -> "Plays":
        """From lists of the same length; without contexts, skips and event ids where they are not given."""
        count = len(songs)
        return cls(
            songs=np.asarray(songs, dtype=np.int32),
            played_at=np.asarray(played_at, dtype=np.int64),
            contexts=np.zeros(count, np.int32) if contexts is None else np.asarray(contexts, dtype=np.int32),
            skipped=np.zeros(count, np.bool_) if skipped is None else np.asarray(skipped, dtype=np.bool_),
            events=np.array([NO_EVENT] * count if events is None else [digest(event) for event in events], np.uint64),
        )

    @classmethod
    def joined(cls, parts: "Sequence[Plays]") -> "Plays":
        """The plays of all parts, one part after the other."""
        if not parts:
            return cls.of([], [])
        if len(parts) == 1:
            return parts[0]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in PLAY_FIELDS})

    def take(self, which: np.ndarray | slice) -> "Plays":
        """Some of the plays, in the order of `which`."""
        return Plays(**{name: getattr(self, name)[which] for name in PLAY_FIELDS})

    def history(self, user_id: str = "") -> Histories:
        """The batch of this one user."""
        return histories_of([self], [user_id])


PLAY_FIELDS = tuple(Plays.__dataclass_fields__)


def histories_of(users: Sequence[Plays], user_ids: Sequence[str] | None = None) -> Histories:
    """One row for the plays of each user."""
    plays = Plays.joined(users)
    return Histories(
        user_ids=np.array([""] * len(users) if user_ids is None else list(user_ids), dtype=object),
        offsets=np.concatenate([[0], np.cumsum([len(part) for part in users])]).astype(np.int64),
        songs=plays.songs,
        played_at=plays.played_at,
        contexts=plays.contexts,
        skipped=plays.skipped,
    )


def digest(event_id: str) -> int:
    """Eight bytes that stand for an event id within a window, where they do not meet by chance."""
    return int.from_bytes(blake2b(event_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1


@dataclass(frozen=True, kw_only=True)
class UserState:
    """Where one model's network stands with one user."""

    model: str  # id of the model; no other network may go on from here
    hidden: np.ndarray  # float32 (L, H), after all plays
    before: np.ndarray  # float32 (L, H), after the plays that have left the window
    before_at: int = NEVER  # ms UTC, when the last of those was played
    left: int = 0  # how many have left the window
    window: Plays = field(default_factory=lambda: Plays.of([], []))  # the plays since, in the order of time
    rejected: int = 0  # plays that came too late

    @classmethod
    def start(cls, model: str, states: States, row: int = 0, plays: int = 0) -> "UserState":
        """With nothing in the window: before the first play, or after `plays` that may not change any more."""
        hidden = states.hidden[row]
        return cls(model=model, hidden=hidden, before=hidden, before_at=int(states.last_played_at[row]), left=plays)

    @property
    def plays(self) -> int:
        """Plays that were taken."""
        return self.left + len(self.window)

    @property
    def last_played_at(self) -> int:
        """ms UTC; NEVER where there was no play."""
        return int(self.window.played_at[-1]) if len(self.window) else self.before_at

    @property
    def states(self) -> States:
        """As the encoder takes it, of this one user."""
        return States(hidden=self.hidden[None], last_played_at=np.array([self.last_played_at]))

    @property
    def states_before(self) -> States:
        """The state from before the window."""
        return States(hidden=self.before[None], last_played_at=np.array([self.before_at]))


@dataclass(frozen=True, kw_only=True)
class Step:
    """Plays on their way into a state: over what the network has to run, from where, and what comes of it.

    The runs are the rows of one batch: of any number of steps of any number of users.
    """

    state: UserState  # before the step
    outcomes: np.ndarray  # int8 (arrived,), places in OUTCOMES of the plays as they came
    window: Plays  # with the plays taken, in the order of time
    leaving: int  # the first plays of the window that leave it
    runs: tuple[tuple[States, Plays], ...]  # from a state over plays: to the new state, and to that before the window

    def count(self, outcome: Outcome) -> int:
        """How many of the plays had an outcome."""
        return int(np.count_nonzero(self.outcomes == OUTCOMES.index(outcome)))

    @property
    def changes(self) -> bool:
        """False where the state stays as it is: every play was there already."""
        return self.count("repeated") < len(self.outcomes)

    @property
    def left(self) -> Plays:
        """The plays that leave the window, for good."""
        return self.window.take(slice(self.leaving))

    def finish(self, states: States) -> UserState:
        """The new state, from the states in which this step's runs ended."""
        after = replace(self.state, rejected=self.state.rejected + self.count("rejected"))
        if self.runs:
            after = replace(after, hidden=states.hidden[0], window=self.window.take(slice(self.leaving, None)))
        if self.leaving:
            after = replace(
                after,
                before=states.hidden[1],
                before_at=int(states.last_played_at[1]),
                left=self.state.left + self.leaving,
            )
        return after


def plan(state: UserState, arrived: Plays) -> Step:
    """How to take plays into a state, which may come in any order and more than once.

    A play is repeated where its event id, or its song at its very moment, is in the window already. It is set
    aside where it was not played after the last play that has left the window.
    """
    repeated = _repeated(state.window, arrived)
    late = ~repeated & (arrived.played_at <= state.before_at)
    outcomes = np.select([repeated, late], [OUTCOMES.index("repeated"), OUTCOMES.index("rejected")]).astype(np.int8)
    taken = arrived.take(~repeated & ~late)
    taken = taken.take(np.argsort(taken.played_at, kind="stable"))
    window = Plays.joined([state.window, taken])
    in_turn = not len(state.window) or not len(taken) or taken.played_at[0] >= state.window.played_at[-1]
    if not in_turn:
        window = window.take(np.argsort(window.played_at, kind="stable"))
    leaving = _leaving(window.played_at)
    runs = []
    if len(taken):
        runs.append((state.states, taken) if in_turn else (state.states_before, window))
    if leaving:
        runs.append((state.states_before, window.take(slice(leaving))))
    return Step(state=state, outcomes=outcomes, window=window, leaving=leaving, runs=tuple(runs))


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A state on its way to another model: its network runs over all plays again, log and window."""

    state: UserState  # of the model before
    model: str
    runs: tuple[tuple[States, Plays], ...]  # over all plays, and over those that have left the window

    @classmethod
    def of(cls, state: UserState, model: str, blank: States, log: Plays) -> "Replay":
        """From `blank`, the new network's state before the first play; `log` holds the plays that left the window."""
        if len(log) != state.left:
            raise ValueError(f"the log holds {len(log)} plays, the state says that {state.left} have left the window")
        return cls(state=state, model=model, runs=((blank, Plays.joined([log, state.window])), (blank, log)))

    def finish(self, states: States) -> UserState:
        """The state of the new model, from the states in which the runs ended."""
        return replace(self.state, model=self.model, hidden=states.hidden[0], before=states.hidden[1])


def gather(steps: Sequence[Step | Replay]) -> tuple[Histories, States]:
    """All runs of steps as one batch, at least one run: the plays, and the states from which to run over them."""
    runs = [run for step in steps for run in step.runs]
    start = States(
        hidden=np.concatenate([states.hidden for states, _ in runs]),
        last_played_at=np.concatenate([states.last_played_at for states, _ in runs]),
    )
    return histories_of([plays for _, plays in runs]), start


def scatter(steps: Sequence[Step | Replay], ended: States | None) -> list[UserState]:
    """The new state of each step, from the states in which the batch of `gather` ended."""
    found, row = [], 0
    for step in steps:
        rows = slice(row, row + len(step.runs))
        row = rows.stop
        found.append(step.finish(_NOTHING if ended is None else _rows(ended, rows)))
    return found


def advance(run: Run, state: UserState, arrived: Plays) -> tuple[UserState, Step]:
    """Take plays into a state, with a network at hand."""
    step = plan(state, arrived)
    return scatter([step], run(*gather([step])) if step.runs else None)[0], step


_NOTHING = States(hidden=np.zeros((0, 0, 0), np.float32), last_played_at=np.zeros(0, np.int64))


def _rows(states: States, rows: slice) -> States:
    return States(hidden=states.hidden[rows], last_played_at=states.last_played_at[rows])


def _repeated(window: Plays, arrived: Plays) -> np.ndarray:
    """bool (arrived,): true for plays that the window holds, or that came before among those that arrived."""
    events = set(window.events.tolist()) - {NO_EVENT}
    moments = set(zip(window.songs.tolist(), window.played_at.tolist(), strict=True))
    repeated: np.ndarray = np.zeros(len(arrived), dtype=np.bool_)
    columns = (arrived.events.tolist(), arrived.songs.tolist(), arrived.played_at.tolist())
    for place, (event, song, played_at) in enumerate(zip(*columns, strict=True)):
        repeated[place] = event in events or (song, played_at) in moments
        if not repeated[place]:
            events.update({event} - {NO_EVENT})
            moments.add((song, played_at))
    return repeated


def _leaving(played_at: np.ndarray) -> int:
    """How many of the first plays, int64 (P,) ascending, leave the window; those of one moment stay together."""
    if len(played_at) <= 2 * WINDOW:
        return 0
    cut = played_at[len(played_at) - WINDOW]
    return int(np.searchsorted(played_at, cut, side="left") or np.searchsorted(played_at, cut, side="right"))
