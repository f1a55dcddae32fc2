"""Judge the network and the baselines on the test range, bucket by bucket on Ray."""

import json
import time
from typing import Any

import numpy as np

from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.split import Split
from rayrec.embeddings import health
from rayrec.embeddings.vectors import FINAL, SongVectors
from rayrec.errors import InputError
from rayrec.evaluation.accumulator import Tally
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.pictures import NAMED, Picture, most_played, song_map, training_picture
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.report import SONG_VECTORS, headline, write_report
from rayrec.evaluation.results import figures_of
from rayrec.jobs.buckets import run_buckets
from rayrec.jobs.cluster import ray_cluster
from rayrec.jobs.compared_models import Judged, choose, make_recommenders
from rayrec.model.training_log import EPOCHS
from rayrec.progress import progress
from rayrec.storage.artifacts import Manifest, fingerprint, new_id, publish, reuse
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace

KIND = "reports"
USERS_PER_BATCH = 2_000


@writes("evaluate")
def evaluate(
    workspace: Workspace,
    config: EvaluateConfig,
    *,
    split: Split,
    model_id: str | None = None,
    repeat: bool = False,
) -> Manifest:
    """Write reports/<id>/ about the models of `config` on the test range of `split`.

    Without names these are the network `model_id` (None: the one trained last) and every baseline.
    Baselines are fitted on what came before the test range, with the song vectors that the network
    was trained from. The manifest's metrics hold default, protocol, its headline, users, plays and seconds;
    the figures of `figures_of` and the health of the song vectors are in results.json, see `read_figures`.

    Raises `InputError` for an unknown model and for a test range without questions, `NotFoundError`
    where there is no network or no song vectors, `MismatchError` for those of another split.
    """
    started = time.monotonic()
    dataset = Dataset(workspace)
    judged = choose(workspace, dataset, config, split, model_id)
    report_id, complete = new_id(
        workspace, KIND, fingerprint("evaluate", to_mapping(config), judged.inputs), repeat=repeat
    )
    if complete:
        return reuse(workspace, KIND, report_id)
    evaluator = make_evaluator(workspace, dataset, config, split, judged)
    tally = tally_buckets(workspace, evaluator, dataset.manifest.buckets)
    if not tally.users[0].sum():
        raise InputError(
            f"none of {split.test_range} has an earlier play by the same user, so there is nothing to predict; "
            "run `rayrec split` with more test days or a larger last fraction"
        )
    figures = figures_of(tally, evaluator, judged.default)
    figures[SONG_VECTORS] = health_of(dataset, judged, evaluator.song_plays)
    manifest = Manifest(
        kind=KIND,
        id=report_id,
        config=to_mapping(config),
        inputs=judged.inputs,
        seed=config.seed,
        metrics={
            "default": judged.default,
            "protocol": split.protocol,
            **({"warning": judged.warning} if judged.warning else {}),
            **headline(figures, judged.default),
            "users": int(tally.users[0].sum()),
            "plays": int(tally.questions[0, :, 0].sum()),
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    about = {"protocol": split.protocol, "test range": split.test_range, **judged.inputs}
    about |= {"warning": judged.warning} if judged.warning else {}
    pictures = pictures_of(dataset, judged, evaluator.song_plays)
    names = write_report(workspace, manifest.folder, figures, default=judged.default, about=about, pictures=pictures)
    return publish(workspace, manifest, names)


def pictures_of(dataset: Dataset, judged: Judged, song_plays: np.ndarray) -> list[Picture]:
    """The training of the network that is judged, and a map of the songs it answers with, or of the song vectors."""
    workspace, made = dataset.workspace, []
    if judged.model and EPOCHS in judged.model.files:
        lines = workspace.read_bytes(judged.model.path(EPOCHS)).splitlines()
        made.append(training_picture([json.loads(line) for line in lines]))
    for path in [*vector_paths(judged).values()][-1:]:
        vectors = np.asarray(workspace.read_array(path))
        known = song_plays[: len(vectors)]
        titles = dataset.catalog().titles(most_played(vectors, known, NAMED))
        made.append(song_map(vectors, known, titles))
    return [picture for picture in made if picture is not None]


def health_of(dataset: Dataset, judged: Judged, song_plays: np.ndarray) -> list[dict[str, Any]]:
    """The health of the song vectors behind the models: an entry for those embedded, one for the network's.

    Each has vectors (songs or models), id, dim, directions and the figures of `health.check`; `song_plays`,
    int (N,), choose the most played songs.
    """
    entries = []
    for role, path in vector_paths(judged).items():
        vectors = SongVectors(np.asarray(dataset.workspace.read_array(path)))
        figures = health.check(vectors, song_plays[: len(vectors)], dataset.catalog())
        del figures["warning"]  # its advice is for word2vec; the page tells the limit
        about = {"vectors": role, "id": judged.inputs[role], "dim": vectors.dim}
        entries.append({**about, "directions": health.directions(vectors), **figures})
    return entries


def vector_paths(judged: Judged) -> dict[str, str]:
    """Role -> path of the song vectors, where they are there: those embedded, then those the network answers with."""
    from rayrec.model.checkpoint import SONG_VECTORS as TRAINED  # brings torch: only once needed

    paths = {"songs": judged.songs.path(FINAL)} if judged.songs else {}
    return {**paths, "models": judged.model.path(TRAINED)} if judged.model else paths


def make_evaluator(
    workspace: Workspace, dataset: Dataset, config: EvaluateConfig, split: Split, judged: Judged
) -> Evaluator:
    """An evaluator of the models of `judged`."""
    recommenders, song_plays = make_recommenders(workspace, dataset, judged, split)
    return Evaluator(
        recommenders,
        split=split,
        song_plays=song_plays,
        config=config,
        curve_share=min(1.0, config.max_curve_users / max(1, dataset.manifest.users)),
        contexts=dataset.manifest.contexts,
    )


def tally_buckets(workspace: Workspace, evaluator: Evaluator, buckets: int) -> Tally:
    """The tally of all users, the buckets spread over the cluster, the evaluator shared by all workers."""
    tally = evaluator.empty()
    with ray_cluster(), progress("evaluate", buckets) as bar:
        arguments = {"workspace": workspace, "evaluator": evaluator}
        for result in run_buckets(BucketEvaluator, range(buckets), arguments=arguments):
            tally = tally + result
            bar.advance()
    return tally


class BucketEvaluator:
    """Tallies one bucket of users at a time."""

    def __init__(self, workspace: Workspace, evaluator: Evaluator) -> None:
        self.dataset, self.evaluator = Dataset(workspace), evaluator

    def __call__(self, bucket: int) -> Tally:
        """The tally of a bucket's users."""
        tally = self.evaluator.empty()
        for histories in self.dataset.read_bucket(int(bucket), USERS_PER_BATCH):
            tally = tally + self.evaluator(histories)
        return tally
