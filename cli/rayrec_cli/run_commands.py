"""run, demo, bench: many stages at once."""

from typing import Annotated, Any

import typer
from rich.console import RenderableType

from rayrec.bench.bench_config import NAMES, BenchConfig
from rayrec.errors import InputError
from rayrec_cli.app import app
from rayrec_cli.ask_commands import recommendations, results_table
from rayrec_cli.options import Call, ForceOption, command
from rayrec_cli.output import Shown, figures, note, table

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="TOML file with a section for each stage.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(NAMES)}.")]
SaveOption = Annotated[
    str | None, typer.Option("--save", metavar="FILE", help="Merge the measured rates into this JSON file.")
]
SoakOption = Annotated[
    bool, typer.Option("--soak", help="serve: minutes of mixed load while replicas are killed, instead.")
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Small data and few rounds: to see that it works.")]


@command(app, "run", example="rayrec run pipeline.toml")
def run(call: Call, *, file: FileArgument, force: ForceOption = False) -> Shown:
    """Run all stages from one TOML file.

    A stage whose inputs and settings have not changed is skipped.
    """
    from rayrec.jobs.pipeline import run as job

    outcomes = job(call.workspace, file, force=force, on_stage=say)
    return Shown({"stages": [outcome.to_mapping() for outcome in outcomes]}, [stages_table(outcomes)])


def say(outcome: Any) -> None:
    """Tell on stderr that a stage has ended."""
    why = ", nothing has changed" if outcome.status == "skipped" else ""
    note(f"{outcome.stage}: {outcome.status}{why} ({outcome.seconds:,.1f} s)")


def stages_table(outcomes: list[Any]) -> RenderableType:
    """One line a stage."""
    rows = [[outcome.stage, outcome.status, outcome.id, f"{outcome.seconds:,.1f}"] for outcome in outcomes]
    return table("Stages", ["stage", "status", "id", "seconds"], rows, left=["status", "id"])


@command(app, "demo", example="rayrec demo")
def demo(call: Call, *, force: ForceOption = False) -> Shown:
    """Show the whole way on generated plays.

    Runs every stage, measures the network against the baselines and recommends songs to one user.
    A second run in the same workspace skips what is done; --force does it again.
    """
    from rayrec.jobs.demo import demo as job

    told = job(call.workspace, force=force, on_stage=say)
    views = [
        stages_table(told.outcomes),
        results_table(told.evaluation),
        *recommendations(told.answer, told.user),
        f"Report: {told.report}",
    ]
    return Shown(told.to_mapping(), views)


@command(app, "bench", config=BenchConfig, example="rayrec bench train")
def bench(
    call: Call,
    config: BenchConfig,
    *,
    name: NameArgument,
    quick: QuickOption = False,
    save: SaveOption = None,
    soak: SoakOption = False,
) -> Shown:
    """Measure a stage against a plain loop.

    Both do the same work in one run, in alternating rounds; the ratio is the median over them.
    """
    if name == "serve":
        return _bench_serve(call, None if quick else config, quick, soak)
    if soak:
        raise InputError(f"--soak is of the benchmark serve, not of {name}; leave it out")
    from rayrec.bench.suite import bench as job

    told = job(name, call.workspace, None if quick else config, quick=quick, save=save)
    return Shown(told, [figures(f"bench {name}", told)])


def _bench_serve(call: Call, config: BenchConfig | None, quick: bool, soak: bool) -> Shown:
    """The application through Serve beside bare uvicorn, or under load while replicas are killed."""
    if soak:
        from rayrec.bench.soak import soak as soak_test

        told = soak_test(call.workspace, config, quick=quick)
        return Shown(told, [figures("bench serve --soak", told)])
    from rayrec.bench.serve_bench import bench_serve

    told = bench_serve(call.workspace, config, quick=quick)
    views: list[RenderableType] = [figures("bench serve", {k: v for k, v in told.items() if k != "catalogs"})]
    for catalog in told["catalogs"]:
        loads = catalog["loads"].items()
        rows = [[name, load["per_second"], load["p50_ms"], load["p99_ms"], load["errors"]] for name, load in loads]
        headers = ["application, request, clients", "requests/s", "p50 ms", "p99 ms", "errors"]
        views.append(table(f"{catalog['songs']:,} songs", headers, rows, left=headers[:1]))
    return Shown(told, views)
