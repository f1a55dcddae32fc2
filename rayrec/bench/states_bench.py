"""`rayrec bench states`: seconds and CPU seconds to load all users of a release into a new store of each kind.

The users are generated. At most `TEMPLATES` users are simulated; all users of the release repeat their plays and taste
vectors under other ids.
"""

import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch

from rayrec.bench.bench_config import StatesBenchConfig
from rayrec.bench.redis_servers import SERVER, RedisServer
from rayrec.bench.stage_benches import EMBEDDING_DIM, SONGS_PER_ARTIST
from rayrec.data import columns
from rayrec.data.dataset import Dataset, bucket_of
from rayrec.data.histories import Histories, concatenate
from rayrec.data.synthetic import CONTEXTS, GenerateConfig, World
from rayrec.display import progress
from rayrec.jobs.trainer import model_config
from rayrec.model.checkpoint import save_model
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import TasteModel
from rayrec.model.taste_table import taste_table, taste_writer, tastes_file
from rayrec.model.train_config import TrainConfig
from rayrec.online.load_states import load_states
from rayrec.online.state_store import open_store
from rayrec.storage import artifacts
from rayrec.storage.artifacts import DatasetManifest, Manifest, write_dataset_manifest
from rayrec.storage.workspace import SONGS_TABLE, Workspace, histories_file

TEMPLATES = 2_000
USERS_PER_BUCKET = 20_000
ID = "states"  # id of the release and of its parts


def bench_states(bench_workspace: Workspace, config: StatesBenchConfig) -> dict[str, Any]:
    """Run `rayrec states load` into an SQLite file and, if redis-server is installed, into a Redis server started here.

    Figures of each store: seconds, users_per_second, cpu_seconds of all processes that load, server_cpu_seconds of the
    Redis server, and user_bytes, the bytes per user. The Redis server writes every command to disk before it answers.
    """
    workspace = Workspace(f"{bench_workspace.uri}/states-{config.users}-{config.seed}")
    started = time.perf_counter()
    release = _states_release(workspace, config)
    result: dict[str, Any] = {"name": "states", "unit": "users", "users": config.users}
    result["build_seconds"] = round(time.perf_counter() - started, 1)
    with tempfile.TemporaryDirectory(prefix="rayrec-store-") as folder:
        for store in ("sqlite", "redis") if SERVER else ("sqlite",):
            with _temporary_store(store, Path(folder) / store) as (uri, server, store_bytes):
                metrics = _measure_load(workspace, release, uri, server)
                metrics["user_bytes"] = store_bytes() / config.users
            result |= {f"{store}_{name}": value for name, value in metrics.items()}
    return result


@contextmanager
def _temporary_store(kind: str, folder: Path) -> Iterator[tuple[str, psutil.Process | None, Callable[[], int]]]:
    """Yield the address of a new store, the process of its server, and a function that returns its size in bytes."""
    folder.mkdir()
    if kind == "sqlite":
        yield f"sqlite:///{folder}/states.db", None, lambda: sum(file.stat().st_size for file in folder.iterdir())
        shutil.rmtree(folder)
        return
    server = RedisServer(folder)
    server.start()
    assert server.process is not None
    try:
        empty_bytes = int(server.ask("INFO", "memory")["used_memory"])
        yield (
            server.uri,
            psutil.Process(server.process.pid),
            lambda: int(server.ask("INFO", "memory")["used_memory"]) - empty_bytes,
        )
    finally:
        server.kill()


def _measure_load(workspace: Workspace, release: Manifest, uri: str, server: psutil.Process | None) -> dict[str, Any]:
    dataset = Dataset(workspace)
    store = open_store(uri, dataset.lineage)
    started, cpu_before = time.perf_counter(), _client_cpu_seconds()
    server_cpu_before = _cpu_seconds(server)
    load_result = load_states(dataset, store, release)
    store.close()
    seconds = time.perf_counter() - started
    assert load_result.added == dataset.manifest.users, asdict(load_result)
    return {
        "seconds": seconds,
        "users_per_second": load_result.users / seconds,
        "cpu_seconds": _client_cpu_seconds() - cpu_before,
        "server_cpu_seconds": _cpu_seconds(server) - server_cpu_before,
    }


def _client_cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its child processes that have ended."""
    usages = [resource.getrusage(target) for target in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _cpu_seconds(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    cpu_times = process.cpu_times()
    return float(cpu_times.user + cpu_times.system)


def _states_release(workspace: Workspace, config: StatesBenchConfig) -> Manifest:
    """Return a release of generated users with taste vectors; that of an earlier run is used again."""
    if not workspace.exists(f"releases/{ID}/manifest.json"):
        _write_states_release(workspace, config)
    return artifacts.load_manifest(workspace, "releases", ID)


def _write_states_release(workspace: Workspace, config: StatesBenchConfig) -> None:
    artists = max(GenerateConfig().genres, config.songs // SONGS_PER_ARTIST)
    users = min(TEMPLATES, config.users)
    settings = GenerateConfig(
        users=users, songs=config.songs, plays=config.plays, artists=artists, playlists=0, buckets=1, seed=config.seed
    )
    world = World(settings)
    templates = concatenate(list(world.blocks(np.arange(users))))
    user_ids = np.array([f"user-{number:09d}" for number in range(config.users)], dtype=object)
    buckets = -(-len(user_ids) // USERS_PER_BUCKET)
    workspace.write_table(SONGS_TABLE, world.songs_table())
    dataset = _write_manifest(workspace, templates, users=len(user_ids), songs=config.songs, buckets=buckets)
    model, model_manifest = _write_model(dataset, config)
    template_table = taste_table(TasteEncoder(model), templates, dataset.manifest.last_play)
    inputs = {"dataset": dataset.manifest.id, "models": model_manifest.id}
    tastes_manifest = Manifest(kind="tastes", id=ID, inputs=inputs)
    user_buckets, file_names = bucket_of(user_ids, buckets), []
    with progress("Users", buckets) as bar:
        for bucket in range(buckets):
            bucket_user_ids = user_ids[user_buckets == bucket]  # ascending, as in all histories
            rows = np.arange(len(bucket_user_ids)) % len(templates)
            workspace.write_table(
                histories_file(0, bucket),
                replace(templates.take(rows), user_ids=bucket_user_ids, totals=None).to_arrow(),
            )
            path = tastes_file(tastes_manifest.folder, bucket)
            bucket_table = template_table.take(rows).set_column(0, columns.USER, pa.array(bucket_user_ids, pa.string()))
            with workspace.open_output(path) as stream, taste_writer(stream, bucket_table.schema) as writer:
                writer.write_table(bucket_table)
            file_names.append(path.removeprefix(f"{tastes_manifest.folder}/"))
            bar.advance()
    artifacts.publish(workspace, tastes_manifest, file_names)
    artifacts.publish(workspace, Manifest(kind="releases", id=ID, inputs={**inputs, "tastes": tastes_manifest.id}), [])


def _write_manifest(workspace: Workspace, templates: Histories, *, users: int, songs: int, buckets: int) -> Dataset:
    plays = round(users * templates.num_plays / len(templates))
    manifest = DatasetManifest(
        id=ID, source="generated", buckets=buckets, parts=1, users=users, plays=plays, songs=songs,
        first_play=int(templates.played_at.min()), last_play=int(templates.played_at.max()), contexts=list(CONTEXTS),
        has_skipped=True,
    )  # fmt: skip
    write_dataset_manifest(workspace, manifest)
    return Dataset(workspace)


def _write_model(dataset: Dataset, config: StatesBenchConfig) -> tuple[TasteModel, Manifest]:
    """Write a network of the default shape with random weights; its states have the size of trained ones."""
    torch.manual_seed(config.seed)
    vectors = torch.nn.functional.normalize(torch.randn(dataset.num_songs, EMBEDDING_DIM))
    model = TasteModel(model_config(dataset, TrainConfig(), EMBEDDING_DIM), vectors).eval()
    manifest = Manifest(kind="models", id=ID, inputs={"dataset": dataset.manifest.id}, seed=config.seed)
    file_names = save_model(dataset.workspace, manifest.folder, model, np.ones(dataset.num_songs, dtype=np.bool_))
    return model, artifacts.publish(dataset.workspace, manifest, file_names)
