"""The factor that turns cosines into logits, which is not a trained weight."""

import math

import pytest
from networks import NUM_SONGS, network

from rayrec.model.train_config import LEAST_SCALE, DaysHorizon, FeatureSpec, Horizon, TrainConfig, logit_scale


@pytest.mark.parametrize(("offsets", "choices"), [((1, 1), 1), ((25, 50), 26)])
def test_the_only_fitting_song_has_a_probability_of_one_in_choices_plus_one(
    offsets: tuple[int, int], choices: int
) -> None:
    songs = 100_000
    scale = logit_scale(songs, Horizon(min_offset=offsets[0], max_offset=offsets[1]))
    fitting_weight, other_weight = math.exp(scale), (songs - 1) * math.exp(0.0)
    assert fitting_weight / (fitting_weight + other_weight) == pytest.approx(1 / (choices + 1), rel=1e-4)


def test_a_small_catalog_has_the_least_scale() -> None:
    assert logit_scale(10, Horizon(min_offset=1, max_offset=1)) == LEAST_SCALE
    assert logit_scale(0, DaysHorizon(first_day=0, last_day=7)) == LEAST_SCALE


def test_the_scales_of_a_network_follow_from_its_catalog_and_horizons_and_are_not_trained() -> None:
    shape = TrainConfig().network_shape(num_songs=20_000, embedding_dim=8, features=FeatureSpec())
    assert shape.logit_scales == pytest.approx({"short": math.log(20_000), "long": math.log(20_000 / 26)})
    model = network()
    assert model.config.logit_scales["short"] == pytest.approx(math.log(NUM_SONGS))
    assert not [name for name in model.state_dict() if "scale" in name]
