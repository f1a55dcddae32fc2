"""The splits of a workspace: make one, list them, choose the one to work with."""

import numpy as np
import pyarrow.fs as pafs

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.data.split import Split, SplitConfig, load_split, make_split, save_split
from rayrec.errors import InputError, MismatchError
from rayrec.storage.workspace import Workspace


def split_dataset(workspace: Workspace, config: SplitConfig) -> Split:
    """Cut the data set of the workspace and keep the split.

    Raises `InputError` where nothing is left to train on, and for a cut in time of data without times.
    """
    dataset = Dataset(workspace).manifest
    if dataset.times == "positions" and not config.last_fraction:
        raise InputError(
            "the data set has no times, its plays are only in order; cut each user's own plays with --last-fraction 0.2"
        )
    split = make_split(config, dataset=dataset.plays_id, first_play=dataset.first_play, last_play=dataset.last_play)
    save_split(workspace, split)
    return split


def list_splits(workspace: Workspace) -> list[Split]:
    """All splits, the one made (or made again) last at the end."""
    selector = pafs.FileSelector(workspace.full("splits"), allow_not_found=True)
    infos = [info for info in workspace.filesystem.get_file_info(selector) if info.base_name.endswith(".json")]
    infos.sort(key=lambda info: (info.mtime_ns or 0, info.base_name))
    return [load_split(workspace, info.base_name.removesuffix(".json")) for info in infos]


def choose_split(workspace: Workspace, split_id: str | None = None, *, no_split: bool = False) -> Split | None:
    """The named split, else the newest of the data set, else none: fits then use all plays.

    A split that is named may be one of a data set that this one descends from. Raises `NotFoundError`
    for an unknown id and `MismatchError` for a split that does not fit.
    """
    if no_split:
        if split_id is not None:
            raise InputError(f"a split ({split_id}) and no split are both asked for; give --split ID or --no-split")
        return None
    dataset = Dataset(workspace)
    if split_id is None:
        fitting = [split for split in list_splits(workspace) if split.dataset == dataset.manifest.plays_id]
        return fitting[-1] if fitting else None
    split = load_split(workspace, split_id)
    require_split_of(dataset, split)
    return split


def require_split_of(dataset: Dataset, split: Split) -> None:
    """Raise `MismatchError` unless the split cuts the data set, or one that it descends from in time.

    A cut in time stays where it is when plays are appended; one at a share of each user's plays moves,
    and what was learned before the one may be tested behind the other.
    """
    if split.dataset == dataset.manifest.plays_id or (
        split.protocol == "time" and dataset.descends_from(split.dataset)
    ):
        return
    raise MismatchError(
        f"split {split.id} cuts data set {split.dataset}, the workspace holds {dataset.manifest.id}; "
        "run `rayrec split` again"
    )


def validation_histories(dataset: Dataset, split: Split, limit: int) -> Histories:
    """Histories of users with plays in the validation range, in the order of the buckets, nothing after the range.

    Users are taken until those plays are at least `limit`.
    """
    found: list[Histories] = []
    plays = 0
    for histories in dataset.read_all():
        seen = split.final.select(histories)
        recent = np.bincount(seen.rows[split.is_validation(seen)], minlength=len(seen))
        found.append(seen.take(recent > 0))
        plays += int(recent.sum())
        if plays >= limit:
            break
    return concatenate(found)
