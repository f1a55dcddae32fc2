"""The benchmarks by name: each stage as users run it against its plain loop, and how stages scale."""

import os
from collections.abc import Callable
from typing import Any

from rayrec.bench.answers_bench import bench_answers
from rayrec.bench.bench_config import BenchConfig, check_name
from rayrec.bench.bench_data import bench_place
from rayrec.bench.index_bench import bench_index, bench_song_side
from rayrec.bench.job_benches import bench_embed, bench_taste, bench_train
from rayrec.bench.rates import check_rates_file, save_rates
from rayrec.bench.scale_bench import bench_memory, bench_scale
from rayrec.bench.simulate_bench import bench_simulate
from rayrec.bench.states_bench import bench_states
from rayrec.jobs.runtime import WORKER_ENVIRONMENT
from rayrec.storage.workspace import Workspace

BENCHES: dict[str, Callable[[Workspace, BenchConfig], dict[str, Any]]] = {
    "train": bench_train,
    "taste": bench_taste,
    "index": lambda place, config: bench_index(config).to_json(),
    "embed": bench_embed,
    "memory": bench_memory,
    "songs": lambda place, config: bench_song_side(config).to_json(),
    "scale": bench_scale,
    "simulate": bench_simulate,
    "answers": bench_answers,
    "states": bench_states,
}


def bench(
    name: str,
    workspace: Workspace | None = None,
    config: BenchConfig | None = None,
    *,
    quick: bool = False,
    save: str | None = None,
) -> dict[str, Any]:
    """Run one benchmark; its figures as one flat object.

    Generated data stay under bench/ of the workspace for the next run; without one they are
    temporary. `quick` is for a look whether it works. `save` names a file of rates to merge the
    measured ones into. Raises `InputError` for another name and for a file of something else.
    """
    check_name(name)
    if save:
        check_rates_file(save)
    config = config or (BenchConfig.quick() if quick else BenchConfig())
    # Before Ray starts: its workers as nice as the driver, like the plain loops, and these with the
    # environment of its workers, which the allocator reads when a process starts.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.update(WORKER_ENVIRONMENT)
    with bench_place(workspace) as place:
        told = BENCHES[name](place, config)
    if save:
        save_rates(save, told)
    return told
