"""bench: one command for each benchmark."""

from typing import Annotated, Any

import typer
from rich.console import RenderableType

from rayrec.bench.bench_config import CONFIGS, WITH_RATES, BenchConfig
from rayrec_cli.app import Call, Shown, bench_app, command, figures, table

QuickOption = Annotated[bool, typer.Option("--quick", help="Small data and few rounds, for a smoke test.")]
SaveOption = Annotated[
    str | None, typer.Option("--save", metavar="FILE", help="Merge the measured rates into this JSON file.")
]


def _register(name: str, config_class: type[BenchConfig]) -> None:
    def run(call: Call, config: BenchConfig, *, quick: QuickOption = False) -> Shown:
        return _shown(name, call, config, quick)

    def run_and_save(call: Call, config: BenchConfig, *, quick: QuickOption = False, save: SaveOption = None) -> Shown:
        return _shown(name, call, config, quick, save)

    body = run_and_save if name in WITH_RATES else run
    body.__doc__ = config_class.__doc__
    command(bench_app, name, config=config_class, example=f"rayrec bench {name} --quick")(body)


for _name, _config in CONFIGS.items():
    _register(_name, _config)


def _shown(name: str, call: Call, config: BenchConfig, quick: bool, save: str | None = None) -> Shown:
    from rayrec.bench.suite import bench

    result = bench(name, call.workspace, config.with_quick_sizes() if quick else config, save=save)
    whole = {key: value for key, value in result.items() if key not in APART.get(name, ())}
    return Shown(result, [figures(f"bench {name}", whole), *VIEWS.get(name, lambda _: [])(result)])


def serve_loads(result: dict[str, Any]) -> list[RenderableType]:
    """A table of loads for each catalog."""
    views: list[RenderableType] = []
    headers = ["application, request, clients", "requests/s", "p50 ms", "p99 ms", "errors"]
    for catalog in result["catalogs"]:
        loads = catalog["loads"].items()
        rows = [[name, load["per_second"], load["p50_ms"], load["p99_ms"], load["errors"]] for name, load in loads]
        views.append(table(f"{catalog['songs']:,} songs", headers, rows, left=headers[:1]))
    return views


def simulated(result: dict[str, Any]) -> list[RenderableType]:
    """Hours of each stage and what they went to."""
    headers = ["stage", "hours", "plan", "busy", "storage", "lost", "idle", "bottleneck", "lost node s"]
    names = ("stage", "hours", "plan_hours", "busy", "storage", "lost", "idle", "bottleneck", "lost_node_seconds")
    rows = [[stage[name] for name in names] for stage in result["stages"]]
    title = f"{result['plays']:,} plays on {result['nodes']} nodes of {result['cores']} cores, simulated"
    return [table(title, headers, rows, left=["bottleneck"])]


def answer_stages(result: dict[str, Any]) -> list[RenderableType]:
    """CPU time and memory of each stage of an answer, a column pair for each catalog."""
    catalogs = result["catalogs"]
    headers = [f"{name} {catalog['songs']:,}" for catalog in catalogs for name in ("CPU ms", "kB")]
    rows = [
        [stage, *(value for one in catalogs for value in _stage(one["stages"][stage]))]
        for stage in catalogs[0]["stages"]
    ]
    title = "An answer by stage and number of songs; memory is the most at one moment"
    return [table(title, ["stage", *headers], rows)]


def _stage(figures_of_stage: dict[str, float]) -> tuple[float, int]:
    return figures_of_stage["cpu_ms"], round(figures_of_stage["bytes"] / 1000)


VIEWS = {"serve": serve_loads, "simulate": simulated, "answers": answer_stages}  # beside the figures
APART = {"serve": ("catalogs",), "simulate": ("stages",)}  # of the result, which a view of its own shows
