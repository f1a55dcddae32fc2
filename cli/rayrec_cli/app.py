"""The Typer app: the options before every command, the settings of stages as flags, and the output of commands.

Commands print tables for people, in a terminal as wide as it is, or one JSON object for programs.
"""

import functools
import inspect
import json
import math
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from rayrec.config import Settings, base_type, expected_value, from_mapping, read_toml
from rayrec.errors import InputError, NotFoundError, RayrecError
from rayrec.jobs.job_config import resolve_paths
from rayrec.storage.artifacts import noun
from rayrec.storage.workspace import Workspace

WorkspaceOption = Annotated[
    str | None,
    typer.Option("--workspace", metavar="URI", help="Local folder, s3:// or gs:// prefix of all data."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]
ConfigOption = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="TOML file of settings; flags override it.")
]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="ID", help="Model. [default: current]")]
ForceOption = Annotated[bool, typer.Option("--force", help="Recompute even if the result exists.")]

GAP = (0, 1, 0, 0)  # padding between columns, in addition to that of the box
PIPE_WIDTH = 10_000  # columns where stdout is not a terminal
GAP_WIDTH = 2  # columns between two columns of a table: the padding and the divider of the box


@dataclass(frozen=True)
class Globals:
    """Values of the options before the command."""

    workspace: str
    as_json: bool


@dataclass(frozen=True)
class Call:
    """The values that every command receives in addition to its own options."""

    uri: str  # of the workspace, as given
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat())  # ISO 8601, UTC

    @functools.cached_property
    def workspace(self) -> Workspace:
        """The workspace, opened at first use, because not every command reads it on this machine."""
        return Workspace(self.uri)

    @property
    def existing_workspace(self) -> Workspace:
        """The workspace, for commands that only read it. Raises `NotFoundError` if it is empty."""
        if self.workspace.is_empty:
            raise NotFoundError(f"workspace {self.uri} is empty; check --workspace, or run `rayrec fit`")
        return self.workspace


@dataclass(frozen=True)
class CommandOutput:
    """The output of a command: `data` with --json, otherwise `views`, one below the other."""

    data: dict[str, Any]
    views: list[RenderableType] = field(default_factory=list)
    exit_code: int = 0  # of the command line, if the work was done; not 0 for a negative result
    error: RayrecError | None = None  # why the work was not done, if there is also output to show


def command(
    app: typer.Typer,
    name: str,
    *,
    example: str,
    config: type[Settings] | None = None,
    arguments: Mapping[str, Any] | None = None,
    options_first: bool = False,
) -> Callable[[Callable[..., CommandOutput]], Callable[..., CommandOutput]]:
    """Register `body(call, [config], **own options)` as a command that prints the `CommandOutput` that it returns.

    With `config`, each of its settings becomes a flag, or a positional argument if `arguments` has its annotation.
    --config FILE reads settings from the section named after the command, [bench.serve] for `rayrec bench serve`, or
    from the top level of the file. With `options_first`, everything after the first word without a dash is an argument,
    even if it begins with a dash, so that another command with its options can be passed.
    """

    def register(body: Callable[..., CommandOutput]) -> Callable[..., CommandOutput]:
        own_parameters = list(inspect.signature(body, eval_str=True).parameters.values())[1 if config is None else 2 :]
        positional = [_parameter(key, annotation, None) for key, annotation in (arguments or {}).items()]
        fields = {} if config is None else config.model_fields
        flag_fields = {
            key: field for key, field in fields.items() if not (_is_section(field) or key in (arguments or {}))
        }
        flags = [*positional, *(flag(key, field) for key, field in flag_fields.items())]

        @functools.wraps(body)
        def run(ctx: typer.Context, **values: Any) -> int:
            global_options: Globals = ctx.obj
            own_workspace = values.pop("workspace")
            call = Call(global_options.workspace if own_workspace is None else own_workspace)
            as_json = values.pop("json") or global_options.as_json
            with redirect_stdout(sys.stderr):  # what libraries print is not the result
                if config is not None:
                    values["config"] = _read_config(config, ctx, values, [parameter.name for parameter in flags])
                output = body(call, **values)
            show(output, as_json=as_json)
            if output.error is not None:
                print_error(str(output.error))
                return output.error.exit_code
            return output.exit_code

        shared_parameters = [_parameter("workspace", WorkspaceOption, None), _parameter("json", JsonOption, False)]
        if config is not None:
            shared_parameters.insert(0, _parameter("config", ConfigOption, None))
            if config.PRESETS:
                shared_parameters.insert(0, _parameter("preset", _preset_option(config), None))
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        parameters = [
            context,
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own_parameters),
            *flags,
            *shared_parameters,
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        settings = {"allow_interspersed_args": not options_first}
        app.command(name, help=f"{inspect.getdoc(body)}\n\n\b\nExample:\n  {example}", context_settings=settings)(run)
        return body

    return register


def flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return the flag of one setting; its value is None if it is not given, so that a config file can set it."""
    hint = base_type(field.annotation)
    origin = typing.get_origin(hint)
    metavar = {typing.Literal: "|".join(map(str, typing.get_args(hint))), tuple: "A,B,...", dict: "A=B,..."}.get(origin)
    value_type = hint if origin is None else str
    flag_name = name.replace("_", "-")
    names = [f"--{flag_name}/--no-{flag_name}"] if value_type is bool else [f"--{flag_name}"]
    if len(flag_name) == 1:
        names.append(f"-{flag_name}")
    choices = list(map(str, typing.get_args(hint))) if origin is typing.Literal else []
    option = typer.Option(
        *names, metavar=metavar, help=_help_text(field), show_default=False, autocompletion=lambda: choices
    )
    return _parameter(name, Annotated[value_type | None, option], None)


def _is_section(field: FieldInfo) -> bool:
    """Return True if the field holds nested settings: a section of a config file, which no flag can set."""
    hint = base_type(field.annotation)
    return isinstance(hint, type) and issubclass(hint, Settings)


def _preset_option(config: type[Settings]) -> Any:
    option = typer.Option("--preset", metavar="|".join(config.PRESETS), help="Named settings; flags override them.")
    return Annotated[str | None, option]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _help_text(field: FieldInfo) -> str:
    """Return the description of a setting with its default, in the format of click."""
    default = field.default
    if isinstance(default, bool):
        default = "yes" if default else "no"
    elif isinstance(default, tuple):
        default = ",".join(map(str, default))
    is_shown = not field.is_required() and default is not None and str(default).strip() and default != {}
    return f"{field.description}." + (f" [default: {default}]" if is_shown else "")


def _read_config(config: type[Settings], ctx: typer.Context, values: dict[str, Any], flags: list[str]) -> Settings:
    """Remove the flags from `values` and return the settings of the config file, overridden by these flags."""
    path, preset = values.pop("config"), values.pop("preset", None)
    command_path = ctx.command_path  # for example `rayrec bench serve`
    settings = {}
    if path:
        settings = _settings_from_file(
            path, command_path.split()[1:], _names_with_settings(ctx.find_root().command), config
        )
    if preset is not None:
        settings["preset"] = preset
    for name in flags:
        value = values.pop(name)
        if value not in (None, []):
            settings[name] = _parse_flag(value, config.model_fields[name], f"--{name.replace('_', '-')}")
    missing_names = [key for key, field in config.model_fields.items() if field.is_required() and key not in settings]
    if missing_names:
        raise InputError(f"Missing argument {missing_names[0].upper()}; see {command_path} --help")
    return from_mapping(config, settings, command_path)


def _names_with_settings(group: Any) -> set[str]:
    """Return the names of a group's commands that have settings, and of its groups with such a command."""
    return {
        name
        for name, subcommand in group.commands.items()
        if any(option.name == "config" for option in subcommand.params)
        or (hasattr(subcommand, "commands") and _names_with_settings(subcommand))
    }


def _settings_from_file(path: str, words: list[str], sections: set[str], config: type[Settings]) -> dict[str, Any]:
    """Return the settings of a command from a file: those of its section, or the whole file if it has no sections.

    Relative paths are resolved against the folder of the file, as for `rayrec run`.

    `words` is the name of the command, `sections` the names of all commands and groups that have settings.
    """
    content = section = read_toml(path)
    own_keys = {  # settings of this command; some have the name of another section, such as `train` of update
        key
        for key, value in content.items()
        if key in config.model_fields and (_is_section(config.model_fields[key]) or not isinstance(value, dict))
    }
    if not set(content) <= sections or (words[0] not in content and set(content) <= own_keys):
        return resolve_paths(content, Path(path).parent)
    for depth, word in enumerate(words, 1):
        name = ".".join(words[:depth])
        if word not in section:
            note(f"Note: {path} has no section [{name}]")
        section = section.get(word, {})
        if depth == len(words) > 1 and not isinstance(section, dict):
            section = {}  # a setting of the stage with the group's name, such as `activate` of [release]
        if not isinstance(section, dict):
            raise InputError(f"{name} in {path} is {section!r}; expected a section [{name}]")
    return resolve_paths(section, Path(path).parent)


def _parse_flag(value: Any, field: FieldInfo, flag_name: str) -> Any:
    """Return the value of a flag, parsed from `a,b` or `a=b,c=d` for a tuple or dict. Raises `InputError`."""
    hint = base_type(field.annotation)
    if typing.get_origin(hint) not in (tuple, dict):
        return value
    parts: Any = [part.strip() for part in (value.split(",") if isinstance(value, str) else value) if part.strip()]
    try:
        if typing.get_origin(hint) is dict:
            parts = dict(map(_parse_pair, parts))
        return TypeAdapter(hint).validate_python(parts)
    except (ValidationError, ValueError):
        raise InputError(f"{flag_name} is {value!r}; expected {expected_value(field)}, separated by commas") from None


def _parse_pair(text: str) -> tuple[str, str]:
    name, separator, value = (part.strip() for part in text.partition("="))
    if not (name and separator):
        raise ValueError(text)
    return name, value


COMMAND_ORDER = (  # of the commands in the help
    *("demo", "fit", "update", "generate", "inspect", "import", "compact", "describe", "split", "embed", "train"),
    *("songs", "retrieval", "rank"),
    *("taste", "index", "evaluate", "release"),
    "states",
    *("recommend", "serve", "experiment", "status", "verify", "clean", "forget", "unlock"),
    *("run", "tune", "submit", "plan", "bench"),
)

DEFAULT_WORKSPACE = "./workspace"


class InOrder(TyperGroup):
    """A group that lists its commands in the order of use."""

    def invoke(self, ctx: Any) -> Any:
        """Return the exit code of the command. Raises `typer.Abort` for Ctrl-C; Typer itself would return 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Abort from error

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of COMMAND_ORDER."""
        return sorted(super().list_commands(ctx), key=COMMAND_ORDER.index)


# Plain help, because boxes leave only a third of 80 columns for the text.
app = typer.Typer(
    name="rayrec",
    cls=InOrder,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
release_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Create, list and activate releases.")
app.add_typer(release_app, name="release")
songs_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Add songs that have no plays in training.")
app.add_typer(songs_app, name="songs")
states_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Manage the user states of the server.")
app.add_typer(states_app, name="states")
experiment_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Compare the arms of an experiment.")
app.add_typer(experiment_app, name="experiment")
bench_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Run benchmarks of the stages and of the server."
)
app.add_typer(bench_app, name="bench")


def _print_version(show: bool) -> None:
    if show:
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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Music recommendations from play histories: import, train, evaluate, release, serve.

    \b
    Example:
      rayrec demo
    """
    ctx.obj = Globals(workspace=workspace, as_json=json)


def error_data(error: BaseException, message: str | None = None, kind: str | None = None) -> dict[str, Any]:
    """Return an error as --json prints it: its kind, its message, and a hint what to do."""
    text, _, hint = (str(error) if message is None else message).rpartition("; ")
    if not text:
        text, hint = hint, ""
    name = type(error).__name__.removesuffix("Error")
    kind = kind or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return {"error": {"kind": kind, "message": " ".join(text.split()), "hint": " ".join(hint.split())}}


class OutputError(Exception):
    """Stdout cannot be written, because the disk is full or the program that reads it has ended."""


def show(shown: CommandOutput, *, as_json: bool) -> None:
    """Write the outcome to stdout. Raises `OutputError` if it cannot be written."""
    try:
        if as_json:
            print(_json_text(shown.data))
        else:
            _print_views(shown.views)
        print(end="", flush=True)
    except OSError as error:
        raise OutputError(f"the output cannot be written: {error.strerror}; write it to another place") from error


def _print_views(views: Sequence[RenderableType]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # whole lines, so that `grep` finds what belongs together
        console.width = PIPE_WIDTH
    for position, view in enumerate(views):
        if position:
            console.print()
        if isinstance(view, str):
            console.print(Text(view), soft_wrap=True)  # without line breaks, so that commands in it can be copied
        else:
            console.print(view, crop=False)


def _json_text(data: dict[str, Any]) -> str:
    """Return one JSON object, in ASCII if the terminal or file does not accept UTF-8."""
    ascii_only = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
    return json.dumps(_finite(data), ensure_ascii=ascii_only, allow_nan=False)


def print_error(message: str) -> None:
    """Print one line on stderr, with names as they were given."""
    print("rayrec:", " ".join(message.split()), file=sys.stderr)


def _finite(value: Any) -> Any:
    """Return the value with None instead of NaN and infinite numbers, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def note(text: str) -> None:
    """Print one line on stderr, as progress for people."""
    Console(stderr=True, highlight=False).print(escape(text), soft_wrap=True)


def number(value: Any, digits: int = 3) -> str:
    """Return a value as text for people, such as 343,183 and 0.412; large floats have separators too."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.{0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else digits}f}"
    return "–" if value is None else str(value)


def interval(low: float | None, high: float | None) -> str:
    """Return a 95 % interval as text for people, such as 0.401–0.423, or a dash if there is none."""
    return "–" if low is None or high is None else f"{low:.3f}–{high:.3f}"


def short(count: int) -> str:
    """Return a count as the header of a column: 10 k or 10 M if it is round, otherwise with all digits."""
    for unit, value in (("M", 1_000_000), ("k", 1_000)):
        if count >= value and count % value == 0:
            return f"{count // value:,} {unit}"
    return number(count)


def size(num_bytes: int) -> str:
    """Return bytes as text for people, such as 1.4 MB."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def day(iso: str) -> str:
    """Return the date, hour and minute of an ISO 8601 time."""
    return iso[:16].replace("T", " ")


def age(iso: str, now: datetime | None = None) -> str:
    """Return how long ago an ISO 8601 time was, such as `5 min ago` or `2 d ago`; empty text if `iso` is empty."""
    if not iso:
        return ""
    seconds = ((now or datetime.now(timezone.utc)) - datetime.fromisoformat(iso)).total_seconds()
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length):,} {unit} ago"
    return "just now"


def table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]], *, left: Sequence[str] = ()
) -> RenderableType:
    """Return a table with right-aligned columns, except the first and those in `left`.

    If the terminal is too narrow, texts in left-aligned columns are cut. Numbers and headers never are: the table is
    wider than the terminal if it must be.
    """
    shown_table = _UncutTable(box=box.SIMPLE_HEAD, show_edge=False, padding=GAP)
    cells = [[value if isinstance(value, str) else number(value) for value in row] for row in rows]
    for index, header in enumerate(headers):
        is_left = index == 0 or header in left
        is_text = is_left and any(isinstance(row[index], str) for row in rows)
        header_width = max(map(cell_len, header.splitlines()), default=0)
        uncut_widths = [header_width, *(cell_len(row[index]) for row in cells if not is_text)]
        shown_table.least_width += max(uncut_widths) + GAP_WIDTH
        # rich shrinks only columns that may wrap; no_wrap of the texts in them prevents wrapping
        shown_table.add_column(
            header, justify="left" if is_left else "right", no_wrap=not is_text, min_width=header_width
        )
    for row in cells:
        shown_table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in row))
    return _with_title(title, shown_table)


class _UncutTable(Table):
    """A table that is at least `least_width` columns wide, even if the terminal has fewer."""

    least_width = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width, self.least_width)
        return super().__rich_console__(console, options.update(width=width))


def values_view(title: str, values: dict[str, Any]) -> RenderableType:
    """Return a view of names and values, one per line. Lists and dicts are left out: they have tables of their own.

    A value that is too long for the terminal continues on the next line; nothing is cut.
    """
    plain_values = {name: value for name, value in values.items() if isinstance(value, int | float | str)}
    shown_table = Table(box=None, show_header=False, pad_edge=False)
    shown_table.add_column(no_wrap=True)
    shown_table.add_column(justify="right", overflow="fold")
    for name, value in plain_values.items():
        shown_table.add_row(Text("  " + name.replace("_", " ")), Text(number(value)))
    return _with_title(title, shown_table)


def inputs_view(inputs: Mapping[str, str]) -> RenderableType:
    """Return a view of the ids of the artifacts that a command used, by role, one per line."""
    return values_view("From", {noun(role): artifact_id for role, artifact_id in inputs.items()})


def _with_title(title: str, body: Table) -> RenderableType:
    """Return a table below a title. The title has its own line, because rich would wrap it to the table's width."""
    return Group(Text(title, style="bold"), body) if title else body
