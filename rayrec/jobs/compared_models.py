"""What an evaluation compares: baselines, and the networks of one or more models artifacts, all of one split."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.split import Split, fit_range, require_split_of
from rayrec.embeddings.vectors import FINAL, SELECTION
from rayrec.embeddings.word2vec import UNCUT
from rayrec.errors import InputError, MismatchError
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.tuning import CHOICES, tune_baseline
from rayrec.progress import progress
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.baselines import BASELINES, PopularityRecommender, fit_baselines, needs_vectors
from rayrec.recommend.selection import make_selection
from rayrec.storage.artifacts import Manifest, load, newest, noun
from rayrec.storage.releases import parts_of
from rayrec.storage.workspace import Workspace

TWO_STEP, TASTE, TASTE_SHORT = "two-step", "taste", "taste-short"
NETWORKS = (TWO_STEP, TASTE, TASTE_SHORT)  # the recommenders that a models artifact may give


@dataclass(frozen=True, kw_only=True)
class ComparedModels:
    """The models of an evaluation, all of one split."""

    names: tuple[str, ...]  # of the models
    default: str  # the one that `recommend` uses
    model: Manifest | None  # the network, where it is among them
    others: dict[str, Manifest]  # more networks by the name that they were given
    songs: Manifest | None  # the song vectors of the baselines, where one needs them
    inputs: dict[str, str]  # role -> id

    @property
    def warning(self) -> str | None:
        """A line about the parts that a split could not keep from the plays they are evaluated on."""
        if "split" not in self.inputs:
            return None
        parts = {"the network": self.model, **self.others, "the song embeddings": self.songs}
        uncut = [name for name, part in parts.items() if part and part.metrics.get("source") == "playlists"]
        return f"{', '.join(uncut)}: {UNCUT}" if uncut else None


def choose_models(
    workspace: Workspace, dataset: Dataset, config: EvaluateConfig, split: Split | None, model_id: str | None
) -> ComparedModels:
    """The models of `config` with the artifacts they need, all made for `split` or, without one, of all plays.

    `NAME=ID` among the models is the network of another models artifact, under that name. Raises
    `InputError` for an unknown model, `NotFoundError` for an artifact that is not there, `MismatchError`
    for one of another split.
    """
    named, others = _named(workspace, config)
    if split is not None:
        require_split_of(dataset, split)
    inputs, model, songs, default = {"dataset": dataset.manifest.id}, None, None, TWO_STEP
    if split is not None:
        inputs["split"] = split.id
    if config.models is None or set(NETWORKS) & set(named):
        model = load(workspace, "models", model_id) if model_id else newest(workspace, "models", "train")
        inputs["models"] = model.id
        parts = parts_of(workspace, model)
        default = TWO_STEP if "rankers" in parts else TASTE
        if TWO_STEP in named and default != TWO_STEP:
            raise InputError(
                f"model {model.id} has no rankers; run `rayrec retrieval` and `rayrec rank --model {model.id}` first"
            )
        inputs |= {kind: parts[kind] for kind in ("added_songs", "retrieval", "rankers") if kind in parts}
    for network in (*([model] if model else []), *others.values()):
        require_split(network, split, dataset, "train")
    inputs |= {f"models {name}": other.id for name, other in others.items()}
    names = tuple(dict.fromkeys(named or (default, TASTE, *BASELINES)))
    if needs_vectors(names):
        trained = [part for part in (model, *others.values()) if part is not None]
        songs = load(workspace, "songs", trained[0].inputs["songs"]) if trained else newest(workspace, "songs", "embed")
        require_split(songs, split, dataset, "embed")
        inputs["songs"] = songs.id
    return ComparedModels(names=names, default=default, model=model, others=others, songs=songs, inputs=inputs)


def _named(workspace: Workspace, config: EvaluateConfig) -> tuple[list[str], dict[str, Manifest]]:
    """The names of the models wanted, and the artifacts of those given as NAME=ID."""
    names: list[str] = []
    others: dict[str, Manifest] = {}
    for spelled in config.models or ():
        name, equals, model_id = spelled.partition("=")
        if equals:
            if name in (*NETWORKS, *BASELINES, *others) or not name:
                raise InputError(f"{spelled}: name another model differently, such as r_hst={model_id}")
            others[name] = load(workspace, "models", model_id)
        elif name not in (*NETWORKS, *BASELINES):
            raise InputError(
                f"Unknown model {name!r}; expected {', '.join((*NETWORKS, *BASELINES))}, or NAME=ID for "
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
    saw = f"was trained before the test range of split {made_of}" if made_of else "was trained on all plays"
    saw += ", including the test range" if wanted and not made_of else ""
    advice = f"run `rayrec {command} --split {wanted}` first" if wanted else f"pass --split {made_of}"
    raise MismatchError(
        f"{noun(part.kind)} {part.id} {saw}, but the evaluation is of {f'split {wanted}' if wanted else 'no split'}; "
        f"{advice}"
    )


def make_recommenders(
    workspace: Workspace,
    dataset: Dataset,
    compared: ComparedModels,
    split: Split | None,
    without: Mapping[str, str] | None = None,
) -> tuple[list[BaseRecommender], np.ndarray]:
    """Fit the baselines on what final fits may see and load the networks, in the order of the names, then ablations.

    `without` names the parts that two-step is evaluated without, each with the folder of its rankers. The settings
    of baselines are chosen on the validation range, where the split has one.

    Also float64 (N,): how often each song was played there.
    """
    # A plain array: a memory map would not be shared through Ray's object store.
    vectors = np.array(workspace.read_array(compared.songs.path(FINAL))) if compared.songs else None
    allowed, selection = fit_range(split), None
    if split is not None and split.has_validation:
        songs = compared.songs
        early = np.array(workspace.read_array(songs.path(SELECTION))) if songs and SELECTION in songs.files else None
        selection = make_selection(dataset, split, early)
    fitted: dict[str, BaseRecommender] = {}
    baselines = dict.fromkeys(["popularity", *(name for name in compared.names if name in BASELINES)])
    with progress("fit baselines", len(baselines)) as bar:
        for name in baselines:
            settings = {name: tune_baseline(name, selection)} if selection and name in CHOICES else {}
            fitted[name] = fit_baselines([name], dataset, vectors, allowed, selection, settings)[0]
            bar.advance(note=name)
    if compared.model:
        fitted |= _networks(workspace, dataset, compared.model)
    for name, other in compared.others.items():
        fitted[name] = _networks(workspace, dataset, other)[TASTE]
        fitted[name].name = name
    popularity = fitted["popularity"]
    assert isinstance(popularity, PopularityRecommender)
    ablated = [_ablated(workspace, fitted[TWO_STEP], part, folder) for part, folder in (without or {}).items()]
    return [*(fitted[name] for name in compared.names), *ablated], popularity.plays


def _ablated(workspace: Workspace, two_step: BaseRecommender, part: str, folder: str) -> BaseRecommender:
    """Two-step without a part, by the rankers in a folder, named `without PART`."""
    from rayrec.recommend.two_step import TwoStepRecommender, load_rankers

    assert isinstance(two_step, TwoStepRecommender)
    model = two_step.without_part(part, load_rankers(workspace, folder))
    model.name, model.without = f"without {part}", part
    return model


def rankers_of(workspace: Workspace, compared: ComparedModels) -> Manifest:
    """The rankers of two-step, for an ablation. Raises `InputError` where two-step is not among the models."""
    if TWO_STEP not in compared.names:
        raise InputError(
            f"--ablation evaluates {TWO_STEP} without each of its parts, and it is not among the models; add it to "
            "--models, after `rayrec retrieval` and `rayrec rank`"
        )
    return load(workspace, "rankers", compared.inputs["rankers"])


def _networks(workspace: Workspace, dataset: Dataset, model: Manifest) -> dict[str, BaseRecommender]:
    """What a models artifact gives, by name: with its rankers where it has some, and the network alone."""
    from rayrec.recommend.taste_recommender import TasteRecommender  # brings torch: only once needed
    from rayrec.recommend.two_step import TwoStepRecommender

    parts = parts_of(workspace, model)
    loaded = load_recommender(workspace, dataset, {role: id for role, id in parts.items() if role != "indexes"})
    network = loaded.source.network if isinstance(loaded, TwoStepRecommender) else loaded
    assert isinstance(network, TasteRecommender)
    return {part.name: part for part in (loaded, network, network.short_only())}
