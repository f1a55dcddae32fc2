"""Objectives against direct computations, and where their gradients go."""

import numpy as np
import pytest
import torch
from networks import NUM_SONGS, model_config, network

from rayrec.model.objectives import OBJECTIVES, Goal, Negatives, cosine, l2, sampled_softmax, softmax
from rayrec.model.popularity_prior import log_prior
from rayrec.model.train_config import SongTable

COUNTS = np.arange(NUM_SONGS)  # song 0 was never played
GOAL = Goal(scale=torch.tensor(12.0))


@pytest.fixture
def negatives() -> Negatives:
    made = Negatives(COUNTS, 16)
    made.draw(torch.Generator().manual_seed(3), torch.device("cpu"))
    return made


@pytest.fixture
def taste() -> torch.Tensor:
    drawn = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(drawn, dim=-1)


def test_cosine_distance_equals_its_formula(negatives: Negatives, taste: torch.Tensor) -> None:
    model = network()
    targets = [3, 9, 9, 1, 59]
    wanted = sum(
        1 - float(t @ model.songs.weight[song] / model.songs.weight[song].norm())
        for t, song in zip(taste, targets, strict=True)
    )
    assert float(cosine(model, taste, torch.tensor(targets).unsqueeze(1), negatives, GOAL)) == pytest.approx(
        wanted, rel=1e-5
    )


def test_sampled_softmax_equals_its_formula(negatives: Negatives, taste: torch.Tensor) -> None:
    model = network()
    drawn = negatives.songs_K.tolist()
    targets = [drawn[0], drawn[3], 5, drawn[0], 59]  # some of them were drawn as negatives too
    vectors = model.songs.weight.detach().numpy().astype(np.float64)
    expected_draws = COUNTS / COUNTS.sum() * 16
    wanted = 0.0
    for t, target in zip(taste.numpy().astype(np.float64), targets, strict=True):
        logits = {0: t @ vectors[target] * 12.0}
        for number, song in enumerate(drawn, start=1):
            if song != target:  # an accidental hit is no negative
                logits[number] = t @ vectors[song] * 12.0 - np.log(expected_draws[song])
        wanted += np.log(sum(np.exp(list(logits.values())))) - logits[0]
    found = sampled_softmax(model, taste, torch.tensor(targets).unsqueeze(1), negatives, GOAL).detach()
    assert float(found) == pytest.approx(wanted, rel=1e-4)


def test_negatives_of_the_batch_count_like_those_drawn(taste: torch.Tensor) -> None:
    """Both stand among K, each song corrected by how often it is expected among all; a target is no negative."""
    model, targets = network(), [3, 9, 9, 1, 59]
    negatives = Negatives(COUNTS, 16, in_batch=5)
    negatives.draw(torch.Generator().manual_seed(3), torch.device("cpu"), torch.tensor(targets))
    together = negatives.songs_K.tolist()
    assert (len(together), together[16:]) == (21, targets)
    vectors = model.songs.weight.detach().numpy().astype(np.float64)
    expected = COUNTS / COUNTS.sum() * 21
    wanted = 0.0
    for t, target in zip(taste.numpy().astype(np.float64), targets, strict=True):
        own = t @ vectors[target] * 12.0
        others = [t @ vectors[song] * 12.0 - np.log(expected[song]) for song in together if song != target]
        wanted += np.log(np.exp([own, *others]).sum()) - own
    found = sampled_softmax(model, taste, torch.tensor(targets).unsqueeze(1), negatives, GOAL).detach()
    assert float(found) == pytest.approx(wanted, rel=1e-4)


def test_l2_is_the_distance_of_unit_vectors(negatives: Negatives, taste: torch.Tensor) -> None:
    model = network()
    targets = [3, 9, 9, 1, 59]
    units = torch.nn.functional.normalize(model.songs.weight.detach(), dim=-1)
    wanted = sum(float((t - units[song]).norm()) for t, song in zip(taste, targets, strict=True))
    assert float(l2(model, taste, torch.tensor(targets).unsqueeze(1), negatives, GOAL)) == pytest.approx(
        wanted, rel=1e-5
    )


def test_l2_has_a_gradient_where_taste_and_song_are_one(negatives: Negatives) -> None:
    model = network()
    song = torch.nn.functional.normalize(model.songs.weight.detach()[4:5], dim=-1).requires_grad_()
    l2(model, song, torch.tensor([[4]]), negatives, GOAL).backward()
    assert song.grad is not None
    assert song.grad.isfinite().all()


def test_softmax_is_over_all_songs(negatives: Negatives, taste: torch.Tensor) -> None:
    model = network()
    targets = [3, 9, 0, 1, 59]
    units = torch.nn.functional.normalize(model.songs.weight.detach(), dim=-1).numpy().astype(np.float64)
    logits = taste.numpy().astype(np.float64) @ units.T * 12.0
    wanted = sum(np.log(np.exp(row).sum()) - row[target] for row, target in zip(logits, targets, strict=True))
    assert float(softmax(model, taste, torch.tensor(targets).unsqueeze(1), negatives, GOAL).detach()) == pytest.approx(
        wanted, rel=1e-4
    )


def test_negatives_come_as_often_as_songs_were_played() -> None:
    negatives = Negatives(COUNTS, 200_000)
    negatives.draw(torch.Generator().manual_seed(0), torch.device("cpu"))
    drawn = np.bincount(negatives.songs_K.numpy(), minlength=NUM_SONGS)
    expected = COUNTS / COUNTS.sum() * 200_000
    assert drawn[0] == 0
    assert (np.abs(drawn - expected) <= 5 * np.sqrt(expected)).all()


def test_the_same_generator_draws_the_same_negatives() -> None:
    first, second, third = (Negatives(COUNTS, 50) for _ in range(3))
    for negatives, seed in ((first, 1), (second, 1), (third, 2)):
        negatives.draw(torch.Generator().manual_seed(seed), torch.device("cpu"))
    assert torch.equal(first.songs_K, second.songs_K)
    assert not torch.equal(first.songs_K, third.songs_K)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_positions_cost_nothing(name: str, negatives: Negatives) -> None:
    loss = OBJECTIVES[name](network(), torch.zeros(0, 8), torch.zeros(0, 1, dtype=torch.int64), negatives, GOAL)
    assert float(loss.detach()) == 0


@pytest.mark.parametrize("table", ["trained", "frozen"])
def test_the_gradient_reaches_the_song_table_sparsely_where_it_is_trained(
    table: SongTable, negatives: Negatives, taste: torch.Tensor
) -> None:
    model = network(model_config(song_table=table))
    targets = torch.tensor([[3], [9], [9], [1], [59]])
    sampled_softmax(model, taste.requires_grad_(), targets, negatives, GOAL).backward()  # type: ignore[no-untyped-call]
    assert taste.grad is not None
    gradient = model.songs.weight.grad
    if table == "frozen":
        assert gradient is None
        return
    assert gradient is not None
    assert gradient.is_sparse
    touched = set(gradient.coalesce().indices()[0].tolist())
    assert touched == set(targets.flatten().tolist()) | set(negatives.songs_K.tolist())


def test_each_horizon_learns_a_temperature_of_its_own(negatives: Negatives, taste: torch.Tensor) -> None:
    model = network()
    goal = Goal(scale=model.scale("long"))
    sampled_softmax(model, taste, torch.tensor([[3], [9], [9], [1], [59]]), negatives, goal).backward()  # type: ignore[no-untyped-call]
    assert model.log_scale.grad is not None
    assert model.log_scale.grad[0] == 0
    assert model.log_scale.grad[1] != 0


@pytest.mark.parametrize("correction", [0.0, 0.5, 1.0])
def test_a_prior_is_added_to_the_logits_before_they_are_compared(correction: float, taste: torch.Tensor) -> None:
    """Over all songs, and estimated from so many that each is drawn."""
    model, targets = network(), torch.tensor([[3], [9], [9], [1], [59]])
    counts = COUNTS + 1
    prior = log_prior(counts, correction)
    goal = Goal(scale=torch.tensor(12.0), prior=torch.from_numpy(prior))
    negatives = Negatives(counts, 1)
    whole = softmax(model, taste, targets, negatives, goal)
    units = torch.nn.functional.normalize(model.songs.weight, dim=-1)
    logits = 12.0 * taste @ units.T + torch.from_numpy(prior)
    torch.testing.assert_close(whole, torch.nn.functional.cross_entropy(logits, targets[:, 0], reduction="sum"))
    many = Negatives(counts, 400_000)
    many.draw(torch.Generator().manual_seed(0), torch.device("cpu"))
    sampled = sampled_softmax(model, taste, targets, many, goal)
    assert float(sampled.detach()) == pytest.approx(float(whole.detach()), rel=0.02)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_several_targets_of_a_position_cost_what_they_cost_alone(name: str, taste: torch.Tensor) -> None:
    """With nearly all songs drawn the estimate of the sum over songs is the same, whoever is the target."""
    model = network()
    negatives = Negatives(COUNTS + 1, 400_000)
    negatives.draw(torch.Generator().manual_seed(0), torch.device("cpu"))
    together = torch.tensor([[3, 9, -1], [4, -1, -1], [7, 7, 5], [-1, 8, 2], [1, 0, 6]])
    rows, places = torch.nonzero(together >= 0, as_tuple=True)
    alone = OBJECTIVES[name](model, taste[rows], together[rows, places].unsqueeze(1), negatives, GOAL)
    found = OBJECTIVES[name](model, taste, together, negatives, GOAL)
    assert float(found.detach()) == pytest.approx(float(alone.detach()), rel=0.01)
