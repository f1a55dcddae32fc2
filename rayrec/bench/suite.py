"""All benchmarks by name, and the function that runs one of them."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rayrec.bench.answers_bench import bench_answers
from rayrec.bench.bench_config import CONFIGS, BenchConfig, check_name
from rayrec.bench.rounds import check_rates_file, save_rates
from rayrec.bench.scale_bench import bench_memory, bench_scale
from rayrec.bench.serve_bench import bench_serve
from rayrec.bench.simulate_bench import bench_simulate
from rayrec.bench.soak import soak
from rayrec.bench.stage_benches import bench_embed, bench_index, bench_song_side, bench_taste, bench_train
from rayrec.bench.states_bench import bench_states
from rayrec.jobs.runtime import WORKER_ENVIRONMENT
from rayrec.storage.workspace import Workspace

BENCHES: dict[str, Callable[[Workspace, Any], dict[str, Any]]] = {
    "train": bench_train,
    "taste": bench_taste,
    "embed": bench_embed,
    "index": lambda bench_workspace, config: bench_index(config).to_json(),
    "songs": lambda bench_workspace, config: bench_song_side(config).to_json(),
    "memory": bench_memory,
    "scale": bench_scale,
    "simulate": bench_simulate,
    "answers": bench_answers,
    "states": bench_states,
    "serve": bench_serve,
    "soak": soak,
}
OF_SERVER = ("serve", "soak")  # their server starts in the environment of the user, unchanged


def bench(
    name: str, workspace: Workspace | None = None, config: BenchConfig | None = None, *, save: str | None = None
) -> dict[str, Any]:
    """Run one benchmark and return its figures.

    Generated data stay under bench/ of the workspace for the next run; without a workspace they are temporary. `config`
    is an instance of the benchmark's class in CONFIGS. `save` is the path of a rates file into which the measured rates
    are merged. Raises `InputError` for an unknown name and for a file that is not a rates file.
    """
    check_name(name)
    if save:
        check_rates_file(save)
    if name not in OF_SERVER:
        # Set before Ray starts: its workers then have the niceness of the driver, like the plain loops, and the plain
        # loops have the environment of Ray's workers, which the memory allocator reads when a process starts.
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.update(WORKER_ENVIRONMENT)
    with bench_workspace(workspace) as opened:
        result = BENCHES[name](opened, config or CONFIGS[name]())
    if save:
        save_rates(save, result)
    return result


@contextmanager
def bench_workspace(workspace: Workspace | None) -> Iterator[Workspace]:
    """Yield the workspace for generated data: bench/ of `workspace`, or a temporary folder."""
    if workspace is not None:
        yield Workspace(f"{workspace.uri}/bench")
        return
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        yield Workspace(folder)
