"""The rank stage: rankers learned on the validation range, with a network and a retrieval that have not seen it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.split import Split, load_split, split_flag
from rayrec.errors import MismatchError, TooFewQueriesError
from rayrec.jobs.add_songs import added_to
from rayrec.jobs.forget import erase_forgotten
from rayrec.jobs.runtime import node_cpus, ray_cluster, run_buckets, run_on_node
from rayrec.model.added_songs import AddedSongs
from rayrec.model.train_config import SELECTION_NETWORK
from rayrec.progress import progress
from rayrec.recommend.index import INDEX_FILE, IndexConfig, IndexFigures, SongIndex
from rayrec.recommend.ranker import Ranker, RankerSettings, RankingExamples, ndcg
from rayrec.recommend.stored_retrieval import SELECTION_RETRIEVAL, Retrieval
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import (
    KINDS,
    CandidateSource,
    RankerKind,
    collect_examples,
    pack_examples,
    unpack_examples,
    validation_queries,
)
from rayrec.recommend.two_step_config import ABLATED_PARTS, RankConfig
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace

KIND = "rankers"
MOST_THREADS = 8  # that grow trees: fifty candidates of 40,000 queries keep no more busy
EVERYTHING = ""  # the name of the part that is left out where none is


@writes("rank")
def fit_rankers(
    workspace: Workspace,
    config: RankConfig,
    *,
    model_id: str | None = None,
    retrieval_id: str | None = None,
    repeat: bool = False,
) -> Manifest:
    """Learn the rankers of a model and a retrieval, the newest unless named; the rankers artifact.

    The candidates and features that they learn from come from the network that `train` chose before it learned
    from the validation range, and from the part of the retrieval that was fitted before that range.
    Metrics: seconds, queries, and for each ranker its trees, the share of queries whose right song was no
    candidate, and its first features. Raises `InputError` for a model without a validation range, `MismatchError`
    where model and retrieval are of different data, `TooFewQueriesError` where the range teaches nothing.
    """
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    model = (
        artifacts.load_manifest(workspace, "models", model_id)
        if model_id
        else artifacts.newest(workspace, "models", "train")
    )
    retrieval = (
        artifacts.load_manifest(workspace, "retrieval", retrieval_id)
        if retrieval_id
        else artifacts.newest(workspace, "retrieval", "retrieval")
    )
    split = _split_of(workspace, dataset, model, retrieval)
    inputs = {"dataset": dataset.manifest.id, "split": split.id, "models": model.id, "retrieval": retrieval.id}
    added = artifacts.latest(workspace, "added_songs", lambda manifest: manifest.inputs["models"] == model.id)
    # Not an input of the artifact: songs that are added later are ranked as those that were there.
    print_id = artifacts.fingerprint(
        "rank", to_mapping(config), inputs | ({"added_songs": added.id} if added is not None else {})
    )
    rankers_id, complete = artifacts.new_id(workspace, KIND, print_id, repeat=repeat)
    if complete:
        return artifacts.reuse(workspace, KIND, rankers_id)
    manifest = Manifest(kind=KIND, id=rankers_id, config=to_mapping(config), inputs=inputs, seed=config.seed)
    started = time.monotonic()
    parts = (model.path(SELECTION_NETWORK), retrieval.path(SELECTION_RETRIEVAL))
    task = _Task(dataset, config, split, *parts, manifest.path("run"), added=added is not None)
    with ray_cluster():
        queries = _collect(task)
        with progress("Rankers"):
            cpus = min(node_cpus(), MOST_THREADS)
            try:
                (names, figures), *_ = run_on_node(_fit, task, EVERYTHING, manifest.folder, cpus, cpus=cpus)
            except TooFewQueriesError:
                workspace.delete(manifest.folder)
                raise
    workspace.delete(task.run)
    metrics = {**figures, "queries": queries, "seconds": round(time.monotonic() - started, 1)}
    return artifacts.publish(workspace, replace(manifest, metrics=metrics), names)


def fit_ablations(dataset: Dataset, rankers: Manifest, folder: str) -> dict[str, str]:
    """Learn the rankers of an artifact again without each of ABLATED_PARTS; part -> the folder of its rankers.

    With the same settings, network and retrieval, below `folder`, which the caller deletes. A part that the catalog
    does not know, such as artists, is left out. Needs a running cluster.
    """
    workspace = dataset.workspace
    model, retrieval = (
        artifacts.load_manifest(workspace, kind, rankers.inputs[kind]) for kind in ("models", "retrieval")
    )
    split = _split_of(workspace, dataset, model, retrieval)
    described = retrieval.metrics["artists"] or retrieval.metrics["albums"]
    parts = tuple(part for part in ABLATED_PARTS if part != "artists" or described)
    config = RankConfig(**rankers.config)
    added = (
        artifacts.latest(workspace, "added_songs", lambda manifest: manifest.inputs["models"] == model.id) is not None
    )
    folders = (model.path(SELECTION_NETWORK), retrieval.path(SELECTION_RETRIEVAL))
    task = _Task(dataset, config, split, *folders, f"{folder}/run", parts, added)
    _collect(task)
    cpus = min(node_cpus(), MOST_THREADS)
    with progress("Rankers without a part", len(parts)) as bar:
        for part in parts:
            list(run_on_node(_fit, task, part, f"{folder}/{part}", cpus, cpus=cpus))
            bar.advance(note=part)
    workspace.delete(task.run)
    return {part: f"{folder}/{part}" for part in parts}


def _collect(task: _Task) -> int:
    """Collect the examples; how many queries."""
    if task.added:
        songs = added_to(task.dataset, task.network)
        # Without those held out: no play of them is right here, which would teach that no new song is.
        songs = songs.take(task.split.final.allowed_songs(songs.rows))
        songs.save(task.dataset.workspace, f"{task.run}/added_songs")
    cpus = node_cpus()
    list(run_on_node(_build_index, task, cpus, cpus=cpus))
    buckets = range(task.dataset.manifest.buckets)
    queries = 0
    with progress("Ranking examples", len(buckets)) as bar:
        for count in run_buckets(ExampleCollector, buckets, arguments={"task": task}):
            queries += count
            bar.advance()
    return queries


ANEW = {"models": "`rayrec embed` and `rayrec train`", "retrieval": "`rayrec retrieval`"}  # kind -> commands


def _split_of(workspace: Workspace, dataset: Dataset, model: Manifest, retrieval: Manifest) -> Split:
    for manifest in (model, retrieval):
        if not dataset.descends_from(manifest.inputs["dataset"]):
            raise MismatchError(
                f"the data set of {artifacts.noun(manifest.kind)} {manifest.id} is {manifest.inputs['dataset']}, "
                f"the workspace holds {dataset.manifest.id}; run {ANEW[manifest.kind]} first"
            )
    split = load_split(workspace, model.inputs["split"]) if "split" in model.inputs else None
    if split is None or not workspace.exists(f"{model.path(SELECTION_NETWORK)}/model.safetensors"):
        raise TooFewQueriesError(
            f"model {model.id} held back no validation range to learn a ranker from; "
            "run `rayrec split`, `rayrec embed` and `rayrec train` first"
        )
    if split.id != retrieval.inputs.get("split"):
        raise MismatchError(
            f"model {model.id} was trained on split {split.id}, retrieval {retrieval.id} on "
            f"{retrieval.inputs.get('split')}; run `rayrec retrieval{split_flag(split.id)}` first"
        )
    return split


@dataclass(frozen=True)
class _Task:
    """What all workers of one fit know."""

    dataset: Dataset
    config: RankConfig
    split: Split
    network: str  # folder of the network that has not seen the validation range
    retrieval: str  # folder of the retrieval that has not seen it either
    run: str  # folder of the pieces
    without: tuple[str, ...] = (EVERYTHING,)  # parts to leave out, one at a time
    added: bool = False  # whether songs were added to the network, which lie in the folder `run`, too

    def piece(self, bucket: int, without: str) -> str:
        """The file of the examples of one bucket, without a part."""
        return f"{self.run}/bucket={bucket:05d}/{without or 'all'}.safetensors"

    @property
    def index(self) -> str:
        """The file of the index of the network's songs, which all workers read."""
        return f"{self.run}/{INDEX_FILE}"

    def network_and_songs(self) -> TasteRecommender:
        """The network that has not seen the validation range, with the songs that were added, without an index."""
        workspace = self.dataset.workspace
        network = TasteRecommender.from_folder(workspace, self.network)
        if self.added:
            network.add_songs(AddedSongs.load(workspace, f"{self.run}/added_songs"))
        return network

    def sources(self) -> dict[str, CandidateSource]:
        """Retrievers and features that have not seen the validation range, by the part that they leave out."""
        workspace, network = self.dataset.workspace, self.network_and_songs()
        figures = IndexFigures(**workspace.read_json(f"{self.index}.json"))
        network.index = SongIndex.read(workspace, self.index, figures, network.song_vectors)
        retrieval = Retrieval.load(workspace, self.retrieval)
        real_times = self.dataset.manifest.times == "real"
        return {
            without: CandidateSource(network, retrieval, real_times=real_times, without=without)
            for without in self.without
        }


def _build_index(task: _Task, threads: int) -> Iterator[None]:
    """Write the index that all workers read, for each would take as much memory and time to build its own."""
    index = SongIndex.build(task.network_and_songs().song_vectors, IndexConfig(), threads=threads)
    index.save(task.dataset.workspace, task.index)
    task.dataset.workspace.write_json(f"{task.index}.json", asdict(index.figures))
    yield None


class ExampleCollector:
    """Collects the examples of one bucket."""

    def __init__(self, task: _Task) -> None:
        self._task, self._sources = task, task.sources()
        self._queries_each = -(-task.config.queries // task.dataset.manifest.buckets)

    def __call__(self, bucket: int) -> int:
        """Write the examples of a bucket; how many queries they are of."""
        task, left = self._task, self._queries_each
        parts: list[dict[str, dict[RankerKind, RankingExamples]]] = []
        for batch in task.dataset.read_bucket(bucket):
            histories, plays = validation_queries(batch, task.split, left)
            left -= len(plays)
            if len(plays):
                parts.append(collect_examples(self._sources, histories, plays))
        for without in task.without if parts else ():
            joined = {kind: RankingExamples.joined([part[without][kind] for part in parts]) for kind in KINDS}
            task.dataset.workspace.write_bytes(task.piece(bucket, without), pack_examples(joined))
        return self._queries_each - left


def _fit(task: _Task, without: str, folder: str, threads: int) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Grow the rankers, without a part, and write them; yields the names of the files, and figures."""
    workspace = task.dataset.workspace
    pieces = [task.piece(bucket, without) for bucket in range(task.dataset.manifest.buckets)]
    parts = [unpack_examples(workspace.read_bytes(path)) for path in pieces if workspace.exists(path)]
    if not parts:
        raise TooFewQueriesError(
            "the validation range holds no play to learn a ranker from; give a split with more days"
        )
    features = task.sources()[without].sources.names
    names: list[str] = []
    figures: dict[str, Any] = {}
    rankers: dict[RankerKind, Ranker] = {}
    for kind in KINDS:
        examples = RankingExamples.joined([part[kind] for part in parts])
        ranker = _grown(kind, examples, features, task.config, threads)
        if kind == "served" and ranker is not None and not _orders_better(ranker, rankers["next"], examples):
            ranker = None  # the ranker of all next plays serves new songs as well
        if ranker is not None:
            rankers[kind] = ranker
            names += ranker.save(workspace, folder, kind)
            held_out = examples.take(examples.held_out)
            figures[kind] = {
                "form": ranker.form,
                "candidates_hold_the_answer": round(float(held_out.found.mean()), 4),
                "first_features": list(ranker.importance)[:5],
            }
    yield names, figures


def _grown(
    kind: RankerKind, examples: RankingExamples, features: list[str], config: RankConfig, threads: int
) -> Ranker | None:
    """A ranker; None beside the one of the next play where too few queries are of its kind: a validation range may
    reach too few plays ahead for the long horizon, or hold only songs that its users had heard."""
    checked = int((examples.held_out & examples.found).sum())
    fewest = {"next": 0, "served": 1, "long": config.min_long_queries}[kind]
    if min(checked, int(examples.found.sum()) - checked) < fewest:
        return None
    settings = RankerSettings(
        trees=config.trees,
        leaves=config.leaves,
        learning_rate=config.learning_rate,
        seed=config.seed,
        threads=threads,
    )
    return Ranker.fit(examples, features, settings)


def _orders_better(ranker: Ranker, other: Ranker, examples: RankingExamples) -> bool:
    """True where a ranker has the higher NDCG@20 on the queries held out."""
    checked = examples.take(examples.held_out & examples.found)
    one, two = (ndcg(checked.rows, each.scores(checked.features), checked.right) for each in (ranker, other))
    return one > two
