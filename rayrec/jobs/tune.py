"""A sweep over settings of song embeddings and network, measured on the validation range.

It is a plain loop instead of Ray Tune: a trial consists of an embed and a train job, which use the whole cluster
themselves, and the artifacts of an interrupted trial are found again by their ids. Ray Tune would add parallel trials,
for CPUs that a single training leaves idle.
"""

import csv
import io
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.split import Split, require_split_of
from rayrec.errors import DivergedError, InputError
from rayrec.jobs.embed import embed
from rayrec.jobs.job_config import Trial, TuneConfig, read_sections, read_trials, to_toml
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.train import Unfinished, train
from rayrec.model.epochs import SELECTION_METRIC
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

LOGGER = logging.getLogger(__name__)
KIND = "tunings"
TABLE, CSV, BEST = "trials.json", "trials.csv", "best.toml"

Row = dict[str, Any]


def tune(
    workspace: Workspace,
    config: TuneConfig,
    file: str,
    *,
    split: Split | None,
    repeat: bool = False,
    on_trial: Callable[[Row, int], None] = lambda row, trials: None,
) -> Manifest:
    """Try the settings of a TOML file and write tunings/<id>/ with the table of trials and the best settings.

    Each trial fits song embeddings and a network on the plays before the validation range. An interrupted sweep
    continues: the trials in its table are not repeated. The model of a trial is deleted once it is measured. At the
    end, the song embeddings that the sweep made are deleted, except those of the best trial. Metrics: trials (rows of
    the table), best (settings), best_ndcg and seconds. `on_trial` is called with each row and the number of all trials.

    Raises the errors of `read_trials`, `InputError` if there is no validation range, and `DivergedError` if all trials
    diverged.
    """
    if split is None or not split.has_validation:
        raise InputError("tune needs a validation range; run `rayrec split` first")
    dataset = Dataset(workspace)
    require_split_of(dataset, split)
    trials = read_trials(read_sections(file), config, file)
    settings = {**to_mapping(config), "settings": [trial.settings for trial in trials]}
    inputs = {"dataset": dataset.manifest.id, "split": split.id}
    fingerprint_id = artifacts.fingerprint("tune", settings, inputs)
    tuning_id, complete = artifacts.new_id(workspace, KIND, fingerprint_id, repeat=repeat)
    if complete:
        return artifacts.reuse(workspace, KIND, tuning_id)
    manifest = Manifest(kind=KIND, id=tuning_id, config=settings, inputs=inputs, seed=config.seed)
    previous_ids = artifacts.current_ids(workspace)
    try:
        rows = _run_trials(workspace, manifest, trials, split, on_trial)
    finally:
        for kind in ("songs", "models"):  # later stages must not start from artifacts of trials
            if kind in previous_ids:
                artifacts.make_current(workspace, kind, previous_ids[kind])
    measured_rows = [row for row in rows if row[SELECTION_METRIC] is not None]
    if not measured_rows:
        raise DivergedError("no trial has a finite loss; give smaller learning rates")
    best_row = max(measured_rows, key=lambda row: row[SELECTION_METRIC])
    _forget_songs(workspace, rows, best_row)
    workspace.write_bytes(manifest.path(CSV), _csv(rows).encode())
    workspace.write_bytes(manifest.path(BEST), to_toml(best_row["settings"]).encode())
    metrics = {
        "trials": rows,
        "best": best_row["settings"],
        "best_ndcg": best_row[SELECTION_METRIC],
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }
    return artifacts.publish(workspace, replace(manifest, metrics=metrics), [TABLE, CSV, BEST])


def _run_trials(
    workspace: Workspace,
    manifest: Manifest,
    trials: list[Trial],
    split: Split,
    on_trial: Callable[[Row, int], None],
) -> list[Row]:
    """Run the trials that the table of an interrupted sweep lacks; return the rows of all trials."""
    path = manifest.path(TABLE)
    rows: list[Row] = workspace.read_json(path) if workspace.exists(path) else []
    with ray_cluster():
        for trial_number, trial in enumerate(trials[len(rows) :], start=len(rows) + 1):
            row, model = _run_trial(workspace, trial, split)
            rows.append({"trial": trial_number, **row})
            workspace.write_json(path, rows)
            if model is not None:  # only now, so that an interrupted sweep finds it again
                workspace.delete(model.folder)
            on_trial(rows[-1], len(trials))
    return rows


def _run_trial(workspace: Workspace, trial: Trial, split: Split) -> tuple[Row, Manifest | None]:
    """Run a trial; return its row, and its model if the sweep trained it. A trial that diverged has no NDCG.

    Trials share song embeddings of the same settings, and an interrupted training continues.
    """
    songs_before = {manifest.id for manifest in artifacts.listing(workspace, "songs")}
    models_before = {manifest.id for manifest in artifacts.listing(workspace, "models")}
    songs = embed(workspace, trial.embed, split=split)
    unfinished: Unfinished = "resume" if trial.train.workers else "restart"
    started = time.monotonic()
    try:
        model = train(workspace, trial.train, songs_id=songs.id, split=split, unfinished=unfinished)
        ndcg, epochs, seconds = (model.metrics[name] for name in (SELECTION_METRIC, "epochs", "seconds"))
    except DivergedError as error:
        LOGGER.warning("%s; the trial has no result", error)
        model, ndcg, epochs, seconds = None, None, None, time.monotonic() - started
    if model is not None and ndcg is None:
        raise InputError(
            "no play in the validation range has an earlier play by the same user; run `rayrec split` with more "
            "--validation-days"
        )
    songs_made = songs.id not in songs_before
    row = {
        **trial.varied,
        SELECTION_METRIC: None if ndcg is None else round(ndcg, 6),
        "epochs": epochs,
        "seconds": round(seconds + (songs.metrics.get("seconds", 0.0) if songs_made else 0.0), 1),
        "songs": songs.id,
        "songs_made": songs_made,
        "settings": trial.settings,
    }
    return row, None if model is None or model.id in models_before else model


def _forget_songs(workspace: Workspace, rows: list[Row], best: Row) -> None:
    """Delete the song embeddings that the sweep made, except those of the best trial."""
    for songs_id in {row["songs"] for row in rows if row["songs_made"]} - {best["songs"]}:
        workspace.delete(Manifest(kind="songs", id=songs_id).folder)


def _csv(rows: list[Row]) -> str:
    """Return the table as CSV, without the columns settings and songs_made."""
    text = io.StringIO()
    names = [name for name in rows[0] if name not in ("settings", "songs_made")]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
