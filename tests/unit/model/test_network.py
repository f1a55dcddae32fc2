"""The network: padding changes nothing, and training computes the same as inference."""

from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from networks import NUM_SONGS, model_config, network, with_other_inputs
from worlds import random_histories

from rayrec.data.histories import Histories, Queries
from rayrec.data.windows import NEVER
from rayrec.model.network import PlayBatch, TasteModel, from_state, pad
from rayrec.model.train_config import Cell, FeatureSpec
from rayrec.recommend.baselines import AverageRecommender


@pytest.fixture(scope="module")
def histories() -> Histories:
    all_histories = random_histories(12, NUM_SONGS, longest=9, seed=2)
    return all_histories.take(all_histories.lengths > 0)


@pytest.fixture(params=product([1, 2], get_args(Cell), [False, True]), ids=str)
def model(request: pytest.FixtureRequest) -> TasteModel:
    layers, cell, input_table = request.param
    features = FeatureSpec(hour=True, pause_hours=0.05)
    shape = model_config(layers=layers, cell=cell, input_table=input_table, features=features)
    return with_other_inputs(network(shape))


def padded(model: TasteModel, histories: Histories) -> PlayBatch:
    return pad(histories, np.full(len(histories), NEVER), model.config.features)


@torch.inference_mode()
def test_padding_and_neighbors_in_the_batch_change_nothing(model: TasteModel, histories: Histories) -> None:
    batch_inputs, batch_states = model.trunk(padded(model, histories))
    for row, length in enumerate(histories.lengths):
        head_inputs, state = model.trunk(padded(model, histories.take(np.array([row]))))
        torch.testing.assert_close(batch_inputs[row, :length], head_inputs[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(batch_states[:, row], state[:, 0], atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_the_state_is_the_one_after_the_last_play_not_after_the_padding(
    model: TasteModel, histories: Histories
) -> None:
    head_inputs, states = model.trunk(padded(model, histories))
    ends = torch.from_numpy(histories.lengths - 1)
    torch.testing.assert_close(model.head_inputs_of(states), head_inputs[torch.arange(len(histories)), ends])


@torch.inference_mode()
def test_the_cell_computes_in_float32_while_other_products_of_training_are_in_bfloat16(
    model: TasteModel, histories: Histories
) -> None:
    batch = padded(model, histories)
    dtypes: dict[str, torch.dtype] = {}
    cell_hook = model.rnn.register_forward_hook(lambda _, __, output: dtypes.update(cell=output[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        dtypes["other"] = model.dense(torch.zeros(1, model.dense.in_features)).dtype
        model(batch, torch.zeros(batch.songs_BL.shape))
    cell_hook.remove()
    assert dtypes == {"cell": torch.float32, "other": torch.bfloat16}


@torch.inference_mode()
def test_training_computes_what_inference_computes(model: TasteModel, histories: Histories) -> None:
    batch = padded(model, histories)
    gap = torch.rand(batch.songs_BL.shape, generator=torch.Generator().manual_seed(1))
    training_tastes = model(batch, gap)
    head_inputs, _ = model.trunk(batch)
    is_play = torch.arange(head_inputs.shape[1]) < batch.length_B[:, None]
    for horizon, taste in training_tastes.items():
        torch.testing.assert_close(taste[is_play], model.head(head_inputs, gap, horizon)[is_play], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(taste.norm(dim=-1), torch.ones(taste.shape[:2]))
    assert not torch.allclose(training_tastes["short"], training_tastes["long"])


@torch.inference_mode()
def test_averages_are_of_the_vectors_that_tastes_are_compared_with(histories: Histories) -> None:
    model = network(model_config(averages=(0.0,), input_table=True))
    assert model.inputs is not None
    model.inputs.weight.neg_()
    for head in model.heads.values():
        head.weight.zero_()
        head.bias.copy_(torch.eye(len(head.bias))[0] * 1e-6)  # only a direction, which the average outweighs
    model.average_weights["short"].fill_(1e6)
    batch = padded(model, histories)
    last_songs = batch.songs_BL[torch.arange(len(histories)), batch.length_B - 1]
    gap = torch.zeros(batch.songs_BL.shape)
    training_tastes = model(batch, gap)["short"][torch.arange(len(histories)), batch.length_B - 1]
    torch.testing.assert_close(training_tastes, model.song_vectors(last_songs), atol=1e-5, rtol=0)
    state_tastes = model.head(model.head_inputs_of(model.trunk(batch)[1]), gap[:, 0], "short")
    torch.testing.assert_close(state_tastes, training_tastes, atol=1e-5, rtol=0)


@pytest.mark.parametrize("input_table", [False, True])
@pytest.mark.parametrize("cell", get_args(Cell))
def test_gradients_of_training_are_those_of_the_plain_operations_of_inference(
    histories: Histories, cell: Cell, input_table: bool
) -> None:
    gradients = []
    for is_plain in (False, True):
        shape = model_config(averages=(0.0, 0.5, 0.9), cell=cell, input_table=input_table)
        model = with_other_inputs(network(shape, seed=3)).double()
        for table in (model.songs, model.inputs or model.songs):
            table.weight.requires_grad_()
        batch = padded(model, histories)
        gap = torch.rand(batch.songs_BL.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for number, weights in enumerate(model.average_weights.values()):
                weights.copy_(torch.linspace(-0.5, 1 + number, len(weights)))
        is_play = torch.arange(batch.songs_BL.shape[1]) < batch.length_B[:, None]
        head_inputs = model.trunk(batch)[0]
        tastes = {name: model.head(head_inputs, gap, name) for name in model.heads} if is_plain else model(batch, gap)
        direction = torch.linspace(-1, 1, 8, dtype=torch.float64)
        sum(
            (number + 1) * (taste[is_play] @ direction).sum() for number, taste in enumerate(tastes.values())
        ).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    assert gradients[0]["linked.long"] is not None
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-6, msg=name)


@torch.inference_mode()
def test_songs_newer_than_the_network_count_as_a_vector_of_zeros(histories: Histories) -> None:
    model = network()
    newer_history = Histories.from_lists([[3, NUM_SONGS, NUM_SONGS + 50]], [[10, 20, 30]])
    known_history = Histories.from_lists([[3, 7, 7]], [[10, 20, 30]])
    actual, _ = model.trunk(padded(model, newer_history))
    model.songs.weight[7] = 0
    expected, _ = model.trunk(padded(model, known_history))
    torch.testing.assert_close(actual, expected)


@torch.inference_mode()
def test_songs_are_compared_by_direction_alone() -> None:
    model = network()
    vectors_before = model.song_vectors(torch.tensor([1, 2]))
    model.songs.weight[1] *= 17
    torch.testing.assert_close(model.song_vectors(torch.tensor([1, 2])), vectors_before)
    torch.testing.assert_close(vectors_before.norm(dim=-1), torch.ones(2))


@torch.inference_mode()
def test_the_time_of_the_request_matters_only_where_it_is_an_input() -> None:
    head_inputs = torch.randn(3, 12 + 3 * 8, generator=torch.Generator().manual_seed(0))
    short_gap, long_gap = torch.zeros(3), torch.ones(3)
    for is_input in (True, False):
        model = network(model_config(features=FeatureSpec(request_gap=is_input)))
        soon_taste, late_taste = (model.head(head_inputs, gap, "short") for gap in (short_gap, long_gap))
        assert torch.equal(soon_taste, late_taste) is not is_input


def test_song_vectors_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"have shape \(\d+, 9\); expected \(\d+, 8\)"):
        TasteModel(model_config(), torch.zeros(NUM_SONGS, 9))


def test_the_network_keeps_its_own_copy_of_the_song_vectors() -> None:
    vectors = torch.ones(NUM_SONGS, 8)
    model = TasteModel(model_config(song_table="trained"), vectors)
    with torch.no_grad():
        model.songs.weight[0] = 5
    assert (vectors == 1).all()


@torch.inference_mode()
def test_the_averages_are_those_of_the_baseline(histories: Histories) -> None:
    model = network(model_config(averages=(0.25, 0.75, 1.0), features=FeatureSpec()))
    head_inputs, _ = model.trunk(padded(model, histories))
    vectors = torch.nn.functional.normalize(model.songs.weight, dim=-1).numpy()
    queries = Queries.before_plays(histories, np.arange(histories.num_plays))
    has_plays = queries.plays_before > 0
    rows, steps = queries.rows[has_plays], queries.plays_before[has_plays] - 1
    for number, discount in enumerate(model.config.averages):
        actual = head_inputs[torch.from_numpy(rows), torch.from_numpy(steps), 12 + 8 * number : 20 + 8 * number]
        expected = AverageRecommender(vectors, discount).vectors(histories, queries.take(has_plays))
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(("pause_hours", "left"), [(0.0, 0.5), (1.0, 0.5 ** (1 + 3)), (1.5, 0.5 ** (1 + 2))])
def test_a_pause_fades_the_averages_like_as_many_plays_as_fit_in_it(pause_hours: float, left: float) -> None:
    model = network(model_config(averages=(0.0, 0.5, 1.0), features=FeatureSpec(pause_hours=pause_hours)))
    history = Histories.from_lists([[3, 7]], [[0, 3 * 3_600_000]])
    _, state = model.trunk(padded(model, history))
    songs = model.song_vectors(torch.tensor([3, 7]))
    last_song, faded_sum, full_sum = from_state(state[1:], 3, 8)[0]
    torch.testing.assert_close(last_song, songs[1])
    torch.testing.assert_close(faded_sum, songs[1] + left * songs[0])
    torch.testing.assert_close(full_sum, songs.sum(0))
    _, first_state = model.trunk(padded(model, history.span(0, 1)))
    rest_batch = pad(history.span(1, 2), np.array([0]), model.config.features)
    torch.testing.assert_close(model.trunk(rest_batch, first_state)[1], state)


@torch.inference_mode()
def test_the_last_song_played_can_be_predicted_again() -> None:
    model = network()
    history = Histories.from_lists([[3, 7, 9]], [[10, 20, 30]])
    head_inputs, _ = model.trunk(padded(model, history))
    songs = model.song_vectors(torch.arange(NUM_SONGS))
    model.average_weights["short"][0] = 50.0  # the discount 0: the last song
    assert int((songs @ model.head(head_inputs[:, -1], torch.zeros(1), "short")[0]).argmax()) == 9


@torch.inference_mode()
def test_the_long_horizon_starts_from_the_short_one(histories: Histories) -> None:
    model = network()
    head_inputs, _ = model.trunk(padded(model, histories))
    model.linked["long"].fill_(1e4)
    gap = torch.zeros(head_inputs.shape[:2])
    torch.testing.assert_close(
        model.head(head_inputs, gap, "long"), model.head(head_inputs, gap, "short"), atol=1e-3, rtol=0
    )


def test_a_map_of_song_vectors_starts_as_the_identity_and_also_moves_songs_outside_its_training() -> None:
    model = network(model_config(song_table="mapped"))
    songs = torch.arange(NUM_SONGS)
    unit_vectors = torch.nn.functional.normalize(model.songs.weight, dim=-1)
    torch.testing.assert_close(model.song_vectors(songs), unit_vectors)
    assert model.map is not None
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    optimizer = torch.optim.Adam(model.map.parameters(), lr=0.01)
    for _ in range(400):
        loss = (model.song_vectors(songs[:40]) - unit_vectors[:40] @ rotation).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.inference_mode():
        unseen_cosine = (model.song_vectors(songs[40:]) * (unit_vectors[40:] @ rotation)).sum(-1).mean()
        assert float(unseen_cosine) > 0.8
        model.exported = True
        torch.testing.assert_close(model.song_vectors(songs), unit_vectors)
