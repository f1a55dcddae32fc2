"""Turn a stage's settings into flags: the dataclass says the names, types, defaults and help."""

import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from rayrec.config import from_mapping, presets_of, read_toml
from rayrec.errors import InputError
from rayrec.storage.workspace import Workspace
from rayrec_cli.output import Shown, note, show

SECTIONS = (
    *("import", "describe", "generate", "split", "embed", "train", "taste", "index"),
    *("recommend", "evaluate", "release", "serve"),
)

WorkspaceOption = Annotated[
    str | None,
    typer.Option("--workspace", metavar="URI", help="Folder, s3:// or gs:// prefix that holds everything."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
ConfigOption = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="TOML file with the settings; flags override it.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Do it again, though the same work is done already.")]


@dataclass(frozen=True)
class Globals:
    """What was said before the command."""

    workspace: str
    as_json: bool


@dataclass(frozen=True)
class Call:
    """What every command is called with beside its own options."""

    uri: str  # of the workspace, as it was given

    @functools.cached_property
    def workspace(self) -> Workspace:
        """Opened when it is first asked for: not every command reads it on this machine."""
        return Workspace(self.uri)


def command(
    app: typer.Typer,
    name: str,
    *,
    example: str,
    config: type[Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
    options_first: bool = False,
) -> Callable[[Callable[..., Shown]], Callable[..., Shown]]:
    """Register `body(call, [config], **own options)` as a command that prints what it returns.

    With `config`, each of its settings becomes a flag, or the positional argument that `arguments`
    annotates; --config FILE reads them from the section named after the command, or from the top
    level of the file. With `options_first` all that follows the first word without a dash belongs to
    the arguments, options of another command among it.
    """

    def register(body: Callable[..., Shown]) -> Callable[..., Shown]:
        own = list(inspect.signature(body, eval_str=True).parameters.values())[1 if config is None else 2 :]
        positional = [_parameter(key, kind, None) for key, kind in (arguments or {}).items()]
        flags = positional + ([] if config is None else [flag(item, config) for item in _flags(config, positional)])

        @functools.wraps(body)
        def run(ctx: typer.Context, **values: Any) -> int:
            said: Globals = ctx.obj
            call = Call(values.pop("workspace") or said.workspace)
            as_json = values.pop("json") or said.as_json
            with redirect_stdout(sys.stderr):  # what libraries print is no outcome
                if config is not None:
                    values["config"] = _config(config, name, values, [item.name for item in flags])
                shown = body(call, **values)
            show(shown, as_json=as_json)
            if shown.error is not None:
                print("rayrec:", " ".join(str(shown.error).split()), file=sys.stderr)
                return shown.error.exit_code
            return shown.exit_code

        shared = [_parameter("workspace", WorkspaceOption, None), _parameter("json", JsonOption, False)]
        if config is not None:
            shared.insert(0, _parameter("config", ConfigOption, None))
            if presets_of(config):
                shared.insert(0, _parameter("preset", _preset_option(config), None))
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        parameters = [context, *(item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in own), *flags, *shared]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {item.name: item.annotation for item in parameters}
        settings = {"allow_interspersed_args": not options_first}
        app.command(name, help=f"{inspect.getdoc(body)}\n\n\b\nExample:\n  {example}", context_settings=settings)(run)
        return body

    return register


def flag(item: "dataclasses.Field[Any]", config: type[Any]) -> inspect.Parameter:
    """The flag of one setting; it is None where it was not given, so that a config file can speak."""
    kind, metavar = _flag_type(typing.get_type_hints(config)[item.name])
    spelled = item.name.replace("_", "-")
    names = [f"--{spelled}/--no-{spelled}"] if kind is bool else [f"--{spelled}"]
    if len(spelled) == 1:
        names.append(f"-{spelled}")
    option = typer.Option(*names, metavar=metavar, help=_help(item), show_default=False)
    return _parameter(item.name, Annotated[kind | None, option], None)


def _preset_option(config: type[Any]) -> Any:
    option = typer.Option(
        "--preset", metavar="|".join(presets_of(config)), help="Settings that belong together; flags override them."
    )
    return Annotated[str | None, option]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flags(config: type[Any], positional: list[inspect.Parameter]) -> list["dataclasses.Field[Any]"]:
    """The settings that become flags."""
    hints, taken = typing.get_type_hints(config), [item.name for item in positional]
    return [item for item in dataclasses.fields(config) if item.name not in taken and _flag_type(hints[item.name])[0]]


def _flag_type(hint: Any) -> tuple[Any, str | None]:
    """The type that the command line parses and how the help names it; (None, None) where only TOML can say it."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [option for option in options if option is not type(None)]
        return _flag_type(inner[0]) if len(inner) == 1 else (None, None)
    if origin is typing.Literal:
        return str, "|".join(map(str, options))
    if origin is tuple:
        return str, "A,B,..."
    if origin is dict:
        return str, "A=B,..."
    return (hint, None) if hint in (int, float, str, bool) else (None, None)


def _help(item: "dataclasses.Field[Any]") -> str:
    text = str(item.metadata.get("help", "")).rstrip(".")
    text = text[:1].upper() + text[1:]
    default = None if item.default is dataclasses.MISSING else item.default
    if isinstance(default, bool):
        return f"{text} ({'yes' if default else 'no'})."
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f"{text}." if default is None or not str(default).strip() else f"{text} ({default})."


def _config(config: type[Any], name: str, values: dict[str, Any], flags: list[str]) -> Any:
    """Take the flags out of `values` and lay them over the config file's."""
    path, preset = values.pop("config"), values.pop("preset", None)
    settings = _from_file(path, name) if path else {}
    if preset is not None:
        settings["preset"] = preset
    hints = typing.get_type_hints(config)
    for item in flags:
        given = values.pop(item)
        if given not in (None, []):
            settings[item] = parse(given, hints[item], f"--{item.replace('_', '-')}")
    for field in dataclasses.fields(config):
        if field.name not in settings and field.default is dataclasses.MISSING:
            raise InputError(f"{field.name} is missing; see rayrec {name} --help")
    return from_mapping(config, settings, f"rayrec {name}")


def _from_file(path: str, name: str) -> dict[str, Any]:
    content = read_toml(path)
    if set(content) <= set(SECTIONS):
        if name not in content:
            note(f"note: {path} has no section [{name}]")
        section = content.get(name, {})
        if not isinstance(section, dict):
            raise InputError(f"{name} in {path} is {section!r}; expected a section [{name}]")
        return dict(section)
    return content


def parse(given: Any, hint: Any, where: str) -> Any:
    """A flag's text as the value of a setting that holds several: `a,b` and `a=b,c=d`.

    Raises `InputError` for what does not read so.
    """
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return parse(given, options[0], where)
    if typing.get_origin(hint) is tuple:
        parts = given.split(",") if isinstance(given, str) else given
        return tuple(_item(part.strip(), options[0], where) for part in parts if part.strip())
    if typing.get_origin(hint) is dict:
        return dict(_pair(part, where) for part in given.split(",") if part.strip())
    return given


def _item(text: str, kind: Any, where: str) -> Any:
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError as error:
        raise InputError(f"{where} has {text!r} in it; expected {kind.__name__}s with commas between them") from error


def _pair(text: str, where: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not (name and equals and value):
        raise InputError(f"{where} has {text!r} in it; expected name=value pairs with commas between them")
    return name, value
