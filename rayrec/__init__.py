"""rayrec: up-to-date taste vectors for every user, from files of plays to recommendations.

`Recommender` is the simplest interface: fit, recommend, update. Each command is also a function, `rayrec.embed`,
`rayrec.train` and so on, with its own settings class. Names are loaded at their first use: importing this package loads
neither Ray nor torch.
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
    from rayrec.data.lineage import CleanConfig as CleanConfig
    from rayrec.data.lineage import delete_garbage as delete_garbage
    from rayrec.data.lineage import find_garbage as find_garbage
    from rayrec.data.lineage import status as status
    from rayrec.data.split import SplitConfig as SplitConfig
    from rayrec.data.split import choose_split as choose_split
    from rayrec.data.split import split_dataset as split_dataset
    from rayrec.data.synthetic import GenerateConfig as GenerateConfig
    from rayrec.embeddings.word2vec import EmbedConfig as EmbedConfig
    from rayrec.evaluation.evaluator import PrefixFile as PrefixFile
    from rayrec.evaluation.experiment_report import ExperimentReportConfig as ExperimentReportConfig
    from rayrec.evaluation.experiment_report import report_experiment as report_experiment
    from rayrec.evaluation.protocol import EvaluateConfig as EvaluateConfig
    from rayrec.evaluation.report import read_results as read_results
    from rayrec.importing.descriptions import DescribeConfig as DescribeConfig
    from rayrec.importing.descriptions import describe as describe
    from rayrec.importing.import_plan import ImportConfig as ImportConfig
    from rayrec.importing.inspection import inspect_files as inspect_files
    from rayrec.jobs.add_songs import add_songs as add_songs
    from rayrec.jobs.build_index import build_index as build_index
    from rayrec.jobs.compact import compact as compact
    from rayrec.jobs.embed import embed as embed
    from rayrec.jobs.evaluate import evaluate as evaluate
    from rayrec.jobs.evaluate import evaluate_prefixes as evaluate_prefixes
    from rayrec.jobs.fit import fit as fit
    from rayrec.jobs.forget import forget_users as forget_users
    from rayrec.jobs.generate import generate as generate
    from rayrec.jobs.import_data import append_plays as append_plays
    from rayrec.jobs.import_data import import_data as import_data
    from rayrec.jobs.job_config import FitConfig as FitConfig
    from rayrec.jobs.job_config import TuneConfig as TuneConfig
    from rayrec.jobs.job_config import UpdateConfig as UpdateConfig
    from rayrec.jobs.pipeline import demo as demo
    from rayrec.jobs.pipeline import run as run
    from rayrec.jobs.rank import fit_rankers as fit_rankers
    from rayrec.jobs.recommend_all import recommend_all as recommend_all
    from rayrec.jobs.retrieval import fit_retrieval as fit_retrieval
    from rayrec.jobs.runtime import ray_cluster as ray_cluster
    from rayrec.jobs.taste import compute_tastes as compute_tastes
    from rayrec.jobs.train import train as train
    from rayrec.jobs.tune import tune as tune
    from rayrec.jobs.update import update as update
    from rayrec.jobs.verify import verify_workspace as verify_workspace
    from rayrec.model.train_config import TasteConfig as TasteConfig
    from rayrec.model.train_config import TrainConfig as TrainConfig
    from rayrec.online.load_states import load_states as load_states
    from rayrec.online.state_store import open_store as open_store
    from rayrec.online.state_store import store_uri as store_uri
    from rayrec.recommend.answer import RecommendConfig as RecommendConfig
    from rayrec.recommend.answer import answer as answer
    from rayrec.recommend.answer import load_recommender as load_recommender
    from rayrec.recommend.index import IndexConfig as IndexConfig
    from rayrec.recommend.two_step_config import RankConfig as RankConfig
    from rayrec.recommend.two_step_config import RetrievalConfig as RetrievalConfig
    from rayrec.storage.locking import unlock as unlock
    from rayrec.storage.releases import activate_release as activate_release
    from rayrec.storage.releases import active_release as active_release
    from rayrec.storage.releases import create_release as create_release
    from rayrec.storage.releases import default_parts as default_parts
    from rayrec.storage.releases import list_releases as list_releases
    from rayrec.storage.releases import rollback as rollback
    from rayrec.storage.releases import verify_release as verify_release

__version__: str  # read at its first use: a clone that is not installed has none, and `make gpu-check` runs there

# Function of a command -> its module, in the order of the help.
STAGES = {
    "demo": "rayrec.jobs.pipeline",
    "fit": "rayrec.jobs.fit",
    "update": "rayrec.jobs.update",
    "generate": "rayrec.jobs.generate",
    "inspect_files": "rayrec.importing.inspection",
    "import_data": "rayrec.jobs.import_data",
    "append_plays": "rayrec.jobs.import_data",
    "compact": "rayrec.jobs.compact",
    "describe": "rayrec.importing.descriptions",
    "split_dataset": "rayrec.data.split",
    "embed": "rayrec.jobs.embed",
    "train": "rayrec.jobs.train",
    "add_songs": "rayrec.jobs.add_songs",
    "fit_retrieval": "rayrec.jobs.retrieval",
    "fit_rankers": "rayrec.jobs.rank",
    "compute_tastes": "rayrec.jobs.taste",
    "build_index": "rayrec.jobs.build_index",
    "evaluate": "rayrec.jobs.evaluate",
    "evaluate_prefixes": "rayrec.jobs.evaluate",
    "create_release": "rayrec.storage.releases",
    "list_releases": "rayrec.storage.releases",
    "activate_release": "rayrec.storage.releases",
    "rollback": "rayrec.storage.releases",
    "verify_release": "rayrec.storage.releases",
    "load_states": "rayrec.online.load_states",
    "answer": "rayrec.recommend.answer",
    "recommend_all": "rayrec.jobs.recommend_all",
    "report_experiment": "rayrec.evaluation.experiment_report",
    "status": "rayrec.data.lineage",
    "verify_workspace": "rayrec.jobs.verify",
    "find_garbage": "rayrec.data.lineage",
    "delete_garbage": "rayrec.data.lineage",
    "forget_users": "rayrec.jobs.forget",
    "unlock": "rayrec.storage.locking",
    "run": "rayrec.jobs.pipeline",
    "tune": "rayrec.jobs.tune",
}
# Other names that calls of the stages need -> their modules.
HELPERS = {
    "ray_cluster": "rayrec.jobs.runtime",
    "choose_split": "rayrec.data.split",
    "PrefixFile": "rayrec.evaluation.evaluator",
    "read_results": "rayrec.evaluation.report",
    "default_parts": "rayrec.storage.releases",
    "active_release": "rayrec.storage.releases",
    "load_recommender": "rayrec.recommend.answer",
    "open_store": "rayrec.online.state_store",
    "store_uri": "rayrec.online.state_store",
}
# Settings class of a stage -> its module.
SETTINGS = {
    "FitConfig": "rayrec.jobs.job_config",
    "UpdateConfig": "rayrec.jobs.job_config",
    "GenerateConfig": "rayrec.data.synthetic",
    "ImportConfig": "rayrec.importing.import_plan",
    "DescribeConfig": "rayrec.importing.descriptions",
    "SplitConfig": "rayrec.data.split",
    "EmbedConfig": "rayrec.embeddings.word2vec",
    "TrainConfig": "rayrec.model.train_config",
    "RetrievalConfig": "rayrec.recommend.two_step_config",
    "RankConfig": "rayrec.recommend.two_step_config",
    "TasteConfig": "rayrec.model.train_config",
    "IndexConfig": "rayrec.recommend.index",
    "EvaluateConfig": "rayrec.evaluation.protocol",
    "RecommendConfig": "rayrec.recommend.answer",
    "ExperimentReportConfig": "rayrec.evaluation.experiment_report",
    "CleanConfig": "rayrec.data.lineage",
    "TuneConfig": "rayrec.jobs.job_config",
}
_MODULES = STAGES | HELPERS | SETTINGS

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
__all__ += list(_MODULES)


if not TYPE_CHECKING:  # with this function, a type checker accepts any name

    def __getattr__(name: str) -> Any:
        """Return the version, or import a name of `_MODULES`, at its first use."""
        if name == "__version__":
            return version("rayrec")
        if name not in _MODULES:
            raise AttributeError(f"module 'rayrec' has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
