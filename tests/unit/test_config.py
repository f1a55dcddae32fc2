"""Configs from plain values: types, unknown keys, presets."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from rayrec.config import from_mapping, read_toml, setting, to_mapping
from rayrec.errors import InputError
from rayrec.model.train_config import Horizon, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One setting of each kind."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"fast": {"epochs": 1, "pair": (2, 3)}}

    epochs: int = setting(10, help="passes")
    rate: float = setting(0.5, help="step size")
    kind: Literal["flat", "ivf"] = setting("flat", help="which")
    pair: tuple[int, ...] = setting((1, 1), help="two numbers")
    path: str | None = setting(None, help="a file")
    on: bool = setting(True, help="a switch")


def test_values_of_toml_become_the_types_of_the_fields() -> None:
    config = from_mapping(Sample, {"rate": 1, "pair": [4, 5], "path": "x"}, "sample")
    assert (config.rate, config.pair, config.path) == (1.0, (4, 5), "x")
    assert isinstance(config.rate, float)


@pytest.mark.parametrize(
    "values", [{"epochs": "many"}, {"epochs": True}, {"kind": "tree"}, {"on": 1}, {"pair": 3}, {"epochs": 1.5}]
)
def test_a_value_of_the_wrong_type_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"sample, {next(iter(values))} is"):
        from_mapping(Sample, values, "sample")


def test_an_unknown_setting_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(InputError, match="sample has no setting 'epoch'; there are: epochs, rate"):
        from_mapping(Sample, {"epoch": 3}, "sample")


def test_a_preset_gives_its_settings_and_others_override_them() -> None:
    config = from_mapping(Sample, {"preset": "fast", "pair": [7, 8]}, "sample")
    assert (config.epochs, config.pair, config.rate) == (1, (7, 8), 0.5)


def test_an_unknown_preset_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(InputError, match="no preset 'slow'; there are: fast"):
        from_mapping(Sample, {"preset": "slow"}, "sample")


def test_plain_values_and_back_give_the_same_config() -> None:
    config = Sample(pair=(9, 9), path="y")
    assert from_mapping(Sample, to_mapping(config), "sample") == config


def test_a_file_that_is_no_toml_is_refused(tmp_path: Any) -> None:
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(InputError, match="is not TOML"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(InputError, match="cannot be read"):
        read_toml(tmp_path / "none.toml")


@pytest.mark.parametrize("name", TrainConfig.PRESETS)
def test_every_training_preset_is_a_valid_config(name: str) -> None:
    assert from_mapping(TrainConfig, {"preset": name}, "train").horizons


def test_the_papers_presets_have_one_horizon_and_its_objective() -> None:
    short = from_mapping(TrainConfig, {"preset": "r_hst"}, "train")
    long = from_mapping(TrainConfig, {"preset": "r_hlt"}, "train")
    assert short.horizons == {"short": Horizon(min_offset=1, max_offset=1)}
    assert list(long.horizons) == ["long"]
    for config in (short, long):
        assert (config.objective, config.song_table, config.memory) == ("cosine", "frozen", False)
