"""The report of an experiment: for each arm, the share of played songs that it had recommended, with intervals.

A play with a recommendation id belongs to the answer with this id, and to no arm if that is not an answer of the
experiment to the same user. A play without an id belongs to the arm of the user's last answer in the `days` before
it. A play with an id counts as recommended if its answer held the song; a play without an id, if any answer of the arm
to the user in those days held it. Skipped plays do not count as played, and a song counts once per user and arm.

U users, A arms, P plays, S recommended songs of all answers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from rayrec.config import Settings
from rayrec.data.dataset import Dataset
from rayrec.data.histories import user_hash
from rayrec.data.impressions import SCHEMAS, log_files, read_impressions
from rayrec.data.moments import DAY_MS, format_iso
from rayrec.errors import InputError, NotFoundError
from rayrec.evaluation.accumulator import CELLS, CellRange, bootstrap_weights, means_with_intervals
from rayrec.storage.workspace import Workspace

PART_BYTES = 32 << 20  # bytes of log files per share of the users; one share is in memory at once
CONFIDENCE = 0.95
MIN_USERS = 30  # users with counted plays in an arm; a bootstrap over fewer gives no reliable interval
ANSWER_COLUMNS = ["recommendation_id", "user_id", "at", "release", "experiment", "arm", "first", "song_ids"]
EVENT_COLUMNS = ["event_id", "user_id", "song_id", "type", "played_at", "skipped", "recommendation_id"]


class ExperimentReportConfig(Settings):
    """What to report."""

    name: str | None = Field(None, min_length=1, description="Experiment; default: the only one in the log")
    control: str | None = Field(
        None,
        min_length=1,
        description="Arm to compare the others with; default: control, else the first in alphabetical order",
    )
    plays: Literal["log", "dataset"] = Field(
        "log", description="Source of the plays; log: those sent to /v1/plays, dataset: those of the data set"
    )
    days: float = Field(7.0, gt=0, le=365, description="Days after an answer in which plays are attributed to it")
    k: int | None = Field(None, ge=1, description="Count only the first k songs of a ranking; default: all")
    samples: int = Field(1000, ge=100, le=100_000, description="Bootstrap samples")
    seed: int = Field(0, ge=0, description="Random seed of the bootstrap")


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """The figures of one arm, with 95 % intervals by a bootstrap over users.

    `recall` and `difference` are None if nothing was played. An interval is None if fewer than 30 users of the arm (for
    the difference, of one of the two arms) have counted plays, or if all bootstrap samples are equal.
    """

    arm: str
    releases: list[str]  # releases that answered
    users: int
    users_with_plays: int  # users with counted plays
    answers: int
    played: int  # songs that its users played after an answer, once per user
    recommended: int  # those of them that had been recommended
    recall: float | None  # recommended / played
    low: float | None
    high: float | None
    difference: float | None  # recall minus that of the control arm; None for the control arm
    difference_low: float | None
    difference_high: float | None
    skips: int  # plays of recommended songs that were skipped
    likes: int  # likes of recommended songs


@dataclass(frozen=True, kw_only=True)
class ExperimentReport:
    """The arms of an experiment, the control arm first."""

    experiment: str
    plays: str
    days: float
    k: int | None
    first_answer: str  # ISO 8601, UTC
    last_answer: str
    arms: list[ArmResult]

    def to_mapping(self) -> dict[str, Any]:
        """Return the report as a mapping for JSON."""
        return asdict(self)

    @property
    def verdict(self) -> str:
        """One sentence per arm: its difference from the control arm, with the interval."""
        control, *other_arms = self.arms
        return (
            " ".join(_verdict(arm, control.arm) for arm in other_arms) or "There is only one arm; nothing to compare."
        )


def _verdict(arm: ArmResult, control: str) -> str:
    if arm.difference is None or arm.difference_low is None or arm.difference_high is None:
        return (
            f"{arm.arm}: no comparison, because one of the arms has fewer than {MIN_USERS} users with plays or "
            "recall is the same for all users."
        )
    interval = f"{arm.difference:+.4f} ({arm.difference_low:+.4f} to {arm.difference_high:+.4f})"
    if arm.difference_low <= 0 <= arm.difference_high:
        return f"{arm.arm}: no significant difference from {control}, {interval}."
    return f"{arm.arm}: recall is {'higher' if arm.difference > 0 else 'lower'} than in {control}, {interval}."


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """The answers to a share of the users, and the songs in them."""

    ids: pa.Array  # string (n,), recommendation ids
    users: np.ndarray  # int64 (n,), rows of `user_ids`
    user_ids: pa.Array  # string (U,)
    arms: np.ndarray  # int64 (n,)
    at: np.ndarray  # int64 (n,), ms UTC
    song_answers: np.ndarray  # int64 (S,), the answer of each recommended song
    song_ids: pa.Array  # string (S,)


@dataclass(frozen=True, kw_only=True)
class _Events:
    """Plays, skips and likes of users who had answers, except those that name an answer outside of `_Answers`."""

    users: np.ndarray  # int64 (P,), rows of the user ids of the answers
    song_ids: pa.Array  # string (P,)
    at: np.ndarray  # int64 (P,), ms UTC
    named_answers: np.ndarray  # int64 (P,), the answer that each event names; -1 if it names none
    skipped: np.ndarray  # bool (P,)
    liked: np.ndarray  # bool (P,), True for likes, which are not plays


@dataclass(kw_only=True)
class _Totals:
    """Sums over users."""

    arms: list[str]
    played: np.ndarray = field(init=False)  # float64 (C, A), by cell of the bootstrap
    recommended: np.ndarray = field(init=False)  # float64 (C, A)
    counts: dict[str, np.ndarray] = field(init=False)  # int64 (A,) each: users, users_with_plays, answers, skips, likes

    def __post_init__(self) -> None:
        self.played, self.recommended = np.zeros((2, CELLS, len(self.arms)))
        names = ("users", "users_with_plays", "answers", "skips", "likes")
        self.counts = {name: np.zeros(len(self.arms), np.int64) for name in names}


@dataclass(frozen=True, kw_only=True)
class _Overview:
    """An experiment in the log: its arms with their releases, and the times of its answers."""

    name: str
    releases: dict[str, list[str]]  # by arm
    first_answer_at: int  # ms UTC
    last_answer_at: int


def report_experiment(workspace: Workspace, config: ExperimentReportConfig) -> ExperimentReport:
    """Return the report of an experiment, from the impression log of a workspace and later plays.

    Users are processed in shares, with one pass over the log for each, so memory is bounded. Raises `NotFoundError` if
    the log has no such experiment or control arm, `InputError` if it has several experiments and none is named.
    """
    overview = _overview(workspace, config.name)
    arms = sorted(overview.releases)
    control = config.control or ("control" if "control" in arms else arms[0])
    if control not in arms:
        raise NotFoundError(
            f"experiment {overview.name} has no answers of arm {control!r}; set --control to one of {', '.join(arms)}"
        )
    arms = [control, *(arm for arm in arms if arm != control)]
    totals = _Totals(arms=arms)
    shares = -(-sum(log_files(workspace).values()) // PART_BYTES)
    for share in range(shares):
        answers = _read_answers(workspace, overview.name, arms, config.k, (share, shares))
        if not len(answers.users):
            continue
        events = (
            _logged_events(workspace, answers)
            if config.plays == "log"
            else _dataset_plays(workspace, answers, overview.first_answer_at)
        )
        _add_share(totals, answers, events, round(config.days * DAY_MS))
    return ExperimentReport(
        experiment=overview.name,
        plays=config.plays,
        days=config.days,
        k=config.k,
        first_answer=format_iso(overview.first_answer_at),
        last_answer=format_iso(overview.last_answer_at),
        arms=_arm_figures(totals, overview, config),
    )


def _overview(workspace: Workspace, name: str | None) -> _Overview:
    releases: dict[str, dict[str, set[str]]] = {}  # by experiment and arm
    answer_times: dict[str, list[int]] = {}
    for table in read_impressions(workspace, "answers", ["experiment", "arm", "release", "at"]):
        table = table.filter(pc.is_valid(table.column("arm")))
        for row in table.group_by(["experiment", "arm", "release"]).aggregate([("at", "min_max")]).to_pylist():
            arms = releases.setdefault(row["experiment"], {})
            arms.setdefault(row["arm"], set()).add(row["release"])
            ends = [round(1000 * row["at_min_max"][end].timestamp()) for end in ("min", "max")]
            answer_times.setdefault(row["experiment"], []).extend(ends)
    if not releases:
        raise NotFoundError(
            f"the impression log of {workspace.uri} has no answers of an experiment; serve with an experiment and "
            "--log-impressions"
        )
    if name is None and len(releases) > 1:
        names = ", ".join(sorted(releases))
        raise InputError(f"the log holds {len(releases)} experiments; set --name to one of {names}")
    name = name or next(iter(releases))
    if name not in releases:
        raise NotFoundError(f"the log has no experiment {name!r}; set --name to one of {', '.join(sorted(releases))}")
    releases_by_arm = {arm: sorted(release_ids) for arm, release_ids in releases[name].items()}
    return _Overview(
        name=name,
        releases=releases_by_arm,
        first_answer_at=min(answer_times[name]),
        last_answer_at=max(answer_times[name]),
    )


def _rows_of_share(table: pa.Table, share: tuple[int, int]) -> pa.Table:
    """Return the rows of one of equal shares of the users; `share` is its number and the number of shares."""
    share_index, shares = share
    users = table.column("user_id").combine_chunks().dictionary_encode()
    is_in_share = user_hash(users.dictionary.to_pylist(), salt="experiment report ") % np.uint64(shares) == share_index
    return table.filter(pc.take(pa.array(is_in_share), users.indices))


def _read_answers(
    workspace: Workspace, experiment: str, arms: Sequence[str], k: int | None, share: tuple[int, int]
) -> _Answers:
    tables = []
    for table in read_impressions(workspace, "answers", ANSWER_COLUMNS):
        table = table.filter((pc.field("experiment") == experiment) & pc.field("user_id").is_valid())
        tables.append(_rows_of_share(table, share))
    table = pa.concat_tables(tables).combine_chunks()
    _, rows = np.unique(table.column("recommendation_id").to_numpy(), return_index=True)
    table = table.take(np.sort(rows)).combine_chunks()  # after a killed compaction, files may hold rows twice
    users = _column(table, "user_id").dictionary_encode()
    songs = _column(table, "song_ids")
    song_answers = pc.list_parent_indices(songs).to_numpy().astype(np.int64)
    answer_starts = np.concatenate([[0], np.cumsum(np.bincount(song_answers, minlength=len(table)))])
    positions = (
        np.arange(len(song_answers)) - answer_starts[song_answers] + _column(table, "first").to_numpy()[song_answers]
    )
    in_first_k = np.ones(len(positions), np.bool_) if k is None else positions < k
    return _Answers(
        ids=_column(table, "recommendation_id"),
        users=users.indices.to_numpy().astype(np.int64),
        user_ids=users.dictionary,
        arms=pc.index_in(_column(table, "arm"), value_set=pa.array(arms)).to_numpy().astype(np.int64),
        at=_column(table, "at").cast(pa.int64()).to_numpy(),
        song_answers=song_answers[in_first_k],
        song_ids=songs.flatten().filter(pa.array(in_first_k)),
    )


def _column(table: pa.Table, name: str) -> Any:
    """Return a column as one array."""
    return table.column(name).combine_chunks()


def _logged_events(workspace: Workspace, answers: _Answers) -> _Events:
    tables = [
        table.filter(pc.is_in(table.column("user_id"), value_set=answers.user_ids))
        for table in read_impressions(workspace, "events", EVENT_COLUMNS)
    ]
    table = pa.concat_tables([SCHEMAS["events"].empty_table().select(EVENT_COLUMNS), *tables])
    keys = table.select(["user_id", "event_id"]).to_pandas()
    table = table.filter(pa.array(~keys.duplicated().to_numpy(dtype=np.bool_))).combine_chunks()
    named_answers = pc.index_in(_column(table, "recommendation_id"), value_set=answers.ids)
    users = pc.index_in(_column(table, "user_id"), value_set=answers.user_ids)
    answer_rows, users = _to_int64(named_answers), _to_int64(users)
    # An event that names an answer outside of the experiment, or to another user, is not an effect of these answers.
    is_attributable = _to_bool(pc.is_null(_column(table, "recommendation_id"))) | (
        (answer_rows >= 0) & (answers.users[answer_rows] == users)
    )
    table = table.filter(pa.array(is_attributable))
    users = users[is_attributable]
    answer_rows = answer_rows[is_attributable]
    return _Events(
        users=users,
        song_ids=_column(table, "song_id"),
        at=_column(table, "played_at").cast(pa.int64()).to_numpy(),
        named_answers=answer_rows,
        skipped=_to_bool(_column(table, "skipped")),
        liked=_to_bool(pc.equal(_column(table, "type"), "like")),
    )


def _to_int64(array: pa.Array) -> np.ndarray:
    """Return the values as int64, -1 for null."""
    return np.asarray(pc.fill_null(array, -1).to_numpy(zero_copy_only=False)).astype(np.int64)


def _to_bool(array: pa.Array) -> np.ndarray:
    return np.asarray(array.to_numpy(zero_copy_only=False)).astype(np.bool_)


def _dataset_plays(workspace: Workspace, answers: _Answers, first_answer_at: int) -> _Events:
    dataset = Dataset(workspace)
    catalog = dataset.catalog()
    users, songs, played_at, skipped = [], [], [], []
    for histories in dataset.read_all():
        rows = _to_int64(pc.index_in(pa.array(histories.user_ids, pa.string()), value_set=answers.user_ids))
        is_in_time = (rows[histories.rows] >= 0) & (histories.played_at >= first_answer_at)
        users.append(rows[histories.rows][is_in_time])
        songs.append(histories.songs[is_in_time])
        played_at.append(histories.played_at[is_in_time])
        skipped.append(
            np.zeros(int(is_in_time.sum()), np.bool_) if histories.skipped is None else histories.skipped[is_in_time]
        )
    rows = np.concatenate(songs)
    return _Events(
        users=np.concatenate(users),
        song_ids=pa.array(catalog.song_ids(rows), pa.string()),
        at=np.concatenate(played_at),
        named_answers=np.full(len(rows), -1),
        skipped=np.concatenate(skipped),
        liked=np.zeros(len(rows), np.bool_),
    )


def _add_share(totals: _Totals, answers: _Answers, events: _Events, window_ms: int) -> None:
    """Add a share of the users to the totals; `window_ms` is the time after an answer in which plays count for it."""
    num_arms = len(totals.arms)
    encoded = pa.concat_arrays([answers.song_ids, events.song_ids]).dictionary_encode()
    num_songs, rows = len(encoded.dictionary) + 1, encoded.indices.to_numpy().astype(np.int64)
    recommended_songs, event_songs = rows[: len(answers.song_ids)], rows[len(answers.song_ids) :]
    last_answers = latest_rows(answers.users, answers.at, events.users, events.at)
    is_recent = (last_answers >= 0) & (events.at - answers.at[last_answers] <= window_ms)
    source_answers = np.where(events.named_answers >= 0, events.named_answers, np.where(is_recent, last_answers, -1))
    is_counted = source_answers >= 0
    arms = answers.arms[source_answers]  # only valid for the counted events

    # An answer recommends a song if it holds the song; an arm, if one of its answers in the last days holds it.
    song_answers = answers.song_answers
    is_in_answer = np.isin(source_answers * num_songs + event_songs, song_answers * num_songs + recommended_songs)
    answer_keys, event_keys = answers.users * num_arms + answers.arms, events.users * num_arms + arms
    song_keys = np.concatenate(
        [answer_keys[song_answers] * num_songs + recommended_songs, event_keys * num_songs + event_songs]
    )
    song_keys = np.unique(song_keys, return_inverse=True)[1].reshape(-1)
    recommended_at = answers.at[song_answers]
    last_recommended = latest_rows(
        song_keys[: len(recommended_songs)], recommended_at, song_keys[len(recommended_songs) :], events.at
    )
    is_in_arm = last_recommended >= 0
    is_in_arm[is_in_arm] = events.at[is_in_arm] - recommended_at[last_recommended[is_in_arm]] <= window_ms
    is_hit = is_counted & np.where(events.named_answers >= 0, is_in_answer, is_in_arm)

    is_played = is_counted & ~events.skipped & ~events.liked
    pairs, rows = np.unique(event_keys[is_played] * num_songs + event_songs[is_played], return_inverse=True)
    has_hit = np.bincount(rows.reshape(-1), is_hit[is_played], minlength=len(pairs)) > 0
    users, pair_arms = np.divmod(pairs // num_songs, num_arms)
    cells = CellRange().cells_of(answers.user_ids.to_numpy(zero_copy_only=False))[users]
    np.add.at(totals.played, (cells, pair_arms), 1)
    np.add.at(totals.recommended, (cells, pair_arms), has_hit)

    def count_by_arm(arm_indices: np.ndarray) -> np.ndarray:
        return np.bincount(arm_indices, minlength=num_arms)

    totals.counts["users"] += count_by_arm(np.unique(answer_keys) % num_arms)
    totals.counts["users_with_plays"] += count_by_arm(np.unique(pairs // num_songs) % num_arms)
    totals.counts["answers"] += count_by_arm(answers.arms)
    totals.counts["skips"] += count_by_arm(arms[is_hit & events.skipped])
    totals.counts["likes"] += count_by_arm(arms[is_hit & events.liked])


def latest_rows(keys: np.ndarray, at: np.ndarray, wanted_keys: np.ndarray, until: np.ndarray) -> np.ndarray:
    """int64 (n,): for each of `wanted_keys` the row with this key and the last moment up to `until`; -1 if none.

    Rows have `keys` and moments `at`, int64 (m,) each; `wanted_keys` and `until` are int64 (n,). Keys count from 0.
    """
    if not len(keys):
        return np.full(len(wanted_keys), -1)
    timestamps, ranks = np.unique(np.concatenate([at, until]), return_inverse=True)
    ranks = ranks.reshape(-1)
    order = np.lexsort((ranks[: len(keys)], keys))
    positions = np.searchsorted(
        (keys * len(timestamps) + ranks[: len(keys)])[order],
        wanted_keys * len(timestamps) + ranks[len(keys) :],
        side="right",
    )
    rows = order[np.maximum(positions - 1, 0)]
    return np.where((positions > 0) & (keys[rows] == wanted_keys), rows, -1)


def _arm_figures(totals: _Totals, overview: _Overview, config: ExperimentReportConfig) -> list[ArmResult]:
    weights = bootstrap_weights(CELLS, config.samples, config.seed)
    recommended, played = weights @ totals.recommended, weights @ totals.played
    values = means_with_intervals(recommended, played, CONFIDENCE)
    recalls = np.divide(recommended, played, out=np.full(played.shape, np.nan), where=played > 0)
    has_enough_users = totals.counts["users_with_plays"] >= MIN_USERS
    arms = []
    for arm_index, arm in enumerate(totals.arms):
        value, *ends = (series[arm_index] for series in values)
        low, high = _interval(*ends) if has_enough_users[arm_index] else (None, None)
        difference, difference_low, difference_high = _difference(
            recalls, arm_index, bool(has_enough_users[0] and has_enough_users[arm_index])
        )
        arms.append(
            ArmResult(
                arm=arm,
                releases=overview.releases[arm],
                played=int(totals.played[:, arm_index].sum()),
                recommended=int(totals.recommended[:, arm_index].sum()),
                recall=_round_or_none(value),
                low=low,
                high=high,
                difference=difference,
                difference_low=difference_low,
                difference_high=difference_high,
                **{name: int(counts[arm_index]) for name, counts in totals.counts.items()},
            )
        )
    return arms


def _difference(
    recalls: np.ndarray, arm_index: int, has_enough_users: bool
) -> tuple[float | None, float | None, float | None]:
    """Return value, low and high of an arm's recall minus that of the first arm.

    `recalls` is float64 (B + 1, A); row 0 is the data itself.
    """
    difference = recalls[:, arm_index] - recalls[:, 0]
    if arm_index == 0 or np.isnan(difference[0]):
        return None, None, None
    if not has_enough_users:
        return _round_or_none(difference[0]), None, None
    tail = (1 - CONFIDENCE) / 2
    return _round_or_none(difference[0]), *_interval(*np.nanquantile(difference[1:], [tail, 1 - tail]))


def _interval(low: float, high: float) -> tuple[float | None, float | None]:
    """Return the rounded ends, or None for both if they are equal, since equal recall of all users is no certainty."""
    ends = _round_or_none(low), _round_or_none(high)
    return ends if ends[0] != ends[1] else (None, None)


def _round_or_none(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
