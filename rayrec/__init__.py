"""rayrec: up-to-date taste vectors for every listener, from files of plays to recommendations.

`Recommender` is the short way: fit, recommend, update. Each stage is a function too, `rayrec.embed`, `rayrec.train` and
so on, loaded at its first use: importing this package loads neither Ray nor torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rayrec.data.dataset import Dataset
from rayrec.errors import (
    DamagedArtifactError,
    InputError,
    LeakError,
    MismatchError,
    MissingDependencyError,
    NotFoundError,
    RayrecError,
)
from rayrec.recommender import Recommender, load
from rayrec.storage.workspace import Workspace

if TYPE_CHECKING:
    from rayrec.data.split import split_dataset as split_dataset
    from rayrec.jobs.add_songs import add_songs as add_songs
    from rayrec.jobs.build_index import build_index as build_index
    from rayrec.jobs.embed import embed as embed
    from rayrec.jobs.evaluate import evaluate as evaluate
    from rayrec.jobs.fit import fit as fit
    from rayrec.jobs.generate import generate as generate
    from rayrec.jobs.import_data import append_plays as append_plays
    from rayrec.jobs.import_data import import_data as import_data
    from rayrec.jobs.pipeline import run as run
    from rayrec.jobs.rank import fit_rankers as fit_rankers
    from rayrec.jobs.retrieval import fit_retrieval as fit_retrieval
    from rayrec.jobs.taste import compute_tastes as compute_tastes
    from rayrec.jobs.train import train as train
    from rayrec.jobs.update import update as update
    from rayrec.storage.releases import create_release as create_release

__version__ = version("rayrec")

# The functions behind the commands, in the order of the stages -> their modules.
STAGES = {
    "fit": "rayrec.jobs.fit",
    "update": "rayrec.jobs.update",
    "run": "rayrec.jobs.pipeline",
    "generate": "rayrec.jobs.generate",
    "import_data": "rayrec.jobs.import_data",
    "append_plays": "rayrec.jobs.import_data",
    "split_dataset": "rayrec.data.split",
    "embed": "rayrec.jobs.embed",
    "train": "rayrec.jobs.train",
    "add_songs": "rayrec.jobs.add_songs",
    "fit_retrieval": "rayrec.jobs.retrieval",
    "fit_rankers": "rayrec.jobs.rank",
    "compute_tastes": "rayrec.jobs.taste",
    "build_index": "rayrec.jobs.build_index",
    "evaluate": "rayrec.jobs.evaluate",
    "create_release": "rayrec.storage.releases",
}

__all__ = [
    "DamagedArtifactError",
    "Dataset",
    "InputError",
    "LeakError",
    "MismatchError",
    "MissingDependencyError",
    "NotFoundError",
    "RayrecError",
    "Recommender",
    "Workspace",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """A stage's function, at its first use."""
    if name not in STAGES:
        raise AttributeError(f"module 'rayrec' has no attribute {name!r}")
    return getattr(import_module(STAGES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *STAGES])
