"""The split: one cut in time for everybody, and perhaps a share of users held out entirely."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rayrec.artifacts import fingerprint
from rayrec.config import setting
from rayrec.data.histories import Histories, user_hash
from rayrec.errors import InputError, LeakError, NotFoundError
from rayrec.workspace import Workspace, split_file

DAY_MS = 24 * 3600 * 1000


@dataclass(frozen=True, kw_only=True)
class FitRange:
    """The plays that a fit may see. The default, no limit, is for production, where nothing is tested."""

    before: int | None = None  # ms UTC; plays at this moment or later are not to be seen
    held_out_share: float = 0.0  # of all users, by hash
    held_out_seed: int = 0  # which users

    def allowed_users(self, user_ids: np.ndarray) -> np.ndarray:
        """bool (U,): the users who are not held out."""
        if self.held_out_share == 0.0:
            return np.ones(len(user_ids), dtype=bool)
        hashes = user_hash(user_ids, salt=f"held out {self.held_out_seed} ")
        return np.asarray(hashes / 2.0**64 >= self.held_out_share)

    def select(self, histories: Histories) -> Histories:
        """The part of the histories that a fit may see; users with nothing left drop out."""
        return histories.take(self.allowed_users(histories.user_ids)).before(self.before)

    def require(self, histories: Histories) -> None:
        """Raises `LeakError` if the histories hold a play that a fit must not see. Every fit calls it."""
        if self.before is not None and histories.num_plays and histories.played_at.max() >= self.before:
            late = int((histories.played_at >= self.before).sum())
            raise LeakError(
                f"a fit was handed {late} plays at or after its cut {self.before} (ms UTC); "
                "pass the histories through FitRange.select first"
            )
        if self.held_out_share and not self.allowed_users(histories.user_ids).all():
            raise LeakError("a fit was handed users who are held out; pass the histories through FitRange.select first")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Train before `validation_from`, validation before `test_from`, test from there on."""

    id: str
    dataset: str  # id of the data set it cuts
    validation_from: int  # ms UTC
    test_from: int  # ms UTC
    held_out_share: float = 0.0  # of users, by hash, seen by no fit
    held_out_seed: int = 0

    @property
    def has_validation(self) -> bool:
        """False where the validation range is empty."""
        return self.validation_from < self.test_from

    @property
    def selection(self) -> FitRange:
        """What fits may see while settings and epochs are chosen: train alone."""
        return FitRange(
            before=self.validation_from, held_out_share=self.held_out_share, held_out_seed=self.held_out_seed
        )

    @property
    def final(self) -> FitRange:
        """What the final fit may see: train and validation."""
        return replace(self.selection, before=self.test_from)

    @property
    def held_out(self) -> FitRange:
        """All times, users not held out: tells seen from held-out users in the evaluation."""
        return replace(self.selection, before=None)


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How to cut a data set in time."""

    test_days: float = setting(30.0, help="length of the test range, in days from the last play back")
    validation_days: float = setting(7.0, help="length of the validation range before it, in days")
    held_out_users: float = setting(0.0, help="share of users held out entirely, in [0, 1)")
    seed: int = setting(0, help="which users are held out")

    def __post_init__(self) -> None:
        if self.test_days < 0 or self.validation_days < 0:
            raise InputError(
                f"test days {self.test_days} and validation days {self.validation_days} must not be negative"
            )
        if not 0 <= self.held_out_users < 1:
            raise InputError(f"held-out share {self.held_out_users} is not in [0, 1); give a share such as 0.1")


def make_split(config: SplitConfig, *, dataset: str, first_play: int, last_play: int) -> Split:
    """The split of a data set whose plays run from `first_play` to `last_play` (ms UTC).

    Raises `InputError` where no training range is left.
    """
    test_from = last_play + 1 - round(config.test_days * DAY_MS)
    validation_from = test_from - round(config.validation_days * DAY_MS)
    if validation_from <= first_play:
        days = (last_play - first_play) / DAY_MS
        raise InputError(
            f"{config.test_days:g} test and {config.validation_days:g} validation days leave nothing to train on: "
            f"the plays span {days:.1f} days; ask for fewer days"
        )
    return Split(
        id=fingerprint("split", asdict(config), {"dataset": dataset}),
        dataset=dataset,
        validation_from=validation_from,
        test_from=test_from,
        held_out_share=config.held_out_users,
        held_out_seed=config.seed,
    )


def save_split(workspace: Workspace, split: Split) -> None:
    """Write splits/<id>.json."""
    workspace.write_json(split_file(split.id), asdict(split))


def load_split(workspace: Workspace, split_id: str) -> Split:
    """Raises `NotFoundError` where there is no such split."""
    if not workspace.exists(split_file(split_id)):
        raise NotFoundError(f"split {split_id!r} is not in workspace {workspace.uri}; run `rayrec split` first")
    raw: dict[str, Any] = workspace.read_json(split_file(split_id))
    return Split(**raw)


def fit_range(split: Split | None) -> FitRange:
    """What the final fits of a workspace may see: everything where there is no split."""
    return FitRange() if split is None else split.final
