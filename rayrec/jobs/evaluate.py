"""Judge the network and the baselines on the test range, bucket by bucket on Ray."""

import time
from dataclasses import dataclass

import numpy as np

from rayrec.artifacts import Manifest, fingerprint, load, new_id, newest, publish
from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange, Split
from rayrec.data.splits import require_split_of
from rayrec.errors import InputError, MismatchError
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.report import CURVES, write_report
from rayrec.evaluation.results import figures_of
from rayrec.evaluation.tally import Tally
from rayrec.jobs.buckets import run_buckets
from rayrec.jobs.cluster import ray_cluster
from rayrec.progress import progress
from rayrec.recommend.baselines import BASELINES, fit_baselines, needs_vectors
from rayrec.recommend.popularity import PopularityRecommender
from rayrec.recommend.recommender import Recommender
from rayrec.taste.config import has_memory
from rayrec.workspace import Workspace

KIND = "reports"
NETWORKS = ("hybrid", "taste")  # the recommenders that a models artifact may give
USERS_PER_BATCH = 2_000


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
    was trained from. The manifest's metrics hold default, protocol, users, plays, seconds and the figures
    of `figures_of` but the curves.

    Raises `InputError` for an unknown model and for a test range without questions, `NotFoundError`
    where there is no network or no song vectors, `MismatchError` for those of another split.
    """
    started = time.monotonic()
    dataset = Dataset(workspace)
    parts = choose_parts(workspace, dataset, config, split, model_id)
    report_id, complete = new_id(
        workspace, KIND, fingerprint("evaluate", to_mapping(config), parts.inputs), repeat=repeat
    )
    if complete:
        return load(workspace, KIND, report_id)
    evaluator = make_evaluator(workspace, dataset, config, split, parts)
    tally = tally_buckets(workspace, evaluator, dataset.manifest.buckets)
    if not tally.users[0].sum():
        raise InputError(
            f"none of {split.test_range} has an earlier play by the same user, so there is nothing to predict; "
            "make a split with more test days or a larger last fraction"
        )
    figures = figures_of(tally, evaluator, parts.default)
    manifest = Manifest(
        kind=KIND,
        id=report_id,
        config=to_mapping(config),
        inputs=parts.inputs,
        seed=config.seed,
        metrics={
            "default": parts.default,
            "protocol": split.protocol,
            **{name: figures[name] for name in figures if name != CURVES},
            "users": int(tally.users[0].sum()),
            "plays": int(tally.questions[0, :, 0].sum()),
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    about = {"protocol": split.protocol, "test range": split.test_range, **parts.inputs}
    names = write_report(workspace, manifest.folder, figures, default=parts.default, about=about)
    return publish(workspace, manifest, names)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What is judged, all of one split."""

    names: tuple[str, ...]  # of the models
    default: str  # the one that `recommend` uses
    model: Manifest | None  # the network, where it is among them
    songs: Manifest | None  # the song vectors of the baselines, where one needs them
    inputs: dict[str, str]  # role -> id


def choose_parts(
    workspace: Workspace, dataset: Dataset, config: EvaluateConfig, split: Split | None, model_id: str | None
) -> Parts:
    """The models of `config` with the artifacts they need, all made for `split` or, without one, of all plays.

    Raises as `evaluate` does.
    """
    unknown = [name for name in config.models or () if name not in (*NETWORKS, *BASELINES)]
    if unknown:
        raise InputError(f"there is no model {unknown[0]!r}; there are: {', '.join((*NETWORKS, *BASELINES))}")
    if split is not None:
        require_split_of(dataset, split)
    inputs, model, songs, default = {"dataset": dataset.manifest.id}, None, None, NETWORKS[0]
    if split is not None:
        inputs["split"] = split.id
    if config.models is None or set(NETWORKS) & set(config.models):
        model = load(workspace, "models", model_id) if model_id else newest(workspace, "models", "train")
        require_split(model, split, dataset, "train")
        inputs["models"] = model.id
        default = NETWORKS[0] if has_memory(model) else NETWORKS[1]
        if NETWORKS[0] in (config.models or ()) and default != NETWORKS[0]:
            raise InputError(f"model {model.id} was trained without a memory; name taste, or train with --memory")
    names = tuple(dict.fromkeys(config.models or (default, NETWORKS[1], *BASELINES)))
    if needs_vectors(names):
        songs = load(workspace, "songs", model.inputs["songs"]) if model else newest(workspace, "songs", "embed")
        require_split(songs, split, dataset, "embed")
        inputs["songs"] = songs.id
    return Parts(names=names, default=default, model=model, songs=songs, inputs=inputs)


def require_split(part: Manifest, split: Split | None, dataset: Dataset, command: str) -> None:
    """Raise `MismatchError` for a part that was not made for the split, or without one not of all plays.

    Made from the data set, or from one that it descends from.
    """
    made_of, wanted = part.inputs.get("split"), split.id if split else None
    if made_of == wanted and dataset.descends_from(part.inputs.get("dataset", dataset.manifest.id)):
        return
    saw = f"was made for split {made_of}" if made_of else "was made from all plays"
    saw += ", those to be predicted too" if wanted and not made_of else ""
    judged = f"this is an evaluation of split {wanted}; run `rayrec {command}` with this split first"
    if not wanted:
        judged = f"this is an evaluation without a split; name the split, or run `rayrec {command} --no-split` first"
    raise MismatchError(f"{part.kind} {part.id} {saw}, and {judged}")


def make_evaluator(
    workspace: Workspace, dataset: Dataset, config: EvaluateConfig, split: Split, parts: Parts
) -> Evaluator:
    """An evaluator of the models of `parts`."""
    recommenders, song_plays = make_recommenders(workspace, dataset, parts, split.final)
    return Evaluator(
        recommenders,
        split=split,
        song_plays=song_plays,
        config=config,
        curve_share=min(1.0, config.max_curve_users / max(1, dataset.manifest.users)),
        contexts=dataset.manifest.contexts,
    )


def make_recommenders(
    workspace: Workspace, dataset: Dataset, parts: Parts, allowed: FitRange
) -> tuple[list[Recommender], np.ndarray]:
    """Fit the baselines on what `allowed` lets through and load the network, in the order of the names.

    Also float64 (N,): how often each song was played there.
    """
    # A plain array: a memory map would not be shared through Ray's object store.
    vectors = np.array(workspace.read_array(parts.songs.path("vectors.npy"))) if parts.songs else None
    baselines = ["popularity"] + [name for name in parts.names if name not in (*NETWORKS, "popularity")]
    fitted: dict[str, Recommender] = {}
    with progress("fit baselines", len(baselines)) as bar:
        for name in baselines:
            fitted[name] = fit_baselines([name], dataset, vectors, allowed)[0]
            bar.advance(note=name)
    if parts.model:
        from rayrec.recommend.hybrid import HybridRecommender, load_recommender  # brings torch: only once needed

        network = load_recommender(workspace, parts.model)
        fitted[network.name] = network
        if isinstance(network, HybridRecommender):
            fitted[network.network.name] = network.network
    popularity = fitted["popularity"]
    assert isinstance(popularity, PopularityRecommender)
    return [fitted[name] for name in parts.names], popularity.plays


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
