"""The split: one cut in time for all users, and optionally a share of users and of songs that are held out entirely.

If the data has no times, each user's history is cut instead. This protocol is weaker: fits see plays of other users
that are later than the predicted plays.
"""

from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow.fs as pafs
from pydantic import Field, model_validator

from rayrec.config import Settings, to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate, user_hash
from rayrec.data.moments import DAY_MS, format_iso, parse_timestamp
from rayrec.data.ragged import offsets_of
from rayrec.errors import InputError, LeakError, MismatchError, NotFoundError
from rayrec.storage.artifacts import DatasetManifest, Manifest, fingerprint, last_requested, make_current
from rayrec.storage.workspace import ID, Workspace, split_file

MIN_TRAINING_SHARE = 0.01  # of all plays
MIN_VALIDATION_DAYS = 7.0  # unless the settings give fewer
MAX_VALIDATION_SHARE = 0.1  # of the time before the test range
VALIDATION_PLAYS = 40_000  # plays that rankers learn from; more plays make better rankers (docs/method.md)
SAMPLED_PLAYS = 1_000_000  # plays of the first buckets, from which the plays per day are estimated
# Limits of `hold_back_validation`; docs/training.md gives the reasons.
HELD_BACK_SHARE, MOST_HELD_BACK = 0.1, 0.2  # shares of all plays
MIN_HELD_BACK = 30  # plays
SHARE_DIGITS = 9  # shares are rounded, so that 1 - 0.2 - 0.1 is 0.7

# Folder in an artifact: the network or retrieval fitted without the validation range, or the rankers trained without
# the held-out users.
SELECTION_FOLDER = "selection"

Protocol = Literal["time", "last-fraction"]
WEAKER = "weaker than a split in time: training sees later plays of other users"
LIMIT_DATA = "a model of your own must be given what FitRange.select returns; for one of rayrec's, report this bug"


@dataclass(frozen=True, kw_only=True)
class FitRange:
    """The plays that a fit may see. The default, no limit, is for production, where nothing is tested."""

    before: int | None = None  # ms UTC; the fit may not see plays at this moment or later
    share: float | None = None  # the fit may see the first floor(n · share + 1/2) of each user's n plays
    held_out_share: float = 0.0  # share of all users, by hash
    held_out_seed: int = 0  # selects the users and songs that are held out
    held_out_songs: float = 0.0  # share of all songs, by hash

    def allowed_songs(self, songs: np.ndarray) -> np.ndarray:
        """bool (P,): the songs, int rows, that are not held out."""
        if self.held_out_songs == 0.0:
            return np.ones(len(songs), dtype=bool)
        salt = np.uint64((self.held_out_seed & 0xFFFFFFFF) << 32)  # of a larger seed the lower 32 bits count
        salted = np.asarray(songs).astype(np.uint64) + salt
        return np.asarray(pd.util.hash_array(salted) / 2.0**64 >= self.held_out_songs)

    def allowed_users(self, user_ids: np.ndarray) -> np.ndarray:
        """bool (U,): the users who are not held out."""
        if self.held_out_share == 0.0:
            return np.ones(len(user_ids), dtype=bool)
        hashes = user_hash(user_ids, salt=f"held out {self.held_out_seed} ")
        return np.asarray(hashes / 2.0**64 >= self.held_out_share)

    def covers(self, histories: Histories) -> np.ndarray:
        """bool (P,): the plays before the cut, including those of held-out users and songs.

        The number of a user's plays is taken from `totals`; without it the plays are counted, and the histories must be
        whole. Plays of held-out songs do not count in this number, nor in the positions of other plays.
        """
        is_covered: np.ndarray = np.ones(histories.num_plays, dtype=bool)
        if self.before is not None:
            is_covered &= histories.played_at < self.before
        if self.share is not None:
            positions, counts = self._positions_and_counts(histories)
            totals = counts if histories.totals is None else histories.totals
            fit_counts = np.floor(totals * self.share + 0.5).astype(np.int64)
            is_covered &= positions < np.repeat(fit_counts, histories.lengths)
        return is_covered

    def _positions_and_counts(self, histories: Histories) -> tuple[np.ndarray, np.ndarray]:
        """int64 (P,) and (U,): each play's position and each user's number of plays, without those of held-out songs.

        Positions count from 0 within a user's history.
        """
        if self.held_out_songs == 0.0:
            return histories.places, histories.lengths
        counts_before = offsets_of(self.allowed_songs(histories.songs))
        starts = counts_before[histories.offsets[:-1]]
        return counts_before[:-1] - np.repeat(starts, histories.lengths), counts_before[histories.offsets[1:]] - starts

    def select(self, histories: Histories) -> Histories:
        """Return the plays that a fit may see; users without such plays are left out.

        With a `share`, the result has `totals`, the number of all plays of each user, which `require` needs.
        """
        allowed = histories.take(self.allowed_users(histories.user_ids))
        if self.share is not None and allowed.totals is None:
            allowed = replace(allowed, totals=self._positions_and_counts(allowed)[1])
        selected = allowed.keep(self.covers(allowed) & self.allowed_songs(allowed.songs))
        selected = selected.take(selected.lengths > 0)
        return (
            selected
            if selected.likes is None
            else replace(selected, likes=selected.likes.keep(self._covers_likes(selected)))
        )

    def _covers_likes(self, histories: Histories) -> np.ndarray:
        """bool (K,): the likes of songs not held out, before the cut; with a `share` not after the user's last play."""
        likes = histories.likes
        assert likes is not None
        assert histories.lengths.all()
        is_covered = self.allowed_songs(likes.songs)
        if self.before is not None:
            is_covered &= likes.played_at < self.before
        if self.share is not None:
            is_covered &= likes.played_at <= histories.played_at[histories.offsets[1:] - 1][likes.rows]
        return is_covered

    def is_within(self, other: "FitRange") -> bool:
        """True if `other` covers every play that this range covers.

        The two ranges must belong to one data set or, for cuts in time, to data sets that descend from each other.
        """
        in_time = other.before is None or (self.before is not None and self.before <= other.before)
        in_share = other.share is None or (self.share is not None and self.share <= other.share)
        held_out_users, other_held_out_users = ((fit.held_out_share, fit.held_out_seed) for fit in (self, other))
        held_out_songs, other_held_out_songs = ((fit.held_out_songs, fit.held_out_seed) for fit in (self, other))
        in_users = other.held_out_share == 0.0 or held_out_users == other_held_out_users
        return (
            in_time
            and in_share
            and in_users
            and (other.held_out_songs == 0.0 or held_out_songs == other_held_out_songs)
        )

    def require(self, histories: Histories) -> None:
        """Raise `LeakError` if the histories hold a play that a fit must not see. Every fit calls this method.

        With a `share`, histories that are already cut do not show how many plays a user has. They must therefore have
        the `totals` that `select` adds.
        """
        if self.share is not None and histories.num_plays and histories.totals is None:
            raise LeakError(f"training data lacks the total number of plays per user; {LIMIT_DATA}")
        late_plays = int((~self.covers(histories)).sum())
        if late_plays:
            cut = f"{self.before} (ms UTC)" if self.share is None else f"{self.share:.3g} (of each user's plays)"
            raise LeakError(f"training data holds {late_plays} plays at or after its cut {cut}; {LIMIT_DATA}")
        if self.held_out_share and not self.allowed_users(histories.user_ids).all():
            raise LeakError(f"training data holds users who are held out; {LIMIT_DATA}")
        if not self.allowed_songs(histories.songs).all():
            raise LeakError(f"training data holds songs that are held out; {LIMIT_DATA}")
        if histories.likes is not None and not self._covers_likes(histories.take(histories.lengths > 0)).all():
            raise LeakError(f"training data holds likes at or after its cut; {LIMIT_DATA}")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training plays before `validation_from`, validation plays before `test_from`, test plays from then on.

    With the protocol `last-fraction`, the plays of each user are cut by position in the same way.
    """

    id: str
    dataset: str  # id of the data set that is split
    validation_from: int | None = None  # ms UTC; None with last-fraction
    test_from: int | None = None  # ms UTC; None with last-fraction
    held_out_share: float = 0.0  # share of all users, by hash, whose plays no fit sees
    held_out_seed: int = 0
    held_out_songs: float = 0.0  # share of all songs, by hash, whose plays no fit sees
    protocol: Protocol = "time"
    last_fraction: float | None = None  # test share of each user's plays
    validation_fraction: float | None = None  # validation share of each user's plays, before the test share
    has_test: bool = True  # False: the test range held no plays, so that final fits saw all plays of that time

    @property
    def has_validation(self) -> bool:
        """False if the validation range is empty."""
        return self.selection != self.final

    @property
    def selection(self) -> FitRange:
        """The plays that fits may see while settings and epochs are chosen: the training range."""
        share = self._share_without((self.last_fraction or 0.0) + (self.validation_fraction or 0.0))
        return replace(self.held_out, before=self.validation_from, share=share)

    @property
    def final(self) -> FitRange:
        """The plays that the final fit may see: the training and the validation range."""
        return replace(self.held_out, before=self.test_from, share=self._share_without(self.last_fraction or 0.0))

    @property
    def held_out(self) -> FitRange:
        """All plays of users and songs that are not held out; the evaluation uses it to identify held-out users."""
        return FitRange(
            held_out_share=self.held_out_share, held_out_seed=self.held_out_seed, held_out_songs=self.held_out_songs
        )

    def is_test(self, histories: Histories) -> np.ndarray:
        """bool (P,): the plays of the test range, including those of held-out users. Needs whole histories."""
        return np.asarray(~self.final.covers(histories))

    def is_validation(self, histories: Histories) -> np.ndarray:
        """bool (P,): the plays of the validation range. Needs whole histories, or the result of `FitRange.select`."""
        return np.asarray(self.final.covers(histories) & ~self.selection.covers(histories))

    def validation_as_test(self) -> "Split":
        """Return a split whose test range is the validation range of this split and all plays after it."""
        if self.protocol == "time":
            return replace(self, test_from=self.validation_from)
        fraction = (self.last_fraction or 0.0) + (self.validation_fraction or 0.0)
        return replace(self, last_fraction=fraction, validation_fraction=0.0)

    def figures(self) -> dict[str, Any]:
        """Return where the split cuts, as plain values for outputs: moments in ms UTC, or fractions."""
        if self.protocol == "time":
            return {"validation_from": self.validation_from, "test_from": self.test_from}
        return {
            "protocol": self.protocol,
            "last_fraction": self.last_fraction,
            "validation_fraction": self.validation_fraction,
        }

    @property
    def test_range(self) -> str:
        """The test range in words."""
        if self.test_from is not None:
            day = datetime.fromtimestamp(self.test_from / 1000, timezone.utc).date().isoformat()
            return f"the plays from {day} on, UTC"
        return f"the last {self.last_fraction:.3g} of each user's plays ({WEAKER})"

    @property
    def validation_range(self) -> str:
        """The validation range in words."""
        if self.validation_from is not None:
            end = (
                f"up to but not including {_day(self.test_from)}"
                if self.has_test and self.test_from is not None
                else "on"
            )
            return f"the plays from {_day(self.validation_from)} {end}, UTC"
        before_test = f" before the last {self.last_fraction:.3g}" if self.last_fraction else ""
        return f"the last {self.validation_fraction:.3g} of each user's plays{before_test}"

    def _share_without(self, fraction: float) -> float | None:
        return None if self.protocol == "time" else round(1.0 - fraction, SHARE_DIGITS)


class SplitConfig(Settings):
    """How to split a data set: in time or, if `last_fraction` is above 0, within each user's history."""

    test_days: float = Field(30.0, ge=0, description="Length of the test range at the end of the data, in days")
    validation_days: float | None = Field(
        None,
        ge=0,
        description="Length of the validation range before the test range, in days. Default: as many days as hold "
        "40,000 plays, but at least 7 and at most a tenth of the time before the test range",
    )
    last_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Test share at the end of each user's plays, instead of --test-days; weaker than a split in time",
    )
    validation_fraction: float = Field(
        0.1, ge=0, lt=1, description="Validation share of each user's plays, before the test share"
    )
    held_out_users: float = Field(0.0, ge=0, lt=1, description="Share of users held out of training entirely")
    held_out_songs: float = Field(
        0.0, ge=0, lt=1, description="Share of songs whose plays are left out of training entirely"
    )
    seed: int = Field(0, ge=0, description="Random seed of the held-out users and songs")

    @model_validator(mode="after")
    def _check_fractions(self) -> "SplitConfig":
        if self.last_fraction + self.validation_fraction >= 1:
            raise ValueError(
                f"--last-fraction {self.last_fraction:g} and --validation-fraction {self.validation_fraction:g} leave "
                "nothing to train on; expected a sum below 1"
            )
        return self


def make_split(config: SplitConfig, *, dataset: str, first_play: int, last_play: int) -> Split:
    """Return the split of a data set whose plays are from `first_play` to `last_play` (ms UTC).

    Raises `InputError` if no training range is left.
    """
    if config.last_fraction:
        return _last_fraction_split(config, dataset)
    test_from = last_play + 1 - round(config.test_days * DAY_MS)
    validation_days = MIN_VALIDATION_DAYS if config.validation_days is None else config.validation_days
    validation_from = test_from - round(validation_days * DAY_MS)
    if validation_from <= first_play:
        days = (last_play - first_play) / DAY_MS
        raise InputError(
            f"{config.test_days:g} test and {validation_days:g} validation days leave nothing to train on: "
            f"the plays span {days:.1f} days; use fewer --test-days or --validation-days"
        )
    return Split(
        id=_split_id(config, dataset, ("test_days", "validation_days")),
        dataset=dataset,
        validation_from=validation_from,
        test_from=test_from,
        held_out_share=config.held_out_users,
        held_out_seed=config.seed,
        held_out_songs=config.held_out_songs,
    )


def _last_fraction_split(config: SplitConfig, dataset: str) -> Split:
    return Split(
        id=_split_id(config, dataset, ("last_fraction", "validation_fraction")),
        dataset=dataset,
        held_out_share=config.held_out_users,
        held_out_seed=config.seed,
        held_out_songs=config.held_out_songs,
        protocol="last-fraction",
        last_fraction=config.last_fraction,
        validation_fraction=config.validation_fraction,
    )


def _split_id(config: SplitConfig, dataset: str, cut_settings: tuple[str, str]) -> str:
    """Return the id of a split, computed from its settings without those of the other protocol."""
    settings = {
        name: value
        for name, value in to_mapping(config).items()
        if name in (*cut_settings, "held_out_users", "held_out_songs", "seed")
    }
    return fingerprint("split", settings, {"dataset": dataset})


def save_split(workspace: Workspace, split: Split) -> None:
    """Write splits/<id>.json."""
    workspace.write_json(split_file(split.id), asdict(split))


def load_split(workspace: Workspace, split_id: str) -> Split:
    """Return a stored split. Raises `NotFoundError` if it does not exist, as for a path in place of an id."""
    if not (ID.fullmatch(split_id) and workspace.exists(split_file(split_id))):
        raise NotFoundError(f"split {split_id!r} not found in workspace {workspace.uri}; run `rayrec split` first")
    raw: dict[str, Any] = workspace.read_json(split_file(split_id))
    return Split(**raw)


def split_flag(split_id: str | None) -> str:
    """Return a space and the command-line flag that selects this split, or no split if `split_id` is empty."""
    return f" --split {split_id}" if split_id else " --no-split"


def fit_range_of(dataset: Dataset, artifact: Manifest) -> FitRange:
    """Return the plays that an artifact of `dataset`, or of a data set that it descends from, was fitted on.

    Without a split, these are all plays up to the last play of the artifact's own data set or, if the data has no
    times, all plays of every user. Plays with times after the import are not counted, see `end_of_plays`.
    """
    if "split" in artifact.inputs:
        return _fitted_range(load_split(dataset.workspace, artifact.inputs["split"]), artifact)
    fitted_dataset = dataset.earlier(artifact.inputs["dataset"])
    return FitRange(before=end_of_plays(fitted_dataset)) if fitted_dataset.times == "real" else FitRange(share=1.0)


def _fitted_range(split: Split, artifact: Manifest) -> FitRange:
    """Return the plays that an artifact made with a split was fitted on.

    A network without a refit comes from the selection phase. Artifacts for which nothing was selected have only a final
    phase.
    """
    has_selection = any(name.startswith(f"{SELECTION_FOLDER}/") for name in artifact.files)
    return split.selection if has_selection and not artifact.config.get("refit", True) else split.final


def describe_unseen_plays(workspace: Workspace, artifact: Manifest) -> str:
    """Return in words the plays of its data set that an artifact was not fitted on; empty if it was fitted on all."""
    return (
        _describe_unseen(load_split(workspace, artifact.inputs["split"]), artifact)
        if "split" in artifact.inputs
        else ""
    )


def _describe_unseen(split: Split, artifact: Manifest) -> str:
    if _fitted_range(split, artifact) != split.final:
        return split.validation_as_test().test_range
    return split.test_range if split.has_test else ""


def describe_training_plays(workspace: Workspace, artifact: Manifest) -> str:
    """Return in words the plays that an artifact was fitted on."""
    if "split" not in artifact.inputs:
        return "all plays"
    split = load_split(workspace, artifact.inputs["split"])
    if artifact.kind == "rankers":
        return f"{split.validation_range} (split {split.id})"
    if unseen_plays := _describe_unseen(split, artifact):
        return f"all plays except {unseen_plays} (split {split.id})"
    return f"all plays, with settings chosen on {split.validation_range} (split {split.id})"


def fit_range(split: Split | None) -> FitRange:
    """Return the plays that final fits may see: all plays if there is no split, or one without a test range."""
    return split.final if split is not None and split.has_test else FitRange()


def split_dataset(workspace: Workspace, config: SplitConfig) -> Split:
    """Split the data set of the workspace, store the split and make it the current one.

    Raises `InputError` if no plays are left to train on, and for a split in time of data without times.
    """
    dataset = Dataset(workspace).manifest
    if dataset.times == "positions" and not config.last_fraction:
        raise InputError(
            "the data set has no times, only the order of plays; split each user's plays with --last-fraction 0.2"
        )
    if not config.last_fraction and config.validation_days is None:
        config = config.replace(validation_days=_validation_days(Dataset(workspace), config.test_days))
    split = make_split(config, dataset=dataset.plays_id, first_play=dataset.first_play, last_play=dataset.last_play)
    if split.protocol == "time":
        _require_training_plays(workspace, split)
    save_split(workspace, split)
    make_current(workspace, "splits", split.id)
    return split


def hold_back_validation(dataset: Dataset, *, since: int | None = None) -> Split | None:
    """Store and return a split with the newest plays for validation and no test range; None if they are too few.

    For models that go live: all choices are made on this range, and then all models are fitted again on all plays. The
    range holds 40,000 plays or a tenth of all, whichever is less. It is extended to at least 7 days, and holds at most
    a fifth of all plays. With `since` (ms UTC) it begins at the median moment of the plays from `since` on, or later.
    It ends at `end_of_plays`: plays with later times are of wrong clocks, and only the final fits learn from them.
    Without times it is the last tenth of each user's plays.
    """
    manifest = dataset.manifest
    if manifest.plays * HELD_BACK_SHARE < MIN_HELD_BACK:
        return None
    if manifest.times == "positions":
        split = _held_back_split(
            dataset, protocol="last-fraction", last_fraction=0.0, validation_fraction=HELD_BACK_SHARE
        )
    else:
        end, timestamps = end_of_plays(manifest), _sample_timestamps(dataset)
        timestamps = timestamps[timestamps < end]
        if not len(timestamps):
            return None
        usual_share = min(HELD_BACK_SHARE, VALIDATION_PLAYS / manifest.plays)
        earliest_start, latest_start = (
            int(np.quantile(timestamps, 1 - share, method="lower")) for share in (MOST_HELD_BACK, usual_share)
        )
        start = max(earliest_start, min(latest_start, end - round(MIN_VALIDATION_DAYS * DAY_MS)))
        if since is not None:
            new_timestamps = timestamps[timestamps >= since]
            start = max(start, int(np.median(new_timestamps)) if len(new_timestamps) else end)
        held_back_plays = np.count_nonzero(timestamps >= start) * manifest.plays / len(timestamps)
        if start <= manifest.first_play or held_back_plays < MIN_HELD_BACK:
            return None
        split = _held_back_split(dataset, validation_from=start, test_from=end)
    save_split(dataset.workspace, split)
    make_current(dataset.workspace, "splits", split.id)
    return split


def end_of_plays(dataset: DatasetManifest) -> int:
    """Return the moment (ms UTC) after the last play of a data set, but not after the import of the plays.

    Imports accept times up to a day ahead; one device with a wrong clock must not move the end of the data by a day.
    The plays of a generated world may lie in the future.
    """
    if dataset.source == "generated" or not dataset.created_at:
        return dataset.last_play + 1
    return min(dataset.last_play, parse_timestamp(dataset.created_at)) + 1


def no_validation_reason(dataset: Dataset) -> str:
    """Return why `hold_back_validation` holds back none of the plays of a data set."""
    manifest = dataset.manifest
    if manifest.plays * HELD_BACK_SHARE < MIN_HELD_BACK:
        return f"{manifest.plays:,} plays are too few for a validation range"
    # The range would begin at the first play, so at least 1 - MOST_HELD_BACK of the plays are at its time.
    return (
        f"no validation range can be cut off, because nearly all of the {manifest.plays:,} plays have the same time, "
        f"{format_iso(manifest.first_play)} (check that this is the time of the plays)"
    )


def _held_back_split(dataset: Dataset, **cuts: Any) -> Split:
    plays_id = dataset.manifest.plays_id
    split_id = fingerprint("split", {"held_back": cuts}, {"dataset": plays_id})
    return Split(id=split_id, dataset=plays_id, has_test=False, **cuts)


def _sample_timestamps(dataset: Dataset) -> np.ndarray:
    """int64: the moments (ms UTC) of about `SAMPLED_PLAYS` plays of the first buckets.

    A hash assigns users to buckets, so the first buckets are a random sample of the users.
    """
    parts: list[np.ndarray] = []
    for bucket in range(dataset.manifest.buckets):
        parts += [histories.played_at for histories in dataset.read_bucket(bucket)]
        if sum(map(len, parts)) >= SAMPLED_PLAYS:
            break
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _validation_days(dataset: Dataset, test_days: float) -> float:
    """Return the number of days before the test range that hold `VALIDATION_PLAYS` plays, within limits.

    Plays per day are estimated from the first buckets.
    """
    manifest = dataset.manifest
    test_from = manifest.last_play + 1 - round(test_days * DAY_MS)
    max_days = int(MAX_VALIDATION_SHARE * (test_from - manifest.first_play) / DAY_MS)
    if max_days <= MIN_VALIDATION_DAYS:
        return MIN_VALIDATION_DAYS
    timestamps = _sample_timestamps(dataset)
    days = (test_from - 1 - timestamps) // DAY_MS  # 0: the last day before the test range
    plays_per_day = (
        np.bincount(days[(days >= 0) & (days < max_days)], minlength=max_days)
        * manifest.plays
        / max(1, len(timestamps))
    )
    needed_days = np.searchsorted(np.cumsum(plays_per_day), VALIDATION_PLAYS) + 1
    return float(np.clip(needed_days, MIN_VALIDATION_DAYS, max_days))


def _require_training_plays(workspace: Workspace, split: Split) -> None:
    """Raise `InputError` if the training range holds less than 1 % of the plays.

    The range begins at the first play, so that a single play with a wrong date makes it look long.
    """
    assert split.validation_from is not None  # for the type checker: `make_split` sets it for a split in time
    dataset = Dataset(workspace)
    early_plays, later_plays, first_later_play = 0, 0, dataset.manifest.last_play
    for histories in dataset.read_all():
        is_early = histories.played_at < split.validation_from
        early_plays += int(is_early.sum())
        later_plays += int((~is_early).sum())
        if early_plays >= MIN_TRAINING_SHARE * dataset.manifest.plays:
            return  # usually in the first buckets
        first_later_play = min(first_later_play, histories.played_at[~is_early].min(initial=first_later_play))
    if later_plays:
        raise InputError(
            f"the training range, before {_day(split.validation_from)}, holds {early_plays:,} of "
            f"{early_plays + later_plays:,} plays: the first play is from {_day(dataset.manifest.first_play)}, "
            f"the others are from {_day(first_later_play)} or later; use fewer --test-days and --validation-days, or "
            "remove plays with wrong dates from the files and import them again with --force"
        )


def _day(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, timezone.utc).date().isoformat()


def list_splits(workspace: Workspace) -> list[Split]:
    """Return all splits, sorted by the time of their last request."""
    selector = pafs.FileSelector(workspace.full("splits"), allow_not_found=True)
    infos = [info for info in workspace.filesystem.get_file_info(selector) if info.base_name.endswith(".json")]
    infos.sort(key=lambda info: (info.mtime_ns or 0, info.base_name))
    return [load_split(workspace, info.base_name.removesuffix(".json")) for info in infos]


def choose_split(workspace: Workspace, split_id: str | None = None, *, no_split: bool = False) -> Split | None:
    """Return the split `split_id`, by default the most recently requested one of the data set, or None if none exists.

    With None, fits use all plays. A split in time remains valid when plays are appended to its data set: the new plays
    are in its test range. Raises `NotFoundError` for an unknown id, and `MismatchError` for a split of other data.
    """
    if no_split:
        if split_id is not None:
            raise InputError(f"--split {split_id} and --no-split cannot be combined; pass one of them")
        return None
    dataset = Dataset(workspace)
    if split_id is None:
        matching = {split.id: split for split in list_splits(workspace) if holds_for(dataset, split)}
        last_id = last_requested(workspace, "splits", list(matching))
        return None if last_id is None else matching[last_id]
    split = load_split(workspace, split_id)
    require_split_of(dataset, split)
    return split


def holds_for(dataset: Dataset, split: Split) -> bool:
    """True if the split is of the data set or, in time, of one that it descends from.

    A cut in time does not move when plays are appended. A cut at a share of each user's plays moves: plays before one
    cut, which fits have seen, may then be after the other cut, in the test range.
    """
    return split.dataset == dataset.manifest.plays_id or (
        split.protocol == "time" and dataset.descends_from(split.dataset)
    )


def require_split_of(dataset: Dataset, split: Split) -> None:
    """Raise `MismatchError` unless the split holds for the data set."""
    if holds_for(dataset, split):
        return
    raise MismatchError(
        f"split {split.id} belongs to data set {split.dataset}, but the workspace holds {dataset.manifest.id}; "
        "run `rayrec split` again"
    )


def validation_histories(dataset: Dataset, split: Split, limit: int) -> Histories:
    """Return the histories, up to the end of the validation range, of users with plays in that range.

    Buckets are read as a whole, in their order, until they have at least `limit` plays in the validation range: within
    a bucket users are sorted by id, so the first are no random sample.
    """
    selected: list[Histories] = []
    plays = 0
    for bucket in range(dataset.manifest.buckets):
        for histories in dataset.read_bucket(bucket):
            final_histories = split.final.select(histories)
            validation_counts = np.bincount(
                final_histories.rows[split.is_validation(final_histories)], minlength=len(final_histories)
            )
            selected.append(final_histories.take(validation_counts > 0))
            plays += int(validation_counts.sum())
        if plays >= limit:
            break
    return concatenate(selected)
