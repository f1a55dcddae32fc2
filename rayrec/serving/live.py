"""The live release: its parts loaded as one object.

A request takes the object once, at its start, and uses nothing else to its end: no answer comes of
the model of one release and the index of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rayrec.data.dataset import Dataset
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.base import Recommender
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.serving.catalog import Songs
from rayrec.serving.engine import Engine
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class LiveRelease:
    """A release as requests use it; nothing in it changes."""

    release: Manifest
    songs: Songs
    engine: Engine  # model and index, in this process or behind deployments of their own

    @property
    def id(self) -> str:
        """The release's id."""
        return self.release.id

    @property
    def model_id(self) -> str:
        """The id of its model, whose states no other model may be fed."""
        return self.release.inputs["models"]


def load_parts(workspace: Workspace, release_id: str) -> tuple[Manifest, Recommender]:
    """A release, the files that are loaded compared with their checksums, and its recommender.

    Raises as `load_release` does, and `MismatchError` where the parts do not belong together.
    """
    release = load_release(workspace, release_id, ("models", "indexes", "retrieval", "rankers"))
    parts = release.inputs
    recommender = load_recommender(
        workspace,
        Dataset(workspace),
        parts,
    )
    return release, recommender


def load_network(workspace: Workspace, release_id: str) -> tuple[Manifest, TasteRecommender]:
    """As `load_parts`, with the network alone: no index, no rankers."""
    release = load_release(workspace, release_id, ("models",))
    return release, TasteRecommender.load(workspace, release.inputs["models"])


def load_release(workspace: Workspace, release_id: str, kinds: Sequence[str]) -> Manifest:
    """A release, its songs and its parts of some kinds compared with their checksums.

    Tastes and plays are not: a replica loads none of them, and reading those of all users would keep it from
    starting. Raises `NotFoundError` or `DamagedArtifactError` for a release that cannot be trusted.
    """
    release = artifacts.load(workspace, releases.KIND, release_id)
    releases.verify_release(workspace, release, kinds, plays=False)
    return release
