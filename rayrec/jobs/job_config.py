"""Settings of fit, update and tune, files that settings name, and the trials of a sweep. Imports neither Ray nor torch.

A sweep tries combinations of settings of song embeddings and of the network.
"""

import json
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field

from rayrec.config import Settings, from_mapping, read_toml, section_of
from rayrec.data.moments import validate_zone_name
from rayrec.data.spelling import validate_user
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.errors import InputError
from rayrec.model.train_config import TrainConfig

TRAIN_SHARE = 0.1

OptionalUser = Annotated[str | None, AfterValidator(validate_user)]
OptionalZone = Annotated[str | None, AfterValidator(validate_zone_name)]


PATH_SETTINGS = ("paths", "vectors", "keys_file")  # settings that name files


def resolve_paths(section: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings of a file, with relative paths resolved against the folder of its file."""
    return dict(section) | {
        key: [_absolute_path(folder, path) for path in section[key]]
        if isinstance(section[key], list)
        else _absolute_path(folder, section[key])
        for key in PATH_SETTINGS
        if key in section
    }


def read_sections(file: str) -> dict[str, Any]:
    """Return the sections of a TOML file, with relative paths resolved against its folder."""
    return {
        name: resolve_paths(section, Path(file).parent) if isinstance(section, dict) else section
        for name, section in read_toml(file).items()
    }


def _absolute_path(folder: Path, path: Any) -> Any:
    """Return an absolute path, so that a file is the same input wherever a run is started.

    A URI and an empty text stay unchanged, and ~ is the home folder.
    """
    is_path = isinstance(path, str) and path != "" and "://" not in path
    return str((folder / os.path.expanduser(path)).resolve()) if is_path else path


class PlaysConfig(Settings):
    """Files of plays, and how to read them; settings that are not given are guessed."""

    paths: tuple[str, ...] = Field(min_length=1, description="Files or folders, .gz too, local, s3:// or gs://")
    format: str | None = Field(None, description="Format of the files; default: guessed")
    max_rejected: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Maximum share of rejected rows; if it is exceeded, nothing is imported; default: 0.5",
    )


class FitConfig(PlaysConfig):
    """Settings of `fit`: the files of plays, and how long to train."""

    columns: dict[str, str] = Field(
        {},
        description="Column of each role, such as user=user_id,song=song_id,played_at=ts; roles not given are guessed",
    )
    timezone: OptionalZone = Field(
        None, description="Time zone of times without one, such as Europe/Berlin; default: UTC"
    )
    user: OptionalUser = Field(
        None, description="User ID of all plays, for files without user IDs; default: the IDs in the files"
    )
    epochs: int | None = Field(
        None, ge=1, description="Maximum epochs of the network; default: those of `rayrec train`"
    )


class UpdateConfig(PlaysConfig):
    """Settings of `update`: the new plays, when to train, and the store to load."""

    columns: dict[str, str] = Field(
        {},
        description="Column of each role, such as user=user_id,song=song_id,played_at=ts; default: the columns that "
        "`fit` used",
    )
    timezone: OptionalZone = Field(
        None,
        description="Time zone of times without one, such as Europe/Berlin; default: the zone that `fit` used",
    )
    user: OptionalUser = Field(
        None,
        description="User ID of all plays, for files without user IDs; default: the ID given for earlier files of "
        "this format",
    )
    train: bool = Field(False, description="Continue the training of the model even if few plays are new")
    train_share: float = Field(
        TRAIN_SHARE,
        ge=0,
        le=1,
        description="Continue the training if more than this share of the plays is newer than the model",
    )
    store: str | None = Field(
        None,
        description="Store of user states to load, sqlite:///PATH or redis://HOST:PORT/0; default: the workspace's own "
        "if it exists",
    )


SECTIONS: dict[str, type[Any]] = {"embed": EmbedConfig, "train": TrainConfig}
# A trial measures its network on the validation range, so it must not refit: a refit trains on that range.
FIXED_SETTINGS = {"train": {"refit": False}}

Values = dict[str, dict[str, Any]]  # section -> setting -> value


class TuneConfig(Settings):
    """How to search a space of settings."""

    trials: int = Field(0, ge=0, description="Combinations sampled without replacement; 0 runs all of them in order")
    seed: int = Field(0, ge=0, description="Random seed of the sampled combinations")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One combination of settings."""

    settings: Values  # settings of the file, also those that do not vary
    varied: dict[str, Any]  # section.setting -> value
    embed: EmbedConfig
    train: TrainConfig


def read_trials(sections: Mapping[str, Any], config: TuneConfig, file_name: str) -> list[Trial]:
    """Return the trials of the sections [embed] and [train], in which a list holds the values to try.

    For a setting whose value is a list, such as `short`, a list of lists holds the values to try. `file_name` names the
    file in messages. Raises `InputError` for unknown sections and settings, for settings that a sweep sets itself, for
    invalid combinations, and if nothing varies.
    """
    unknown_sections = sorted(set(sections) - set(SECTIONS))
    if unknown_sections:
        raise InputError(
            f"{file_name} has an unknown section {unknown_sections[0]!r}; expected one of {', '.join(SECTIONS)}"
        )
    choices = {
        (section, name): _values(section, name, value, file_name)
        for section in SECTIONS
        for name, value in _section(sections, section, file_name).items()
    }
    if all(len(values) == 1 for values in choices.values()):
        raise InputError(f"{file_name} has nothing to search; give a setting a list of values, such as dim = [32, 64]")
    return [
        _trial(choices, positions, file_name)
        for positions in _combinations([len(options) for options in choices.values()], config)
    ]


def to_toml(settings: Values) -> str:
    """Return the settings as sections of a TOML file, in which plain values and lists are written as in JSON."""
    parts = (
        "\n".join([f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items())])
        for section, values in settings.items()
        if values
    )
    return "\n\n".join(parts) + "\n"


def _section(sections: Mapping[str, Any], section: str, file_name: str) -> dict[str, Any]:
    values = section_of(sections, section, file_name)
    fixed_names = sorted(set(values) & set(FIXED_SETTINGS.get(section, {})))
    if fixed_names:
        raise InputError(f"{file_name} [{section}] has {fixed_names[0]}, which the search sets itself; remove it")
    return values


def _values(section: str, name: str, value: Any, file_name: str) -> list[Any]:
    """Return the values to try: those of a list, or a plain value as the only one."""
    field = SECTIONS[section].model_fields.get(name)
    is_tuple = field is not None and typing.get_origin(field.annotation) is tuple
    is_choice = isinstance(value, list) and (not is_tuple or (bool(value) and isinstance(value[0], list)))
    if is_choice and not value:
        raise InputError(f"{file_name} [{section}] {name} is an empty list; expected at least one value")
    return value if is_choice else [value]


def _combinations(sizes: list[int], config: TuneConfig) -> Iterator[tuple[int, ...]]:
    """Yield a position in each list of values per trial; if all trials run, the last list varies fastest."""
    total = prod(sizes)
    combination_numbers = np.arange(total)
    if 0 < config.trials < total:
        combination_numbers = np.random.default_rng(config.seed).choice(total, size=config.trials, replace=False)
    for number in combination_numbers:
        yield tuple(int(position) for position in np.unravel_index(number, sizes))


def _trial(choices: dict[tuple[str, str], list[Any]], positions: tuple[int, ...], file_name: str) -> Trial:
    settings: Values = {section: {} for section in SECTIONS}
    varied = {}
    for ((section, name), values), position in zip(choices.items(), positions, strict=True):
        settings[section][name] = values[position]
        if len(values) > 1:
            varied[f"{section}.{name}"] = values[position]
    settings_text = ", ".join(f"{name} = {value}" for name, value in varied.items())
    embed, train = (
        from_mapping(
            config_class,
            settings[section] | FIXED_SETTINGS.get(section, {}),
            f"{file_name} [{section}] with {settings_text}",
        )
        for section, config_class in SECTIONS.items()
    )
    return Trial(settings=settings, varied=varied, embed=embed, train=train)
