"""rayrec: up-to-date taste vectors for every listener, from files of plays to recommendations.

Each stage is a function of `rayrec.jobs`; what is exported here is what every use of them needs.
Importing this package loads neither Ray nor torch.
"""

from importlib.metadata import version

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
from rayrec.storage.workspace import Workspace

__version__ = version("rayrec")

__all__ = [
    "DamagedArtifactError",
    "Dataset",
    "InputError",
    "LeakError",
    "MismatchError",
    "MissingDependencyError",
    "NotFoundError",
    "RayrecError",
    "Workspace",
    "__version__",
]
