"""The Typer app and what stands before every command."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rayrec_cli.options import Globals

ORDER = (  # of the commands in the help
    *("demo", "fit", "update", "generate", "inspect", "import", "compact", "describe", "split", "embed", "train"),
    *("songs", "retrieval", "rank"),
    *("taste", "index", "evaluate", "release"),
    "states",
    *("recommend", "serve", "experiment", "status", "verify", "clean", "forget", "unlock"),
    *("run", "tune", "submit", "plan", "bench"),
)


DEFAULT_WORKSPACE = "./workspace"


class InOrder(TyperGroup):
    """Lists the commands in the order of use."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names in the order of ORDER."""
        return sorted(super().list_commands(ctx), key=ORDER.index)


# Plain help: boxes leave a third of 80 columns to the text.
app = typer.Typer(
    name="rayrec",
    cls=InOrder,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
release_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Create, list and activate releases.")
app.add_typer(release_app, name="release")
songs_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Add songs that came after the training.")
app.add_typer(songs_app, name="songs")
states_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Manage the user states of the server.")
app.add_typer(states_app, name="states")
experiment_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Compare arms of an experiment.")
app.add_typer(experiment_app, name="experiment")
bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure stages and the server.")
app.add_typer(bench_app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"rayrec {version('rayrec')}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    workspace: Annotated[
        str,
        typer.Option(envvar="RAYREC_WORKSPACE", metavar="URI", help="Local folder, s3:// or gs:// prefix of all data."),
    ] = DEFAULT_WORKSPACE,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Music recommendations from play histories: import, train, evaluate, release, serve.

    \b
    Example:
      rayrec demo
    """
    ctx.obj = Globals(workspace=workspace, as_json=json)
