"""Stage settings: frozen dataclasses whose fields carry their own help, read from TOML and flags.

A setting's help line stands where the setting is, and serves the reader of the code, the command
line and the error messages.
"""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, field, fields
from pathlib import Path
from typing import Any, TypeVar

from rayrec.errors import InputError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]

Config = TypeVar("Config")


def setting(default: Any = MISSING, *, help: str) -> Any:
    """A dataclass field with a default and one line of help, units included."""
    return field(default=default, metadata={"help": help})


def from_mapping(cls: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """A config from plain values; lists become tuples.

    The key `preset` stands for the settings of that name in the config's PRESETS; other keys
    override them. Raises `InputError` for an unknown key or preset or a value of the wrong type;
    `where` says whose they are.
    """
    values = _with_preset(cls, values, where)
    hints = typing.get_type_hints(cls)
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise InputError(f"{where} has no setting {unknown[0]!r}; there are: {', '.join(known)}")
    converted = {name: _convert(hints[name], value, f"{where}, {name}") for name, value in values.items()}
    try:
        return cls(**converted)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from error


def presets_of(cls: type) -> Mapping[str, Mapping[str, Any]]:
    """Settings that belong together, by name; none where a config has no PRESETS."""
    found: Mapping[str, Mapping[str, Any]] = getattr(cls, "PRESETS", {})
    return found


def _with_preset(cls: type, values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    presets = presets_of(cls)
    if "preset" not in values or not presets:
        return values
    name = values["preset"]
    if name not in presets:
        raise InputError(f"{where} has no preset {name!r}; there are: {', '.join(presets)}")
    return {**presets[name], **{key: value for key, value in values.items() if key != "preset"}}


def to_mapping(config: Any) -> dict[str, Any]:
    """The plain values of a config, as JSON holds them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file's content. Raises `InputError` for a file that is not there or does not parse."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not TOML: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        inner = [option for option in options if option is not type(None)]
        return _convert(inner[0], value, where) if len(inner) == 1 else value
    if origin is typing.Literal:
        if value not in options:
            raise InputError(f"{where} is {value!r}; expected one of {', '.join(map(str, options))}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(options[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or hint
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise InputError(f"{where} is {value!r}; expected {getattr(expected, '__name__', expected)}")
    return value
