"""Objectives against direct computations, and where their gradients go."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import NUM_SONGS
from torch import Tensor
from worlds import random_vectors

from rayrec.model import objectives
from rayrec.model.objectives import (
    OBJECTIVES,
    Negatives,
    NegativeSampler,
    Targets,
    cosine,
    l2,
    log_prior,
    softmax,
)

COUNTS = np.arange(NUM_SONGS)  # song 0 was never played
SCALE = torch.full((5,), 12.0)
TARGETS = [3, 9, 9, 1, 59]
SONGS = torch.from_numpy(random_vectors(NUM_SONGS, 8))  # unit vectors; the songs of the step are all songs


@pytest.fixture
def taste() -> Tensor:
    vectors = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(vectors, dim=-1)


def draw_negatives(counts: np.ndarray, count: int, prior: np.ndarray | None = None, seed: int = 3) -> Negatives:
    songs, weights = NegativeSampler(counts, count).draw(np.random.default_rng(seed))
    total_weights = weights if prior is None else weights + prior[songs]
    return Negatives(song_rows_K=torch.from_numpy(songs), weight_KH=torch.from_numpy(total_weights)[:, None])


ALL_NEGATIVES = Negatives(song_rows_K=torch.arange(NUM_SONGS), weight_KH=torch.zeros(NUM_SONGS, 1))


def targets_of(songs: list[int] | list[list[int]], negatives: Negatives, prior: np.ndarray | None = None) -> Targets:
    """The targets of position 0, 1, ...; in `songs`, -1 fills up positions with fewer targets than others."""
    songs_PT = np.array(songs).reshape(len(songs), -1)
    clipped_PT = songs_PT.clip(min=0)
    return Targets.of(
        positions=np.arange(len(songs)),
        horizons_PH=np.ones((len(songs), 1)),
        songs_PT=clipped_PT,
        song_rows_PT=clipped_PT,
        exists_PT=songs_PT >= 0,
        negatives=negatives.song_rows_K.numpy(),
        prior_PT=np.zeros(clipped_PT.shape, dtype=np.float32) if prior is None else prior[clipped_PT],
        weight_H=np.ones(1),
        count=NUM_SONGS,
    )


def test_cosine_distance_equals_its_formula(taste: Tensor) -> None:
    expected = sum(1 - float(vector @ SONGS[song]) for vector, song in zip(taste, TARGETS, strict=True))
    assert float(cosine(SONGS, taste, targets_of(TARGETS, ALL_NEGATIVES), ALL_NEGATIVES, SCALE)) == pytest.approx(
        expected, rel=1e-5
    )


def test_sampled_softmax_equals_its_formula(taste: Tensor) -> None:
    sampler = NegativeSampler(COUNTS, 16)
    songs, weights = sampler.draw(np.random.default_rng(3))
    assert len(songs) < 16  # some were drawn twice, and count twice
    points = np.random.default_rng(3).random(16)
    drawn_songs = np.searchsorted(np.cumsum(COUNTS / COUNTS.sum()), points).tolist()
    targets = [drawn_songs[0], drawn_songs[3], 5, drawn_songs[0], 59]  # some of them were drawn as negatives too
    expected_draws = COUNTS / COUNTS.sum() * 16
    expected = 0.0
    for vector, target in zip(taste.numpy().astype(np.float64), targets, strict=True):
        logits = {0: vector @ SONGS[target].numpy() * 12.0}
        for number, song in enumerate(drawn_songs, start=1):
            if song != target:  # an accidental hit is no negative
                logits[number] = vector @ SONGS[song].numpy() * 12.0 - np.log(expected_draws[song])
        expected += np.log(sum(np.exp(list(logits.values())))) - logits[0]
    negatives = Negatives(song_rows_K=torch.from_numpy(songs), weight_KH=torch.from_numpy(weights)[:, None])
    assert float(softmax(SONGS, taste, targets_of(targets, negatives), negatives, SCALE)) == pytest.approx(
        expected, rel=1e-4
    )


def test_l2_is_the_distance_of_unit_vectors(taste: Tensor) -> None:
    expected = sum(float((vector - SONGS[song]).norm()) for vector, song in zip(taste, TARGETS, strict=True))
    assert float(l2(SONGS, taste, targets_of(TARGETS, ALL_NEGATIVES), ALL_NEGATIVES, SCALE)) == pytest.approx(
        expected, rel=1e-5
    )


def test_l2_has_a_gradient_where_taste_and_song_are_one() -> None:
    song = SONGS[4:5].clone().requires_grad_()
    l2(SONGS, song, targets_of([4], ALL_NEGATIVES), ALL_NEGATIVES, SCALE[:1]).backward()  # type: ignore[no-untyped-call]
    assert song.grad is not None
    assert song.grad.isfinite().all()


def test_softmax_is_over_all_songs_where_all_are_negatives(taste: Tensor) -> None:
    logits = 12.0 * taste @ SONGS.T
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(TARGETS), reduction="sum")
    torch.testing.assert_close(
        softmax(SONGS, taste, targets_of(TARGETS, ALL_NEGATIVES), ALL_NEGATIVES, SCALE), expected
    )


def plain_softmax(songs: Tensor, taste: Tensor, targets: Targets, negatives: Negatives, scale: Tensor) -> Tensor:
    """The loss of `softmax`, with all logits at once and gradients by autograd."""
    query = taste * scale.unsqueeze(1)
    target_logits = (query.unsqueeze(1) * songs[targets.song_rows_PT]).sum(-1) + targets.prior_PT
    negative_logits = query @ songs[negatives.song_rows_K].T + targets.horizons_PH @ negatives.weight_KH.T
    logits = torch.cat(
        [
            negative_logits,
            target_logits + targets.missing_PT,
            negative_logits.new_full((len(negative_logits), 1), -torch.inf),
        ],
        dim=1,
    )
    log_sum = logits.scatter(1, targets.hits_PT, -torch.inf).logsumexp(1, keepdim=True)
    return ((log_sum - target_logits) * targets.weight_PT).sum()


@pytest.mark.parametrize("chunk", [1_000_000, 100])
def test_gradients_of_chunks_equal_those_of_all_logits_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two horizons have different weights for their targets and negatives."""
    monkeypatch.setattr(objectives, "CHUNK_LOGITS", {"cpu": chunk})
    generator = torch.Generator().manual_seed(5)
    taste = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    songs = torch.randint(-1, NUM_SONGS, (40, 3), generator=generator)
    songs[:, 0] = songs[:, 0].clamp(min=0)
    songs[25:, 1:] = -1
    prior = log_prior(COUNTS + 1, 0.5)
    negatives = draw_negatives(COUNTS, 30, prior)
    targets, float64 = targets_of(songs.tolist(), negatives, prior), {"dtype": torch.float64}
    is_second = (torch.arange(40) >= 25).to(**float64)
    weights = torch.cat([negatives.weight_KH, 1 - negatives.weight_KH], dim=1).to(**float64)
    exact_targets = replace(
        targets,
        horizons_PH=torch.stack([1 - is_second, is_second], dim=1),
        weight_H=torch.tensor([1.0, 0.5], **float64),
        **{name: getattr(targets, name).to(**float64) for name in ("weight_PT", "missing_PT", "prior_PT")},
    ).weighed(np.array([40.0, 7.0]))
    assert exact_targets.rows == [40, 25, 25]
    assert (exact_targets.hits_PT < len(negatives.song_rows_K)).any()
    results: list[list[Tensor]] = []
    for objective in (softmax, plain_softmax):
        leaves = [value.double().clone().requires_grad_() for value in (SONGS, taste, torch.linspace(5, 15, 40))]
        loss = objective(leaves[0], leaves[1], exact_targets, replace(negatives, weight_KH=weights), leaves[2])
        (3 * loss).backward()  # type: ignore[no-untyped-call]
        results.append([loss, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(results[0]) == 4
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def test_products_in_bfloat16_stay_near_those_in_float32(taste: Tensor) -> None:
    exact_loss = softmax(SONGS, taste, targets_of(TARGETS, ALL_NEGATIVES), ALL_NEGATIVES, SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough_loss = softmax(SONGS, taste, targets_of(TARGETS, ALL_NEGATIVES), ALL_NEGATIVES, SCALE)
    assert rough_loss.dtype == torch.float32
    assert float(rough_loss) == pytest.approx(float(exact_loss), rel=0.01)


def test_negatives_come_as_often_as_songs_were_played() -> None:
    songs, weights = NegativeSampler(COUNTS, 200_000).draw(np.random.default_rng(0))
    expected = COUNTS[songs] / COUNTS.sum() * 200_000
    draw_counts = np.exp(weights) * expected  # weights: log of the number of draws, minus log of the expected number
    assert 0 not in songs
    assert draw_counts.sum() == pytest.approx(200_000, rel=1e-4)
    assert (np.abs(draw_counts - expected) <= 5 * np.sqrt(expected)).all()


def test_the_same_generator_draws_the_same_negatives() -> None:
    first, second, third = (NegativeSampler(COUNTS, 50).draw(np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_reaches_the_songs_that_take_part(name: str, taste: Tensor) -> None:
    negatives, songs = draw_negatives(COUNTS, 16), SONGS.clone().requires_grad_()
    loss = OBJECTIVES[name](songs, taste.requires_grad_(), targets_of(TARGETS, negatives), negatives, SCALE)
    loss.backward()  # type: ignore[no-untyped-call]
    assert taste.grad is not None
    assert songs.grad is not None
    competing = set(negatives.song_rows_K.tolist()) if "softmax" in name else set()
    assert set(songs.grad.any(-1).nonzero().flatten().tolist()) == set(TARGETS) | competing


@pytest.mark.parametrize("correction", [0.0, 0.5, 1.0])
def test_a_prior_is_added_to_the_logits_before_they_are_compared(correction: float, taste: Tensor) -> None:
    """Both over all songs, and estimated from a sample so large that it has every song."""
    counts = COUNTS + 1
    prior = log_prior(counts, correction)
    prior_negatives = replace(ALL_NEGATIVES, weight_KH=torch.from_numpy(prior)[:, None])
    full_loss = softmax(SONGS, taste, targets_of(TARGETS, prior_negatives, prior), prior_negatives, SCALE)
    logits = 12.0 * taste @ SONGS.T + torch.from_numpy(prior)
    torch.testing.assert_close(
        full_loss, torch.nn.functional.cross_entropy(logits, torch.tensor(TARGETS), reduction="sum")
    )
    sampled_negatives = draw_negatives(counts, 400_000, prior)
    sampled_loss = softmax(SONGS, taste, targets_of(TARGETS, sampled_negatives, prior), sampled_negatives, SCALE)
    assert float(sampled_loss) == pytest.approx(float(full_loss), rel=0.02)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_several_targets_of_a_position_cost_what_they_cost_alone(name: str, taste: Tensor) -> None:
    """Nearly all songs are drawn, so that the estimate of the sum over songs does not depend on the target."""
    negatives = draw_negatives(COUNTS + 1, 400_000)
    songs = torch.tensor([[3, 9, -1], [4, -1, -1], [7, 7, 5], [-1, 8, 2], [1, 0, 6]])
    rows, columns = torch.nonzero(songs >= 0, as_tuple=True)
    single_targets = targets_of(songs[rows, columns].tolist(), negatives)
    expected = OBJECTIVES[name](SONGS, taste[rows], single_targets, negatives, SCALE[:1].expand(len(rows)))
    actual = OBJECTIVES[name](SONGS, taste, targets_of(songs.tolist(), negatives), negatives, SCALE)
    assert float(actual) == pytest.approx(float(expected), rel=0.01)
