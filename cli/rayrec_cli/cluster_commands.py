"""submit, plan, bench: run commands on a cluster, estimate what they need there, and measure how fast they are."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from rayrec.bench.bench_config import CONFIGS, WITH_RATES, BenchConfig
from rayrec.data.dataset import Dataset
from rayrec.errors import InputError
from rayrec.jobs.planning.plan_inputs import DataSize, PlanConfig, measure_skew, read_cluster, read_rates
from rayrec_cli.app import (
    COMMAND_ORDER,
    Call,
    CommandOutput,
    app,
    bench_app,
    command,
    note,
    number,
    short,
    size,
    table,
    values_view,
)

WordsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="COMMAND...", help="A rayrec command with its options.")
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Dashboard address of the cluster, http://HOST:8265."),
]
PythonOption = Annotated[
    str | None,
    typer.Option("--python", metavar="PATH", help="Python interpreter on the cluster. [default: that of the image]"),
]
FilesOption = Annotated[
    str | None, typer.Option("--files", metavar="DIR", help="Folder to upload; the command runs in it.")
]
DetachOption = Annotated[
    bool, typer.Option("--detach", help="Print the job ID and return without waiting for the job.")
]
AttachOption = Annotated[str | None, typer.Option("--attach", metavar="ID", help="Follow a submitted job.")]
ClusterOption = Annotated[
    str,
    typer.Option("--cluster", metavar="FILE", help="Cluster file for ray up, or KubeRay manifest with a RayCluster."),
]
RatesOption = Annotated[
    str | None,
    typer.Option("--rates", metavar="FILE", help="File of measured rates, from rayrec bench scale --save FILE."),
]
StopOption = Annotated[str | None, typer.Option("--stop", metavar="ID", help="Stop a job.")]

LOCAL_COMMANDS = ("submit", "plan")  # commands that do not run on a cluster

QuickOption = Annotated[bool, typer.Option("--quick", help="Small data and few rounds, for a smoke test.")]
SaveOption = Annotated[
    str | None, typer.Option("--save", metavar="FILE", help="Merge the measured rates into this JSON file.")
]


@command(
    app,
    "submit",
    options_first=True,
    example="rayrec --workspace s3://music/rayrec submit train --epochs 8 --workers 4 --gpu",
)
def submit(
    call: Call,
    *,
    words: WordsArgument = None,
    address: AddressOption = None,
    python: PythonOption = None,
    files: FilesOption = None,
    detach: DetachOption = False,
    attach: AttachOption = None,
    stop: StopOption = None,
) -> CommandOutput:
    """Run a command on a Ray cluster as a job.

    Prints the job's log to stderr and exits with the job's exit code. Ctrl-C leaves the job running; --attach
    follows it again, --stop stops it. Options of submit come before COMMAND.
    """
    words = words or []
    if (bool(words), attach is not None, stop is not None).count(True) != 1:
        raise InputError("pass exactly one of COMMAND, --attach ID and --stop ID; see rayrec submit --help")
    if words and (words[0] not in COMMAND_ORDER or words[0] in LOCAL_COMMANDS):
        allowed_commands = ", ".join(name for name in COMMAND_ORDER if name not in LOCAL_COMMANDS)
        raise InputError(f"Command {words[0]!r} cannot be submitted; expected one of {allowed_commands}")
    from rayrec.jobs.submit import IMAGE_PYTHON, NOT_FOUND, Cluster

    cluster = Cluster(address)
    if stop is not None:
        return _job_output(cluster.stop(stop), exit_code=0)
    job = attach
    if job is None:
        workspace = None if any(word.split("=")[0] == "--workspace" for word in words) else call.uri
        job = cluster.submit(words, workspace=workspace, python=python or IMAGE_PYTHON, files=files)
        if detach:
            return _job_output(cluster.job_state(job), exit_code=0, follow=f"rayrec submit --attach {job}")
        note(f"Submitted job {job} to {cluster.address}")
    try:
        job_state = cluster.follow(job, _write)
    except KeyboardInterrupt:
        note(f"The job keeps running; follow it with: rayrec submit --attach {job}")
        raise
    if job_state.exit_code == NOT_FOUND and python is None:
        note(f"The cluster has no {IMAGE_PYTHON}; pass the path of its interpreter with --python")
    return _job_output(job_state, exit_code=job_state.exit_code or 0)


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _job_output(job_state: Any, *, exit_code: int, follow: str | None = None) -> CommandOutput:
    """Return the output of the command: the state of a job, with `exit_code`."""
    data = {key: value for key, value in job_state.to_mapping().items() if value is not None}
    shown_values = {key: data[key] for key in ("status", "seconds", "exit_code") if key in data}
    hint = [] if follow is None else [f"Follow it with: {follow}"]
    return CommandOutput(data, [values_view(f"Job {job_state.job}", shown_values), *hint], exit_code=exit_code)


@command(
    app,
    "plan",
    config=PlanConfig,
    example="rayrec plan --cluster cluster/aws.yaml --users 100000000 --plays 20000000000 --songs 10000000",
)
def estimate(
    call: Call,
    config: PlanConfig,
    *,
    cluster: ClusterOption,
    rates: RatesOption = None,
) -> CommandOutput:
    """Estimate time, memory and storage of the stages on a cluster.

    Uses the data set of the workspace, or the sizes given by --users, --plays and --songs. Exit code 1 if a stage does
    not fit.
    """
    from rayrec.jobs.planning.plan import make_plan

    cluster_file = read_cluster(cluster)
    skew: dict[str, Any] = {}
    if config.users and config.plays and config.songs:
        data_size = DataSize.assumed(config.users, config.plays, config.songs, config.buckets)
    else:
        dataset = Dataset(call.workspace)
        data_skew = measure_skew(dataset)
        data_size = DataSize.of(dataset.manifest, data_skew)
        skew = {"largest_buckets": data_skew.largest_buckets, "longest_histories": data_skew.longest_histories}
    plan = make_plan(data_size, cluster_file, config, read_rates(rates) if rates else None, skew)
    return CommandOutput(plan.to_mapping(), plan_views(plan), exit_code=1 if plan.problems else 0)


def plan_views(plan: Any) -> list[RenderableType]:
    """Return the views of a plan: one line per stage, storage, requests, server, and problems."""
    rows = []
    for stage in plan.stages:
        needed, available = size(stage.memory), size(stage.memory_there)
        rows.append(
            [stage.stage, stage.node, stage.nodes, stage.workers, needed, available, stage.batches, stage.hours]
        )
    headers = ["stage", "node", "nodes", "workers", "memory", "available", "batches", "hours"]
    storage_sizes = {name: size(count) for name, count in plan.storage.items()}
    storage_sizes["local disk for embed"] = size(plan.disk)
    storage_sizes["store of user states"] = size(plan.states)
    views: list[RenderableType] = [
        table(f"{plan.data.plays:,} plays on cluster {plan.cluster}", headers, rows, left=["node"]),
        values_view("Storage", storage_sizes),
    ]
    requests = {stage.stage: stage.requests for stage in plan.stages if stage.requests is not None}
    views.append(values_view("Requests to object storage", requests))
    object_stores = {stage.stage: size(stage.store) for stage in plan.stages if stage.store}
    views.append(values_view("Ray object store per node", object_stores))
    if plan.serving is not None:
        views.append(values_view("Server", _server_figures(plan.serving)))
    for name, pairs in plan.skew.items():
        views.append(
            table(
                name.replace("_", " ").capitalize(), ["bucket" if name == "largest_buckets" else "user", "plays"], pairs
            )
        )
    views.extend(f"Does not fit: {problem}" for problem in plan.problems)
    views.extend(f"Note: {text}" for text in plan.notes)
    return views


def _server_figures(plan: Any) -> dict[str, Any]:
    """Return the figures of the server: replicas for the rate of requests, and memory of their nodes."""
    return {
        "requests per second": plan.requests_per_second,
        "replicas": plan.replicas,
        "nodes": plan.nodes,
        "private memory per replica": size(plan.replica_memory),
        "shared memory per node": size(plan.shared_memory),
        "memory per node": size(plan.node_memory),
    }


def _register_bench(name: str, config_class: type[BenchConfig]) -> None:
    def run(call: Call, config: BenchConfig, *, quick: QuickOption = False) -> CommandOutput:
        return _run_bench(name, call, config, quick)

    def run_and_save(
        call: Call, config: BenchConfig, *, quick: QuickOption = False, save: SaveOption = None
    ) -> CommandOutput:
        return _run_bench(name, call, config, quick, save)

    body = run_and_save if name in WITH_RATES else run
    body.__doc__ = config_class.__doc__
    command(bench_app, name, config=config_class, example=f"rayrec bench {name} --quick")(body)


for _name, _config in CONFIGS.items():
    _register_bench(_name, _config)


def _run_bench(name: str, call: Call, config: BenchConfig, quick: bool, save: str | None = None) -> CommandOutput:
    from rayrec.bench.suite import bench

    result = bench(name, call.workspace, config.with_quick_sizes() if quick else config, save=save)
    plain_values = {key: value for key, value in result.items() if key not in BENCH_TABLES.get(name, ())}
    return CommandOutput(
        result,
        [values_view(f"bench {name}", _flatten_values(plain_values)), *BENCH_VIEWS.get(name, lambda _: [])(result)],
    )


def _flatten_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values on one level, with names such as `speedups train`; a list of plain values becomes a text."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
            flat[name] = ", ".join(map(number, value))
        elif isinstance(value, dict | list):
            parts = (
                value if isinstance(value, dict) else {str(position): item for position, item in enumerate(value, 1)}
            )
            flat |= {f"{name} {part_name}": item for part_name, item in _flatten_values(parts).items()}
        else:
            flat[name] = value
    return flat


def serve_loads(result: dict[str, Any]) -> list[RenderableType]:
    """Return a table of loads for each catalog."""
    views: list[RenderableType] = []
    headers = ["application, request, clients", "requests/s", "p50 ms", "p99 ms", "errors"]
    for catalog in result["catalogs"]:
        loads = catalog["loads"].items()
        rows = [[name, load["per_second"], load["p50_ms"], load["p99_ms"], load["errors"]] for name, load in loads]
        views.append(table(f"{catalog['songs']:,} songs", headers, rows, left=headers[:1]))
    return views


def simulated(result: dict[str, Any]) -> list[RenderableType]:
    """Return a table of the hours of each stage, with the shares of computing, waiting and loss."""
    headers = ["stage", "hours", "plan", "busy", "storage", "lost", "idle", "bottleneck", "+s per loss"]
    names = ("stage", "hours", "plan_hours", "busy", "storage", "lost", "idle", "bottleneck", "lost_node_seconds")
    rows = [[stage[name] for name in names] for stage in result["stages"]]
    title = f"{result['plays']:,} plays on {result['nodes']} nodes of {result['cores']} cores, simulated"
    return [table(title, headers, rows, left=["bottleneck"])]


def answer_stages(result: dict[str, Any]) -> list[RenderableType]:
    """Return a table of CPU time and memory of each stage of an answer, with two columns per catalog."""
    catalogs = result["catalogs"]
    headers = [f"{name}\n{short(catalog['songs'])}" for catalog in catalogs for name in ("CPU ms", "kB")]
    rows = [
        [stage, *(value for result_of_catalog in catalogs for value in _stage_cost(result_of_catalog["stages"][stage]))]
        for stage in catalogs[0]["stages"]
    ]
    title = "An answer by stage and number of songs; kB is the peak memory"
    return [table(title, ["stage", *headers], rows)]


def _stage_cost(stage_values: dict[str, float]) -> tuple[float, int]:
    return stage_values["cpu_ms"], round(stage_values["bytes"] / 1000)


BENCH_VIEWS = {"serve": serve_loads, "simulate": simulated, "answers": answer_stages}  # in addition to the figures
BENCH_TABLES = {"serve": ("catalogs",), "simulate": ("stages",)}  # keys of the result that one of BENCH_VIEWS shows
