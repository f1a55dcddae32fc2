"""Makes a release with new plays, and makes it live after a comparison with the live one on the newest plays."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrec.config import from_mapping
from rayrec.data.dataset import Dataset, read_files
from rayrec.data.moments import format_iso
from rayrec.data.split import (
    SELECTION_FOLDER,
    FitRange,
    Split,
    end_of_plays,
    fit_range,
    hold_back_validation,
    load_split,
)
from rayrec.errors import InputError, MismatchError
from rayrec.importing.import_plan import ImportConfig, import_notes
from rayrec.importing.import_run import ImportResult
from rayrec.importing.inspection import describe_import, guess_format, guess_import
from rayrec.importing.merging import PARTS_BEFORE_COMPACT
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.tabular import roles
from rayrec.importing.staging import finish_publishing
from rayrec.jobs.add_songs import added_since
from rayrec.jobs.compact import compact
from rayrec.jobs.fit import Quality, ServedParts, fit_models, measure_quality, selection_parts, stage_configs
from rayrec.jobs.import_data import append_plays
from rayrec.jobs.job_config import UpdateConfig
from rayrec.jobs.pipeline import Outcome, ReleaseConfig, Stages
from rayrec.jobs.runtime import ray_cluster
from rayrec.model.added_songs import AddedSongs
from rayrec.model.train_config import TasteConfig
from rayrec.online.load_states import LoadResult, load_states
from rayrec.online.state_store import open_user_store
from rayrec.recommend.baselines import PopularityRecommender
from rayrec.recommend.index import IndexConfig, require_one_faiss
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.two_step_config import RetrievalConfig
from rayrec.storage import artifacts
from rayrec.storage.artifacts import DatasetManifest, Manifest
from rayrec.storage.locking import writes
from rayrec.storage.releases import (
    VALIDATION,
    activate_release,
    active_release,
    list_releases,
    read_active,
    require_dataset_of,
)
from rayrec.storage.workspace import Workspace

TOLERANCE = 0.005  # recall@20 as served may be this much lower than the live release's
MIN_QUERIES = 30  # fewer queries as served are no comparison
USERS_PER_READ = 5_000
LIVE, NEW = "live", "new"


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """The result of an update."""

    outcomes: list[Outcome]
    appended: ImportResult  # counts of the import
    # Numbers beyond those of the data set of the live release: also of plays that a killed run had appended.
    new_plays: int
    new_users: int
    new_songs: int
    trained: bool
    release: str  # id of the new release, or of the live one if no play is new
    live: bool  # True if this release is live now
    reason: str  # why it is live or not
    quality: Quality | None = None  # quality of the models `new` and `live` on the newest plays
    states: LoadResult | None = None  # the states that were loaded into the store

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "new_plays": self.new_plays,
            "new_users": self.new_users,
            "new_songs": self.new_songs,
            "merged": self.appended.merged,
            "import": dict(self.appended.last_import),
            "trained": self.trained,
            "release": self.release,
            "live": self.live,
            "reason": self.reason,
            "check": None if self.quality is None else self.quality.to_mapping(),
            "states": None if self.states is None else {"users": self.states.users},
            "stages": [outcome.to_mapping() for outcome in self.outcomes],
        }


@writes("update")
def update(
    workspace: Workspace,
    config: UpdateConfig,
    *,
    on_stage: Callable[[Outcome], None] = lambda outcome: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> UpdateResult:
    """Append plays and create a release that covers them; make it live unless it is worse than the live one.

    Taste vectors and retrieval then cover the new plays, users and songs. If more than `train_share` of all plays are
    newer than the model, or with `train`, its training continues and the rankers are trained again. The new release is
    compared with the live one on the newest plays: for this it is fitted without them. It does not go live if its
    recall@20 as served is lower than the live release's by more than 0.005; with an unchanged model, only if it is
    lower by more than chance, too: the 95 % interval of the difference lies below 0. With fewer than 30 queries to
    compare on, a release with the same model goes live without a comparison. A release that was rolled back does not
    go live again by an update. The states are loaded into `store`, or into the workspace's own store if there is one.

    Settings that are not given are those of the first import: the columns, as far as the files have them, the time zone
    of times without one, the share of a song below which a play counts as skipped, and the user ID, if all imports of
    this format had the same. The first import's minimum plays of users and songs do not apply: an append would count
    plays within its own files only, and leave out users with few plays per day.

    `on_stage` is called after each stage, `on_note` with texts about guessed settings, rejected rows and new plays.
    Raises `MissingDependencyError` without faiss, `InputError` if no release is live and for files that cannot be read,
    `MismatchError` if the data set of the live release was replaced, and `TooManyRejectedError` if more rows are
    rejected than `max_rejected` allows.
    """
    require_one_faiss()  # before any work
    live_release = active_release(workspace)
    if live_release is None:
        raise InputError(f"workspace {workspace.uri} has no live release; run `rayrec fit` first")
    finish_publishing(workspace)  # the data set of a killed import may replace that of the live release
    require_dataset_of(workspace, live_release)
    import_config = _import_config(config, Dataset(workspace).manifest, on_note)
    on_note(f"Reading as {describe_import(import_config)}")
    with ray_cluster():
        import_result = append_plays(workspace, import_config)
        for message in import_notes(import_result.last_import):
            on_note(message)
        dataset = Dataset(workspace)
        new_counts = _new_counts(dataset, live_release)
        if dataset.manifest.plays_id == dataset.earlier(live_release.inputs["dataset"]).plays_id:
            reason = "no play is newer than the live release"
            return UpdateResult(
                outcomes=[],
                appended=import_result,
                trained=False,
                release=live_release.id,
                live=True,
                reason=reason,
                **new_counts,
            )
        on_note(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in new_counts.items()))
        return _Update(dataset, live_release, on_stage, on_note).run(import_result, config)


def _import_config(config: UpdateConfig, manifest: DatasetManifest, on_note: Callable[[str], None]) -> ImportConfig:
    """Return the settings to read the files: those of the first import of plays, unless `config` gives others."""
    first_import: Any = manifest.config.get("plays")
    if not isinstance(first_import, dict):  # the plays were generated
        first_import = {}
    was_mapped = "format" in first_import and FORMATS[first_import["format"]].mapped
    format_name = config.format or guess_format(config.paths)
    imports: list[Any] = [
        earlier_import
        for earlier_import in (first_import, *manifest.appended)
        if earlier_import.get("format") == format_name
    ]
    user_ids = {earlier_import["user"] for earlier_import in imports}
    # With several users, the user of these files is unknown.
    earlier_user = user_ids.pop() if len(user_ids) == 1 else ""
    import_config = guess_import(
        config.paths,
        format_name=format_name,
        columns=config.columns,
        earlier_columns={role: first_import["columns"].get(role, role) for role in roles(False)} if was_mapped else {},
        user=earlier_user if config.user is None else config.user,
        timezone=config.timezone or "UTC",
        on_note=on_note,
    )
    import_config = import_config.replace(skip_below=manifest.skip_below)
    if config.timezone is None and FORMATS[import_config.format].mapped:
        import_config = import_config.replace(timezone=first_import.get("timezone", import_config.timezone))
    if config.user is None and import_config.columns.get("user"):  # these files name users, unlike the earlier ones
        import_config = import_config.replace(user="")
    return import_config if config.max_rejected is None else import_config.replace(max_rejected=config.max_rejected)


def _new_counts(dataset: Dataset, live_release: Manifest) -> dict[str, Any]:
    """Return the numbers of plays, users and songs of the data set that the live release's data set lacks.

    The keys are those of `UpdateResult`. A number is 0 if more were deleted since than added.
    """
    live_dataset = dataset.earlier(live_release.inputs["dataset"])
    return {
        f"new_{name}": max(0, getattr(dataset.manifest, name) - getattr(live_dataset, name))
        for name in ("plays", "users", "songs")
    }


class _Update:
    """One update of a live release to the plays of a data set."""

    def __init__(
        self,
        dataset: Dataset,
        live_release: Manifest,
        on_stage: Callable[[Outcome], None],
        on_note: Callable[[str], None],
    ) -> None:
        self.dataset = dataset
        self.workspace = dataset.workspace
        self.live_release = live_release
        self.on_note = on_note
        self.stages = Stages(dataset.workspace, on_stage=on_stage)
        self.model = artifacts.load_manifest(dataset.workspace, "models", live_release.inputs["models"])
        self.retrieval, self.rankers, self.added_songs = (
            artifacts.load_manifest(dataset.workspace, kind, live_release.inputs[kind])
            if kind in live_release.inputs
            else None
            for kind in ("retrieval", "rankers", "added_songs")
        )

    def run(self, import_result: ImportResult, config: UpdateConfig) -> UpdateResult:
        stages, workspace = self.stages, self.workspace
        new_counts = _new_counts(self.dataset, self.live_release)
        unseen_from = self._unseen_from()
        stages.split = hold_back_validation(self.dataset, since=unseen_from)
        new_share = self._share_of_new_plays()
        is_trained = config.train or new_share > config.train_share
        if is_trained and stages.split is None:
            self.on_note("Too few new plays to validate a model: the model stays unchanged")
            is_trained = False
        if is_trained:
            self.on_note(f"{new_share:.1%} of the plays are newer than the model: its training continues")
            self._train()
        else:
            self._keep_model()
        self.dataset = Dataset(workspace)  # described songs have come into its catalog
        quality = self._measure_quality(is_trained)
        if is_trained and quality is None:
            self.on_note(f"The trained model cannot be compared on {MIN_QUERIES} queries: the model stays unchanged")
            is_trained = False
            stages.artifact_ids.clear()
            self._keep_model()
            quality = self._measure_quality(is_trained)
        if quality is not None:
            model_name = "two-step" if "rank" in stages.artifact_ids else "taste"
            stages.release_metrics = {VALIDATION: quality.summary(NEW, model_name)}
        is_accepted, reason = decide(quality, unseen_from, is_trained=is_trained)
        for name, settings in (("taste", TasteConfig()), ("index", IndexConfig())):
            stages.run(name, settings)
        stages.run("release", ReleaseConfig(activate=False))
        release = artifacts.load_manifest(workspace, "releases", stages.artifact_ids["release"])
        if is_accepted and self._was_rolled_back(release):
            is_accepted, reason = False, "it was rolled back"
        states = None
        if is_accepted:
            states = self._load_states(release, config.store)
            activate_release(workspace, release.id)
        if len(self.dataset.manifest.spans) > PARTS_BEFORE_COMPACT:
            compact(workspace)
        return UpdateResult(
            outcomes=stages.outcomes,
            appended=import_result,
            trained=is_trained,
            release=release.id,
            live=is_accepted,
            reason=reason,
            quality=quality,
            states=states,
            **new_counts,
        )

    def _was_rolled_back(self, release: Manifest) -> bool:
        """Return whether a release of the same model and plays was rolled back and not activated since.

        Its id may be another one, because compaction changes the id of the data set.
        """
        rolled_back = read_active(self.workspace)["rolled_back"]
        return any(
            other.id in rolled_back
            and other.inputs["models"] == release.inputs["models"]
            and self.dataset.plays_id_of(other.inputs["dataset"]) == self.dataset.manifest.plays_id
            for other in list_releases(self.workspace)
        )

    def _unseen_from(self) -> int:
        """Return the moment (ms UTC) from which on no part of the live release has seen a play with a right time."""
        unseen_starts = []
        for part in filter(None, (self.model, self.retrieval)):
            test_start = self._fit_range_of(part).before  # None without a test range: it saw all plays
            unseen_starts.append(
                end_of_plays(self.dataset.earlier(part.inputs["dataset"])) if test_start is None else test_start
            )
        return max(unseen_starts)

    def _seen_users(self, since: int) -> np.ndarray:
        """object (U,): the users with plays from `since` (ms UTC) on that a part of the live release may have seen.

        These plays have times ahead of their import. If the files of seen plays also hold new ones, the new ones count
        as seen.
        """
        parts = [part for part in (self.model, self.retrieval) if part and self._fit_range_of(part).before is None]
        datasets = [self.dataset.earlier(part.inputs["dataset"]) for part in parts]
        seen_parts = max((seen.parts for seen in datasets if seen.last_play >= since), default=0)
        manifest = self.dataset.manifest
        paths = [
            path
            for first, last in manifest.spans
            if first < seen_parts and max(end for _, end in manifest.part_times[first : last + 1]) >= since
            for bucket in range(manifest.buckets)
            for path in manifest.histories_files(bucket, first, last + 1)
        ]
        user_ids = [
            histories.user_ids[np.unique(histories.rows[histories.played_at >= since])]
            for path in paths
            for histories in read_files(self.workspace, [path], USERS_PER_READ)
        ]
        return np.unique(np.concatenate([np.zeros(0, dtype=object), *user_ids]))

    def _fit_range_of(self, part: Manifest) -> FitRange:
        return fit_range(load_split(self.workspace, part.inputs["split"]) if "split" in part.inputs else None)

    def _share_of_new_plays(self) -> float:
        """Return the share of all plays that were added after the data set of the model."""
        plays_before = self.dataset.earlier(self.model.inputs["dataset"]).plays
        return 1 - plays_before / self.dataset.manifest.plays

    def _train(self) -> None:
        """Continue the training of the live model; if the data needs a network of another shape, train a new model."""
        stages, retrieval = self.stages, self.retrieval
        songs_id = self.model.inputs.get("songs")
        sections = {
            "embed": artifacts.load_manifest(self.workspace, "songs", songs_id).config if songs_id else {},
            "train": self.model.config,
            "retrieval": retrieval.config if retrieval else {},
            "rank": self.rankers.config if self.rankers else {},
        }
        configs = stage_configs(self.dataset, sections)
        stages.start = self.model.id
        try:
            stages.run("train", configs["train"])
        except MismatchError as error:
            self.on_note(f"Training from scratch: {str(error).partition(';')[0]}")
            stages.start = None
            fit_models(stages, configs)
            return
        stages.run("songs")
        for name in ("retrieval", "rank"):
            stages.run(name, configs[name])

    def _keep_model(self) -> None:
        """Add new songs to the model and new plays to the retrieval; the model and its rankers stay unchanged."""
        self.stages.artifact_ids["train"] = self.model.id
        self.stages.run("songs")
        if self.rankers is not None and self.retrieval is not None:
            self.stages.artifact_ids["rank"] = self.rankers.id
            self.stages.run("retrieval", from_mapping(RetrievalConfig, self.retrieval.config, "retrieval"))

    def _measure_quality(self, is_trained: bool) -> Quality | None:
        """Compare the new release, fitted without the newest plays, with the live one on them.

        None with fewer than `MIN_QUERIES` queries as served.
        Only the networks are compared if the live release has no rankers and the model is not trained again.
        """
        split, workspace, artifact_ids = self.stages.split, self.workspace, self.stages.artifact_ids
        if split is None:
            return None
        # Without times no plays can be appended, so a split of new plays is one in time.
        assert split.validation_from is not None
        start = split.validation_from
        retrieval, rankers = (
            artifacts.load_manifest(workspace, kind, artifact_ids[stage]) if stage in artifact_ids else None
            for kind, stage in (("retrieval", "retrieval"), ("rankers", "rank"))
        )
        live_parts = ServedParts(
            name=LIVE,
            network=self.model.folder,
            retrieval=self.retrieval.folder if self.retrieval else None,
            rankers=self.rankers.folder if self.rankers else None,
            added=AddedSongs.load(workspace, self.added_songs.folder) if self.added_songs else None,
        )
        if is_trained:
            assert retrieval is not None  # _train fits one
            model = artifacts.load_manifest(workspace, "models", artifact_ids["train"])
            if not workspace.exists(model.path(SELECTION_FOLDER)):
                return None  # no play of the range has an earlier play by the same user
            new_parts = selection_parts(self.dataset, model, retrieval, rankers, NEW)
        else:
            selection_folder = retrieval.path(SELECTION_FOLDER) if retrieval else None
            added_songs = added_since(self.dataset, self.model, split.selection, self.added_songs)
            rankers_folder = rankers.folder if rankers else None  # the live release's
            new_parts = ServedParts(
                name=NEW,
                network=self.model.folder,
                retrieval=selection_folder,
                rankers=rankers_folder,
                added=added_songs,
            )
        quality = measure_quality(
            self.dataset,
            [part.load(self.dataset, IndexConfig()) for part in (new_parts, live_parts)],
            split=split.validation_as_test(),
            song_plays=self._plays_before(split, retrieval),
            checking_users=is_trained and rankers is not None,
            left_out=self._seen_users(start),
        )
        return quality if quality.queries >= MIN_QUERIES else None

    def _plays_before(self, split: Split, retrieval: Manifest | None) -> np.ndarray:
        """Return int64 (N,): the plays of each song before the validation range; without a retrieval, count them."""
        if retrieval is not None:
            folder = retrieval.path(SELECTION_FOLDER)
            return np.asarray(Retrieval.load(self.workspace, folder).plays.plays)
        batches = (split.selection.select(batch) for batch in self.dataset.read_all())
        popularity = PopularityRecommender.fit(batches, num_songs=self.dataset.num_songs, allowed=split.selection)
        return popularity.plays

    def _load_states(self, release: Manifest, store: str | None) -> LoadResult | None:
        """Load the states into `store`; if it is None, into the workspace's own store, if there is one."""
        state_store = open_user_store(self.workspace, store, self.dataset.lineage)
        if state_store is None:
            return None
        with closing(state_store):
            return load_states(self.dataset, state_store, release)


def decide(quality: Quality | None, unseen_from: int, *, is_trained: bool) -> tuple[bool, str]:
    """Return whether the new release may go live, and the reason.

    With a newly trained model its recall@20 as served must be at least the live release's less `TOLERANCE`. With the
    live release's model it may also be lower by chance, which is where the 95 % interval of the paired difference does
    not lie below 0: a single one of fewer than 200 queries moves the recall by more than the tolerance, and the new
    plays would stay out. `quality` is None for too few queries; the release then has the live release's model.
    `unseen_from` (ms UTC) is the moment from which on plays can be compared on.
    """
    if quality is None:
        return True, (
            f"the model is the same, and the new plays from {format_iso(unseen_from)} on, where those that the live "
            "release has learned from end, are too few for a comparison"
        )
    difference = quality.difference(NEW, LIVE)
    comparison = (
        f"recall@20 as served on {quality.queries:,} new queries is {quality.value(NEW):.3f}, and "
        f"{quality.value(LIVE):.3f} for the live release; the difference is {difference['difference']:+.3f} "
        f"({difference['low']:+.3f} to {difference['high']:+.3f})"
    )
    is_chance = not is_trained and difference["high"] >= 0
    return difference["difference"] >= -TOLERANCE or is_chance, comparison
