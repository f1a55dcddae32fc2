"""Settings: types, ranges, unknown names and presets; every error is one line that names the setting."""

from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, PositiveInt, model_validator

from rayrec.config import Settings, changed_settings, from_mapping, read_toml, to_mapping
from rayrec.errors import InputError
from rayrec.jobs.pipeline import CONFIGS
from rayrec.model.train_config import Horizon, TrainConfig


class Sample(Settings):
    """One setting of each kind."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"fast": {"epochs": 1, "pair": (2, 3)}}

    epochs: int = Field(10, ge=1, description="Number of epochs")
    rate: float = Field(0.5, ge=0, lt=1, description="Learning rate")
    width: float = Field(1.0, gt=0, description="Width")
    kind: Literal["flat", "ivf"] = Field("flat", description="Index type")
    pair: tuple[PositiveInt, ...] = Field((1, 1), description="Two numbers")
    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field((), description="Shares")
    path: str | None = Field(None, description="A file")
    on: bool = Field(True, description="A switch")

    @model_validator(mode="after")
    def _check_pair(self) -> "Sample":
        if len(self.pair) != 2:
            raise ValueError(f"pair is {list(self.pair)}; expected two integers")
        return self


def test_values_of_toml_become_the_types_of_the_fields() -> None:
    config = from_mapping(Sample, {"rate": 0, "pair": [4, 5], "path": "x"}, "sample")
    assert (config.rate, config.pair, config.path) == (0.0, (4, 5), "x")
    assert isinstance(config.rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "many"}, "epochs is 'many'; expected an integer of at least 1"),
        ({"epochs": 0}, "epochs is 0; expected an integer of at least 1"),
        ({"epochs": True}, "epochs is True; expected an integer of at least 1"),
        ({"epochs": 1.5}, "epochs is 1.5; expected an integer of at least 1"),
        ({"epochs": 2**63}, "epochs is 9223372036854775808; expected an integer of at most 9223372036854775807"),
        ({"rate": 1.0}, "rate is 1.0; expected a number of at least 0 and below 1"),
        ({"width": float("inf")}, "width is inf; expected a finite number above 0"),
        ({"width": float("nan")}, "width is nan; expected a finite number above 0"),
        (
            {"shares": [float("nan")]},
            "shares is [nan]; expected a list of finite numbers, each of at least 0 and at most 1",
        ),
        ({"kind": "tree"}, "kind is 'tree'; expected one of flat, ivf"),
        ({"on": 1}, "on is 1; expected true or false"),
        ({"path": 1}, "path is 1; expected a string"),
        ({"pair": 3}, "pair is 3; expected a list of integers, each above 0"),
        ({"pair": [0, 1]}, "pair is [0, 1]; expected a list of integers, each above 0"),
        ({"pair": [1, 2, 3]}, "pair is [1, 2, 3]; expected two integers"),
        ({"shares": [0.5, 2]}, "shares is [0.5, 2]; expected a list of numbers, each of at least 0 and at most 1"),
    ],
)
def test_a_wrong_value_gives_one_line_with_the_setting_the_value_and_what_was_expected(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as raised:
        from_mapping(Sample, values, "sample")
    assert str(raised.value) == f"sample: {message}"


def test_settings_made_in_python_are_checked_alike() -> None:
    with pytest.raises(InputError, match=r"^epochs is 0; expected an integer of at least 1$"):
        Sample(epochs=0)
    with pytest.raises(InputError, match=r"^epochs is 0; expected an integer of at least 1$"):
        Sample().replace(epochs=0)
    with pytest.raises(InputError, match="unknown setting 'epoch'"):
        Sample(epoch=1)  # type: ignore[call-arg]


def test_settings_cannot_be_changed_in_place_and_a_changed_copy_keeps_the_rest() -> None:
    config = Sample(rate=0.25)
    with pytest.raises(Exception, match="frozen"):
        config.rate = 0.1
    assert config.replace(epochs=3) == Sample(rate=0.25, epochs=3)


@pytest.mark.parametrize("config", CONFIGS.values())
def test_every_setting_of_a_stage_has_one_line_of_help(config: type[Settings]) -> None:
    for name, field in config.model_fields.items():
        text = field.description or ""
        assert text, name
        assert not text.endswith("."), text
        assert "\n" not in text


def test_an_unknown_setting_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(InputError, match="sample: unknown setting 'epoch'; expected one of epochs, rate"):
        from_mapping(Sample, {"epoch": 3}, "sample")


def test_a_preset_gives_its_settings_and_others_override_them() -> None:
    config = from_mapping(Sample, {"preset": "fast", "pair": [7, 8]}, "sample")
    assert (config.epochs, config.pair, config.rate) == (1, (7, 8), 0.5)


def test_an_unknown_preset_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(InputError, match="sample: unknown preset 'slow'; expected one of fast"):
        from_mapping(Sample, {"preset": "slow"}, "sample")


def test_plain_values_and_back_give_the_same_config() -> None:
    config = Sample(pair=(9, 9), path="y")
    assert from_mapping(Sample, to_mapping(config), "sample") == config


def test_changed_settings_are_those_that_are_not_the_defaults() -> None:
    assert changed_settings(Sample, to_mapping(Sample())) == {}
    values = to_mapping(Sample(pair=(9, 9), epochs=7))
    assert changed_settings(Sample, values) == {"pair": [9, 9], "epochs": 7}
    assert changed_settings(Sample, {**to_mapping(Sample()), "further": 1}) == {"further": 1}


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
        assert (config.objective, config.song_table) == ("cosine", "frozen")
