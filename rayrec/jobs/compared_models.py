"""What an evaluation judges: baselines, and the networks of one or more models artifacts, all of one split."""

from dataclasses import dataclass

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.split import Split, fit_range, require_split_of
from rayrec.embeddings.sessions import UNCUT
from rayrec.embeddings.vectors import FINAL, SELECTION
from rayrec.errors import InputError, MismatchError
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.model.train_config import has_memory
from rayrec.progress import progress
from rayrec.recommend.base import Recommender
from rayrec.recommend.baselines import BASELINES, fit_baselines, needs_selection, needs_vectors
from rayrec.recommend.popularity import PopularityRecommender
from rayrec.recommend.selection import make_selection
from rayrec.storage.artifacts import Manifest, load, newest
from rayrec.storage.workspace import Workspace

HYBRID, HYBRID_SHORT, TASTE, TASTE_SHORT = "hybrid", "hybrid-short", "taste", "taste-short"
NETWORKS = (HYBRID, HYBRID_SHORT, TASTE, TASTE_SHORT)  # the recommenders that a models artifact may give


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What is judged, all of one split."""

    names: tuple[str, ...]  # of the models
    default: str  # the one that `recommend` uses
    model: Manifest | None  # the network, where it is among them
    others: dict[str, Manifest]  # more networks by the name that they were given
    songs: Manifest | None  # the song vectors of the baselines, where one needs them
    inputs: dict[str, str]  # role -> id

    @property
    def warning(self) -> str | None:
        """A line about the parts that a split could not keep from the plays they are judged on."""
        if "split" not in self.inputs:
            return None
        parts = {"the network": self.model, **self.others, "the song vectors": self.songs}
        uncut = [name for name, part in parts.items() if part and part.metrics.get("source") == "playlists"]
        return f"{', '.join(uncut)}: {UNCUT}" if uncut else None


def choose(
    workspace: Workspace, dataset: Dataset, config: EvaluateConfig, split: Split | None, model_id: str | None
) -> Judged:
    """The models of `config` with the artifacts they need, all made for `split` or, without one, of all plays.

    `NAME=ID` among the models is the network of another models artifact, under that name. Raises
    `InputError` for an unknown model, `NotFoundError` for an artifact that is not there, `MismatchError`
    for one of another split.
    """
    named, others = _named(workspace, config)
    if split is not None:
        require_split_of(dataset, split)
    inputs, model, songs, default = {"dataset": dataset.manifest.id}, None, None, HYBRID
    if split is not None:
        inputs["split"] = split.id
    if config.models is None or set(NETWORKS) & set(named):
        model = load(workspace, "models", model_id) if model_id else newest(workspace, "models", "train")
        inputs["models"] = model.id
        default = HYBRID if has_memory(model) else TASTE
        if {HYBRID, HYBRID_SHORT} & set(named) and default != HYBRID:
            raise InputError(f"model {model.id} was trained without a memory; name taste, or train with --memory")
    for network in (*([model] if model else []), *others.values()):
        require_split(network, split, dataset, "train")
    inputs |= {f"models {name}": other.id for name, other in others.items()}
    names = tuple(dict.fromkeys(named or (default, TASTE, *BASELINES)))
    if needs_vectors(names):
        trained = [part for part in (model, *others.values()) if part is not None]
        songs = load(workspace, "songs", trained[0].inputs["songs"]) if trained else newest(workspace, "songs", "embed")
        require_split(songs, split, dataset, "embed")
        inputs["songs"] = songs.id
    return Judged(names=names, default=default, model=model, others=others, songs=songs, inputs=inputs)


def _named(workspace: Workspace, config: EvaluateConfig) -> tuple[list[str], dict[str, Manifest]]:
    """The names of the models asked for, and the artifacts of those given as NAME=ID."""
    names: list[str] = []
    others: dict[str, Manifest] = {}
    for asked in config.models or ():
        name, equals, model_id = asked.partition("=")
        if equals:
            if name in (*NETWORKS, *BASELINES, *others) or not name:
                raise InputError(f"{asked}: give another model a name of its own, such as r_hst={model_id}")
            others[name] = load(workspace, "models", model_id)
        elif name not in (*NETWORKS, *BASELINES):
            raise InputError(
                f"there is no model {name!r}; there are: {', '.join((*NETWORKS, *BASELINES))}, and NAME=ID for "
                "the network of another model"
            )
        names.append(name)
    return names, others


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


def make_recommenders(
    workspace: Workspace, dataset: Dataset, judged: Judged, split: Split | None
) -> tuple[list[Recommender], np.ndarray]:
    """Fit the baselines on what final fits may see and load the networks, in the order of the names.

    Also float64 (N,): how often each song was played there.
    """
    # A plain array: a memory map would not be shared through Ray's object store.
    vectors = np.array(workspace.read_array(judged.songs.path(FINAL))) if judged.songs else None
    allowed, selection = fit_range(split), None
    if split is not None and judged.songs and SELECTION in judged.songs.files and needs_selection(judged.names):
        selection = make_selection(dataset, split, np.array(workspace.read_array(judged.songs.path(SELECTION))))
    fitted: dict[str, Recommender] = {}
    baselines = dict.fromkeys(["popularity", *(name for name in judged.names if name in BASELINES)])
    with progress("fit baselines", len(baselines)) as bar:
        for name in baselines:
            fitted[name] = fit_baselines([name], dataset, vectors, allowed, selection)[0]
            bar.advance(note=name)
    if judged.model:
        fitted |= _networks(workspace, judged.model)
    for name, other in judged.others.items():
        fitted[name] = _networks(workspace, other)[HYBRID if has_memory(other) else TASTE]
        fitted[name].name = name
    popularity = fitted["popularity"]
    assert isinstance(popularity, PopularityRecommender)
    return [fitted[name] for name in judged.names], popularity.plays


def _networks(workspace: Workspace, model: Manifest) -> dict[str, Recommender]:
    """What a models artifact gives, by name."""
    from rayrec.recommend.hybrid import HybridRecommender, load_recommender  # brings torch: only once needed

    loaded = load_recommender(workspace, model)
    network = loaded.network if isinstance(loaded, HybridRecommender) else loaded
    parts = (loaded, loaded.short_only(), network, network.short_only())
    return {part.name: part for part in parts}
