"""Put one replica together: with its model and index in this process, which needs no Ray."""

import os
import socket
import uuid
from collections.abc import Callable

from rayrec.serving.auth import Keys, load_keys
from rayrec.serving.catalog import load_songs
from rayrec.serving.engine import LocalEngine, Parts, Pool
from rayrec.serving.holder import ReleaseHolder
from rayrec.serving.live import LiveRelease, load_parts
from rayrec.serving.prometheus import Metrics
from rayrec.serving.reports import Reports
from rayrec.serving.serve_config import ServeConfig
from rayrec.serving.service import Service
from rayrec.serving.user_states import UserStates
from rayrec.storage.workspace import Workspace


def open_service(
    workspace: Workspace, config: ServeConfig, *, replica: str | None = None, keys: Keys | None = None
) -> Service:
    """A service that answers from this process, watching which release is live; `close` it in the end.

    Raises `InputError` where it needs keys and has none.
    """
    name = replica or own_name()
    metrics, pool = Metrics(name), Pool(config.max_waiting)
    metrics.watch_waiting(lambda: pool.waiting)

    def load(release_id: str) -> LiveRelease:
        one_thread()
        release, recommender = load_parts(workspace, release_id)
        songs = load_songs(workspace, release, recommender)
        return LiveRelease(release=release, songs=songs, engine=LocalEngine(Parts(recommender, metrics), pool))

    return make_service(workspace, config, keys or load_keys(config), metrics, load)


def make_service(
    workspace: Workspace,
    config: ServeConfig,
    keys: Keys,
    metrics: Metrics,
    load: Callable[[str], LiveRelease],
) -> Service:
    """A service whose releases `load` loads, by their id; it watches which one is live."""

    def switched(live: LiveRelease) -> None:
        metrics.release(live.id, live.model_id)
        metrics.watch_cache("masks", live.songs.masks.lookups)

    holder = ReleaseHolder(
        workspace=workspace,
        load=load,
        reports=Reports(workspace),
        replica=metrics.replica,
        watch_seconds=config.watch_seconds,
        on_switch=switched,
    )
    states = UserStates(workspace, config.store, metrics)
    holder.start()
    return Service(holder, config, keys, metrics, states)


def own_name() -> str:
    """A name that no other replica has."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def one_thread() -> None:
    """Keep torch to one thread: spinning threads of several replicas on the same cores starve each other."""
    import torch

    torch.set_num_threads(1)
