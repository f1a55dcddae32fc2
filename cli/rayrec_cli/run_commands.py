"""fit, update, run, demo: many stages at once."""

import shlex
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from rayrec.config import read_toml
from rayrec.jobs.job_config import FitConfig, UpdateConfig
from rayrec.serving.serve_config import ServeConfig
from rayrec_cli.app import DEFAULT_WORKSPACE, Call, ForceOption, Shown, app, command, figures, note, table
from rayrec_cli.recommend_commands import answer_view, results_table

FEW_QUERIES = 100  # below them the interval of a recall is about 0.2 wide

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="TOML file with one section per stage.")]
PlaysArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH", help="Files of plays or folders of files, .gz too; local, s3:// or gs://."),
]
SettingsOption = Annotated[
    str | None,
    typer.Option("--settings", metavar="FILE", help="TOML file with a section of settings for any stage."),
]


@command(app, "fit", config=FitConfig, arguments={"paths": PlaysArgument}, example="rayrec fit plays.csv")
def fit(call: Call, config: FitConfig, *, settings: SettingsOption = None, force: ForceOption = False) -> Shown:
    """From files of plays to recommendations: import, train, measure, release.

    Format and columns are guessed. The newest plays are held back to choose by and to measure the quality on; then
    everything is fitted on all plays and goes live.
    """
    from rayrec.jobs.fit import fit as job

    sections = {} if settings is None else read_toml(settings)
    result = job(call.workspace, config, settings=sections, force=force, on_stage=note_stage, on_note=note)
    views = [stages_table(result.outcomes), *quality_views(result), *answer_view(result.answer, f"user {result.user}")]
    return Shown(result.to_mapping(), [*views, _next_steps(call, result.user)])


def quality_views(result: Any) -> list[RenderableType]:
    """The quality of a fit on the validation range; nothing where there is none."""
    if result.quality is None:
        return []
    quality, title = result.quality, f"Validation: recall@20 and MRR@20 on {result.split.validation_range}"
    rows = [[name, value, f"{low:.3f}–{high:.3f}", *others] for name, value, low, high, *others in quality.table()]
    few = f" Fewer than {FEW_QUERIES} say little." if quality.queries < FEW_QUERIES else ""
    text = (
        f"Measured with models that had not seen this range, on {quality.queries:,} plays of songs new to the user "
        f"(served) and on all plays.{few} The release was then fitted on all plays."
    )
    return [table(title, ["model", "served", "95 %", "MRR", "all", "MRR"], rows), text]


def _next_steps(call: Call, user: str) -> str:
    """What to run after a fit."""
    commands = {
        f"recommend --user {shlex.quote(user)} -k 10": "songs for a user",
        "serve": "the HTTP server and its page",
        "update NEW_PLAYS": "every day, with the new plays",
        "run FILE": "own settings, and a test range",
    }
    width = max(map(len, commands))
    where = [] if call.uri == DEFAULT_WORKSPACE else [f"  export RAYREC_WORKSPACE={shlex.quote(call.uri)}"]
    return "\n".join(["Next:", *where, *(f"  rayrec {words:{width}}  {what}" for words, what in commands.items())])


@command(
    app,
    "update",
    config=UpdateConfig,
    arguments={"paths": PlaysArgument},
    example="rayrec update plays/day=2026-01-20",
)
def update(call: Call, config: UpdateConfig) -> Shown:
    """Add new plays to the live release, for every day.

    Appends them, brings retrieval and taste vectors up to date, continues the training where many plays are new, and
    compares the new release with the live one on the newest plays. It goes live unless its recall@20 as served is
    lower by more than 0.005; then the exit code is 1.
    """
    from rayrec.jobs.update import update as job

    result = job(call.workspace, config, on_stage=note_stage, on_note=note)
    appended = result.appended
    new = {"new plays": appended.plays, "new users": appended.users, "new songs": appended.songs}
    states = {} if result.states is None else {"states loaded": result.states.users}
    views: list[RenderableType] = [
        figures("Update", {**new, "merged": appended.merged, "trained": result.trained, **states})
    ]
    if result.outcomes:
        views.append(stages_table(result.outcomes))
    state = "is live" if result.live else "is not live, the earlier one stays"
    views.append(f"Release {result.release} {state}: {result.reason}.")
    if not result.live:
        views.append(f"`rayrec release activate {result.release}` makes it live nevertheless.")
    return Shown(result.to_mapping(), views, exit_code=0 if result.live else 1)


@command(app, "run", example="rayrec run pipeline.toml")
def run(call: Call, *, file: FileArgument, force: ForceOption = False) -> Shown:
    """Run the full pipeline from a TOML file.

    Stages whose inputs and settings are unchanged are skipped.
    """
    from rayrec.jobs.pipeline import run as job

    outcomes = job(call.workspace, file, force=force, on_stage=note_stage)
    return Shown({"stages": [outcome.to_mapping() for outcome in outcomes]}, [stages_table(outcomes)])


def note_stage(outcome: Any) -> None:
    """Report a finished stage on stderr."""
    why = ", unchanged" if outcome.status == "skipped" else f": {outcome.reason}" if outcome.reason else ""
    plays_text = f", trained on {outcome.trained_on}" if outcome.trained_on else ""
    note(f"{outcome.stage}: {outcome.status}{why} ({outcome.seconds:,.1f} s){plays_text}")


def stages_table(outcomes: list[Any]) -> RenderableType:
    """One line per stage."""
    rows = [[outcome.stage, outcome.status, outcome.id, f"{outcome.seconds:,.1f}"] for outcome in outcomes]
    return table("Stages", ["stage", "status", "id", "seconds"], rows, left=["status", "id"])


@command(app, "demo", example="rayrec demo")
def demo(call: Call, *, force: ForceOption = False) -> Shown:
    """Run the full pipeline on synthetic data.

    Runs every stage, compares the network with the baselines and recommends songs to one user. A second run in
    the same workspace skips completed stages.
    """
    from rayrec.jobs.pipeline import demo as job

    result = job(call.workspace, force=force, on_stage=note_stage)
    views = [
        stages_table(result.outcomes),
        results_table(result.evaluation),
        *answer_view(result.answer, result.user),
        f"Report: {result.report}",
        _page(call),
    ]
    return Shown(result.to_mapping(), views)


def _page(call: Call) -> str:
    """Where the page is, and the command that serves it."""
    where = "" if call.uri == DEFAULT_WORKSPACE else f"--workspace {shlex.quote(call.uri)} "
    config = ServeConfig()
    return f"Page: run `rayrec {where}serve` and open http://{config.host}:{config.port}/"
