"""Stage settings: immutable pydantic models that are read from TOML and become command-line flags."""

import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from rayrec.errors import InputError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]

MAX_INTEGER = 2**63 - 1  # largest integer in arrays and files
Config = TypeVar("Config", bound="Settings")


class Settings(BaseModel):
    """Base class of all settings. A field has its range in its type and its help text in its description.

    Numbers must be finite. Raises `InputError` for an unknown name, a missing value, a wrong type or a value out of
    range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # name -> settings to use together

    def __init__(self, **values: Any) -> None:
        # Convert numbers of NumPy, which a search over settings may give, to plain ones.
        values = {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
        for name, value in values.items():
            if isinstance(value, int) and abs(value) > MAX_INTEGER:
                raise InputError(f"{name} is {value}; expected an integer of at most {MAX_INTEGER}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_error_message(type(self), values, error)) from None

    def replace(self: Config, **changes: Any) -> Config:
        """Return a copy with changed settings, which is validated like a new object."""
        validated = type(self)(**{**dict(self), **changes})
        # Keep unchanged values: a moment in 1970 that was parsed to ms would be parsed again as seconds.
        return validated.model_copy(update={name: value for name, value in self if name not in changes})


def from_mapping(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Create settings from plain values of TOML or JSON; `source` is the start of error messages.

    The key `preset` is replaced by the settings of that name in PRESETS; other keys override them. Raises `InputError`
    for an unknown preset and for invalid settings.
    """
    values = dict(values)
    if "preset" in values and cls.PRESETS:
        name = values.pop("preset")
        if name not in cls.PRESETS:
            raise InputError(f"{source}: unknown preset {name!r}; expected one of {', '.join(cls.PRESETS)}")
        values = {**cls.PRESETS[name], **values}
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def to_mapping(config: Settings) -> dict[str, Any]:
    """Return settings as plain values for JSON."""
    return {name: _plain_value(value) for name, value in config}


def changed_settings(cls: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the items of `values`, which `to_mapping` returned, that differ from the defaults of `cls`."""
    defaults = {name: _plain_value(field.default) for name, field in cls.model_fields.items()}
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Settings):
        return to_mapping(value)
    if isinstance(value, dict):
        return {name: _plain_value(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the content of a TOML file. Raises `InputError` for a file that cannot be read or parsed."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}; check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not TOML: {error}") from error


def section_of(sections: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """Return a copy of one section, empty if it does not exist.

    Raises `InputError`, with a message that starts with `source`, if the name has a value instead of a section.
    """
    section = sections.get(name, {})
    if not isinstance(section, Mapping):
        raise InputError(f"{source}: {name} = {section!r}; expected a section [{name}]")
    return dict(section)


def base_type(hint: Any) -> Any:
    """Return the type inside an optional type; any other type unchanged."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(option for option in typing.get_args(hint) if option is not type(None))
    return hint


def expected_value(field: FieldInfo) -> str:
    """Describe the valid values of a setting in words, such as `an integer of at least 1`."""
    hint = base_type(field.annotation)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, options))}"
    if origin is tuple:
        item, *metadata = typing.get_args(options[0]) or (options[0],)
        constraints = [part for entry in metadata for part in getattr(entry, "metadata", [entry])]
        qualifier = "non-empty " if _min_length(field) else ""
        return _with_bounds(f"a {qualifier}list of {_NOUNS[item][1]}", constraints, joint=", each ")
    if origin is dict:
        return "name = value pairs"
    if hint is str and _min_length(field):
        return "a non-empty string"
    return _with_bounds(_NOUNS[hint][0], field.metadata, joint=" ")


_NOUNS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("true or false", ""),
}


def _min_length(field: FieldInfo) -> int:
    return max((getattr(constraint, "min_length", 0) for constraint in field.metadata), default=0)


def _with_bounds(noun: str, constraints: Iterable[Any], *, joint: str) -> str:
    """Return the noun followed by the bounds that its constraints set."""
    word_of_bound = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [
        f"{word} {getattr(constraint, name):g}"
        for constraint in constraints
        for name, word in word_of_bound.items()
        if getattr(constraint, name, None) is not None
    ]
    return noun + (joint + " and ".join(bounds) if bounds else "")


def _error_message(cls: type[Settings], values: Mapping[str, Any], error: ValidationError) -> str:
    """Return a line about the first problem: the setting, its value and the expected values."""
    problem = error.errors(include_url=False)[0]
    kind, name = problem["type"], str(problem["loc"][0]) if problem["loc"] else ""
    if kind == "extra_forbidden":
        return f"unknown setting {name!r}; expected one of {', '.join(cls.model_fields)}"
    if kind == "missing":
        return f"{name} is missing; expected {expected_value(cls.model_fields[name])}"
    value = values.get(name)
    given_text = f"{name} is {list(value) if isinstance(value, tuple) else value!r}; " if name else ""
    if kind == "value_error":  # raised by a validator of the class
        return given_text + str(problem["ctx"]["error"])
    expected = expected_value(cls.model_fields[name])
    return (
        f"{given_text}expected {expected.replace('number', 'finite number') if kind == 'finite_number' else expected}"
    )
