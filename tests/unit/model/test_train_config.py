"""Settings of the network: what is refused, and what is derived."""

import json
from dataclasses import asdict

import pytest
from networks import model_config

from rayrec.config import from_mapping, to_mapping
from rayrec.errors import InputError
from rayrec.model.train_config import DaysHorizon, FeatureSpec, Horizon, ModelConfig, TasteConfig, TrainConfig


def test_cosine_with_a_table_that_trains_along_is_refused() -> None:
    with pytest.raises(InputError, match="use --song-table frozen, not trained"):
        TrainConfig(objective="cosine")
    TrainConfig(objective="cosine", song_table="frozen")


@pytest.mark.parametrize(
    "bad",
    [
        {"hidden_dim": 0},
        {"epochs": 0},
        {"patience": 0},
        {"workers": -1},
        {"validation_plays": -1},
        {"dropout": 1.0},
        {"learning_rate": 0.0},
        {"batch": 2, "workers": 3},
        {"short": (1, 1, 1)},
        {"long": (5, 2)},
        {"short": (0, 1)},
        {"long_days": (7,)},
        {"long_days": (7, 7)},
    ],
)
def test_settings_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(bad))} is .*; expected"):
        TrainConfig(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{"users": 0}, {"concurrency": 0}])
def test_a_taste_job_needs_users_and_workers(bad: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        TasteConfig(**bad)  # type: ignore[arg-type]


def test_windows_look_ahead_as_far_as_the_farthest_target() -> None:
    assert TrainConfig(short=(1, 3), long=(25, 50)).lookahead == 50
    assert TrainConfig(short=(1, 60)).lookahead == 60
    assert TrainConfig().horizons["long"] == Horizon(min_offset=25, max_offset=50)
    assert TrainConfig(long_days=(0, 7)).lookahead == 500


def test_days_take_the_place_of_the_long_offsets() -> None:
    horizons = TrainConfig(long_days=(1, 7)).horizons
    assert horizons == {"short": Horizon(min_offset=1, max_offset=1), "long": DaysHorizon(first_day=1, last_day=7)}
    assert [str(horizon) for horizon in horizons.values()] == ["1 to 1 plays later", "1 to 7 days later"]
    assert list(TrainConfig(long=(), long_days=(1, 7)).horizons) == ["short", "long"]


def test_playlists_have_no_days() -> None:
    with pytest.raises(InputError, match="--long-days needs times, which playlists do not have"):
        TrainConfig(long_days=(0, 7), source="playlists")


def test_settings_come_back_from_plain_values() -> None:
    config = TrainConfig(long=(3, 9), objective="cosine", song_table="frozen")
    assert from_mapping(TrainConfig, json.loads(json.dumps(to_mapping(config))), "[train]") == config


def test_the_shape_of_a_network_comes_back_from_json() -> None:
    for settings in (None, TrainConfig(long_days=(0, 7))):
        config = model_config(settings, features=FeatureSpec(contexts=("album", "radio"), skipped=True))
        assert ModelConfig.from_json(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("at", [1711929600, "1711929600", "1711929600000", "2024-04-01T00:00:00Z"])
def test_the_time_of_taste_vectors_is_read_like_every_other_time(at: object) -> None:
    assert TasteConfig(at=at).at == "1711929600000"
    with pytest.raises(InputError, match="no zone"):
        TasteConfig(at="2024-04-01T00:00:00")
