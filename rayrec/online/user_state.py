"""One user's state between requests: the latest plays, whose order may still change, and each model's network state.

Plays do not always arrive in time order. The latest plays are held in a window, with the network's state from before
the window. A play that is later than all others costs one step of the network. An earlier play that still falls into
the window is inserted, and the network runs over the window again. Plays older than the window are rejected. When the
window has grown to twice its size, its older half moves to the log, so that the cost of a play does not depend on the
length of the history. Plays of one moment move together. They stay in the window until the plays after them fill it,
because more plays of that moment may arrive.

Window and log belong to the user. Each model has a separate network state, which stores how many plays it has seen and
is brought up to date from the log. So two releases can serve one user without undoing each other's work.

P plays, L state layers, H hidden units.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Literal, get_args

import numpy as np

from rayrec.data.histories import PLAY_COLUMNS, Histories
from rayrec.data.ragged import offsets_of
from rayrec.data.windows import NEVER
from rayrec.model.taste_table import States
from rayrec.recommend.base import LATEST_LIKES, LATEST_PLAYS

WINDOW = 64  # with more than twice as many plays in the window, all but the last `WINDOW` move to the log
MAX_PLAYS_OF_ONE_TIME = 4_096  # maximum number of plays that stay in the window because the oldest are of one moment
FIRST_ONLINE = 1 << 30  # a stored row from here on is FIRST_ONLINE + the number of a song that was added online
MODELS_KEPT = 2  # network states per user: of the live release, and of the previous or the next one

LOGGER = logging.getLogger(__name__)

Outcome = Literal["taken", "repeated", "rejected"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True, kw_only=True)
class Plays:
    """P plays of one user."""

    songs: np.ndarray  # int32 (P,), rows of the catalog
    played_at: np.ndarray  # int64 (P,), ms UTC
    contexts: np.ndarray  # int32 (P,), bit sets
    skipped: np.ndarray  # bool (P,)

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, name)) for name in PLAY_COLUMNS}
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
    ) -> "Plays":
        """Create from lists of the same length; by default without contexts and skips."""
        count = len(songs)
        return cls(
            songs=np.asarray(songs, dtype=np.int32),
            played_at=np.asarray(played_at, dtype=np.int64),
            contexts=np.zeros(count, np.int32) if contexts is None else np.asarray(contexts, dtype=np.int32),
            skipped=np.zeros(count, np.bool_) if skipped is None else np.asarray(skipped, dtype=np.bool_),
        )

    @classmethod
    def concatenate(cls, parts: "Sequence[Plays]") -> "Plays":
        """Return the plays of all parts, one part after the other."""
        if not parts:
            return cls.of([], [])
        if len(parts) == 1:
            return parts[0]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in PLAY_COLUMNS})

    def take(self, indices: np.ndarray | slice) -> "Plays":
        """Return the plays at `indices`, in that order."""
        return Plays(**{name: getattr(self, name)[indices] for name in PLAY_COLUMNS})

    def last(self, count: int) -> "Plays":
        """Return the last `count` plays, or all plays if there are fewer."""
        return self.take(slice(max(0, len(self) - count), None))


def join_plays(users: Sequence[Plays], user_ids: Sequence[str] | None = None) -> Histories:
    """Return histories with one row per user."""
    return Histories(
        user_ids=np.array([""] * len(users) if user_ids is None else list(user_ids), dtype=object),
        offsets=offsets_of([len(part) for part in users]),
        **vars(Plays.concatenate(users)),
    )


def join_likes(parts: Sequence[Plays]) -> Plays:
    """Return the latest likes of all parts in time order, each song and moment once, at most `LATEST_LIKES`."""
    likes = Plays.concatenate([part for part in parts if len(part)])
    if len(likes):
        likes = likes.take(np.unique(np.stack([likes.played_at, likes.songs]), axis=1, return_index=True)[1])
    return likes.last(LATEST_LIKES)


def event_digest(event_id: str) -> int:
    """Return an int64 digest of an event id, in practice unique among the events of one user's last days."""
    data = event_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """The state of one model's network for one user."""

    hidden: np.ndarray  # float32 (L, H), after all plays, if `turn` is the user's
    start_hidden: np.ndarray  # float32 (L, H), after the first `log_plays` plays
    before_at: int  # ms UTC of the last of the first `log_plays` plays; NEVER if there are none
    log_plays: int  # plays in the log when this was computed
    restarts: int  # the user's `restarts` when this was computed; if they differ, the log has been replaced since
    turn: int  # the user's `turn` when this was computed

    @property
    def start(self) -> States:
        """The state from before the window."""
        return States(hidden=self.start_hidden[None], last_played_at=np.array([self.before_at]))


@dataclass(frozen=True, kw_only=True)
class UserState:
    """The stored state of one user, apart from the log and the set of heard songs."""

    window: Plays = field(default_factory=lambda: Plays.of([], []))  # the latest plays, in time order
    before_at: int = NEVER  # ms UTC of the last play of the log
    log_plays: int = 0  # number of plays in the log
    folded: int = 0  # number of the log's first plays whose songs are in the set of heard songs
    rejected: int = 0  # how often a play arrived too late
    turn: int = 0  # counts the changes of the plays
    restarts: int = 0  # counts how often the log was replaced
    forgotten_at: int = NEVER  # ms UTC, when the user was deleted: plays up to then are rejected
    models: Mapping[str, ModelState] = field(default_factory=dict)  # by model id, the last written one at the end
    likes: Plays = field(default_factory=lambda: Plays.of([], []))  # the latest songs liked, and when, in time order

    @classmethod
    def start(cls, model: str, states: States, row: int = 0, plays: int = 0) -> "UserState":
        """Create a state with an empty window: before the first play, or after `plays` plays in the log."""
        hidden, before_at = states.hidden[row], int(states.last_played_at[row])
        model_state = ModelState(
            hidden=hidden, start_hidden=hidden, before_at=before_at, log_plays=plays, restarts=0, turn=0
        )
        return cls(before_at=before_at, log_plays=plays, models={model: model_state})

    @property
    def plays(self) -> int:
        """The number of accepted plays."""
        return self.log_plays + len(self.window)

    @property
    def last_played_at(self) -> int:
        """ms UTC of the last play; NEVER if there is none."""
        return int(self.window.played_at[-1]) if len(self.window) else self.before_at

    @property
    def forgotten(self) -> bool:
        """True if the user was deleted and has not played since."""
        return self.forgotten_at != NEVER and not self.plays

    def current(self, model: str) -> ModelState | None:
        """Return the state of a model; None if it is missing or has not seen all plays."""
        model_state = self.models.get(model)
        return model_state if model_state is not None and model_state.turn == self.turn else None

    def states(self, model: str) -> States:
        """Return the current state of a model in the form that the encoder takes."""
        model_state = self.current(model)
        if model_state is None:
            raise ValueError(f"the state of model {model} is not up to date")
        return States(hidden=model_state.hidden[None], last_played_at=np.array([self.last_played_at]))

    def with_model(self, model: str, model_state: ModelState) -> "UserState":
        """Return this state with a new state of one model; of the other models, the last written one is kept."""
        other_models = [item for item in self.models.items() if item[0] != model]
        return replace(self, models=dict([*other_models[len(other_models) - MODELS_KEPT + 1 :], (model, model_state)]))


@dataclass(frozen=True, kw_only=True)
class Step:
    """A plan to add plays to a state, with the runs of the network that it needs.

    The runs of many steps, of many users, can be the rows of one batch.
    """

    state: UserState  # before the step
    model: str
    outcomes: np.ndarray  # int8 (arrived,), index in OUTCOMES of each play and like, in the order of arrival
    likes: Plays  # the accepted likes
    window: Plays  # with the accepted plays, in time order
    leaving: int  # number of the window's first plays that move to the log
    runs: tuple[tuple[States, Plays], ...]  # from states, over plays: to the new state, to the state before the window

    def count(self, outcome: Outcome) -> int:
        """Return how many of the plays and likes had the given outcome."""
        return int(np.count_nonzero(self.outcomes == OUTCOMES.index(outcome)))

    @property
    def changes(self) -> bool:
        """False if every play and like was stored already, so that the state does not change."""
        return self.count("repeated") < len(self.outcomes)

    @property
    def leaving_plays(self) -> Plays:
        """The plays that move to the log."""
        return self.window.take(slice(self.leaving))

    @property
    def folds(self) -> bool:
        """True if the log then holds more plays than an answer reads, so that `fold_heard` must be called."""
        return bool(self.leaving) and self.state.log_plays + self.leaving - self.state.folded > LATEST_PLAYS

    def finish(self, states: States) -> UserState:
        """Return the new state, from the states after the runs of this step."""
        likes = join_likes([self.state.likes, self.likes]) if len(self.likes) else self.state.likes
        new_state = replace(self.state, rejected=self.state.rejected + self.count("rejected"), likes=likes)
        if not self.runs:
            return new_state
        model_state = self.state.models[self.model]
        new_state = replace(new_state, window=self.window.take(slice(self.leaving, None)), turn=self.state.turn + 1)
        if self.leaving:
            before_at = int(states.last_played_at[1])
            new_state = replace(new_state, before_at=before_at, log_plays=self.state.log_plays + self.leaving)
            model_state = replace(
                model_state, start_hidden=states.hidden[1], before_at=before_at, log_plays=new_state.log_plays
            )
        return new_state.with_model(self.model, replace(model_state, hidden=states.hidden[0], turn=new_state.turn))


def plan_plays(
    state: UserState,
    model: str,
    arrived: Plays,
    repeated: np.ndarray | None = None,
    liked: np.ndarray | None = None,
) -> Step:
    """Plan how to add plays, in any order, to a state that is up to date for a model.

    `repeated`, bool (arrived,), marks plays whose event ids are stored already; `liked`, bool (arrived,), marks likes
    that are no plays. A play is rejected unless it is after the last play of the log and after the user's deletion, a
    like unless it is after the user's deletion.
    """
    model_state = state.current(model)
    if model_state is None:
        raise ValueError(f"the state of model {model} is not up to date")
    is_repeated = np.zeros(len(arrived), np.bool_) if repeated is None else repeated
    is_like = np.zeros(len(arrived), np.bool_) if liked is None else liked
    earliest = np.where(is_like, state.forgotten_at, max(state.before_at, state.forgotten_at))
    is_late = ~is_repeated & (arrived.played_at <= earliest)
    outcomes = np.select([is_repeated, is_late], [OUTCOMES.index("repeated"), OUTCOMES.index("rejected")]).astype(
        np.int8
    )
    new_plays, likes = (arrived.take(~is_repeated & ~is_late & has_kind) for has_kind in (~is_like, is_like))
    new_plays = new_plays.take(np.argsort(new_plays.played_at, kind="stable"))
    window = Plays.concatenate([state.window, new_plays])
    is_in_order = not len(state.window) or not len(new_plays) or new_plays.played_at[0] >= state.window.played_at[-1]
    if not is_in_order:
        window = window.take(np.argsort(window.played_at, kind="stable"))
    num_leaving = count_leaving_plays(window.played_at)
    runs = []
    if len(new_plays):
        runs.append((state.states(model), new_plays) if is_in_order else (model_state.start, window))
    if num_leaving:
        runs.append((model_state.start, window.take(slice(num_leaving))))
    return Step(
        state=state,
        model=model,
        outcomes=outcomes,
        likes=likes,
        window=window,
        leaving=num_leaving,
        runs=tuple(runs),
    )


@dataclass(frozen=True, kw_only=True)
class CatchUp:
    """A plan to bring a model's state up to date after other models or other replicas have added plays."""

    state: UserState
    model: str
    runs: tuple[tuple[States, Plays], ...]  # from states, over plays: to the end of the window, to the end of the log

    @classmethod
    def of(cls, state: UserState, model: str, blank: States, log: Plays) -> "CatchUp":
        """Start from the model's own state if the log continues it, else from `blank`, the state before the first play.

        `log` holds the last plays of the log: all of them, or at least `LATEST_PLAYS`. If the store has lost some, this
        logs a warning, and the network runs over the plays that are left.
        """
        if len(log) < min(state.log_plays, LATEST_PLAYS):
            LOGGER.warning(
                "a user's log has %d plays, expected the last %d of %d: the store has lost some, as a Redis server "
                "does that evicts keys; set maxmemory-policy noeviction and run `rayrec states load --force`",
                len(log),
                min(state.log_plays, LATEST_PLAYS),
                state.log_plays,
            )
        start_state, missing_plays, model_state = blank, log, state.models.get(model)
        if (
            model_state is not None
            and model_state.restarts == state.restarts
            and state.log_plays - model_state.log_plays <= len(log)
        ):
            start_state, missing_plays = model_state.start, log.last(state.log_plays - model_state.log_plays)
        return cls(
            state=state,
            model=model,
            runs=((start_state, Plays.concatenate([missing_plays, state.window])), (start_state, missing_plays)),
        )

    def finish(self, states: States) -> UserState:
        """Return the user's state with the model up to date, from the states after the runs."""
        state = self.state
        model_state = ModelState(
            hidden=states.hidden[0],
            start_hidden=states.hidden[1],
            before_at=state.before_at,
            log_plays=state.log_plays,
            restarts=state.restarts,
            turn=state.turn,
        )
        return state.with_model(self.model, model_state)


def gather(steps: Sequence[Step | CatchUp]) -> tuple[Histories, States]:
    """Return all runs of steps, at least one, as one batch: the plays, and the states from which to run over them."""
    runs = [run for step in steps for run in step.runs]
    start_states = States(
        hidden=np.concatenate([states.hidden for states, _ in runs]),
        last_played_at=np.concatenate([states.last_played_at for states, _ in runs]),
    )
    return join_plays([plays for _, plays in runs]), start_states


def scatter(steps: Sequence[Step | CatchUp], end_states: States | None) -> list[UserState]:
    """Return the new state of each step, from the states after the batch of `gather`."""
    new_states, start = [], 0
    for step in steps:
        step_rows = slice(start, start + len(step.runs))
        start = step_rows.stop
        new_states.append(step.finish(_NO_STATES if end_states is None else _take_states(end_states, step_rows)))
    return new_states


def fold_heard(state: UserState, log_songs: np.ndarray, heard_songs: np.ndarray) -> tuple[UserState, np.ndarray]:
    """Add the songs of the log's older plays to the set of heard songs, int32 ascending; return new state and set.

    `log_songs`, int32, are the songs of the last plays of the log, at least of all plays that are not in the set yet.
    The last half of `LATEST_PLAYS` plays stays out of the set, so that the set is rarely written.
    """
    folded = max(state.folded, state.log_plays - LATEST_PLAYS // 2)
    end = len(log_songs) - (state.log_plays - folded)
    start = max(0, len(log_songs) - (state.log_plays - state.folded))
    return replace(state, folded=folded), np.union1d(heard_songs, log_songs[start:end]).astype(np.int32)


_NO_STATES = States(hidden=np.zeros((0, 0, 0), np.float32), last_played_at=np.zeros(0, np.int64))


def _take_states(states: States, rows: slice) -> States:
    return States(hidden=states.hidden[rows], last_played_at=states.last_played_at[rows])


def count_leaving_plays(played_at: np.ndarray) -> int:
    """Return how many of the window's first plays move to the log; `played_at`, int64 (P,), is ascending.

    Plays of one moment stay together. They stay in the window if it then holds at most `MAX_PLAYS_OF_ONE_TIME` plays.
    Otherwise they move to the log, and more plays of that moment are rejected.
    """
    if len(played_at) <= 2 * WINDOW:
        return 0
    cutoff_time = played_at[len(played_at) - WINDOW]
    first_kept = int(np.searchsorted(played_at, cutoff_time, side="left"))
    return (
        first_kept
        if len(played_at) - first_kept <= MAX_PLAYS_OF_ONE_TIME
        else int(np.searchsorted(played_at, cutoff_time, side="right"))
    )
