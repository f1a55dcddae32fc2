"""A whole fit: it learns a planted world, stops in time, and resumes as if it had never stopped."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import MINUTE, NUM_SONGS, Crash, MemoryHost, cycling_histories, model_config, network, with_other_inputs
from worlds import random_vectors

from rayrec.data.histories import Histories
from rayrec.errors import DivergedError
from rayrec.model import epochs as epochs_module
from rayrec.model.checkpoint import export_song_vectors, load_model, save_model
from rayrec.model.epochs import (
    RECALL_AT,
    SELECTION_METRIC,
    Fit,
    FitData,
    Phase,
    Validation,
    copy_weights_from,
    start_vectors,
    validation_metrics,
    validation_tastes,
)
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import TasteModel
from rayrec.model.song_tables import Decay, RowExchange, Share
from rayrec.model.train_config import Objective, SongTable, TrainConfig
from rayrec.storage.workspace import Workspace

CUT = 15 * MINUTE
SMALL_SETTINGS = {
    "hidden_dim": 16,
    "window": 12,
    "batch": 8,
    "negatives": 30,
    "long": (2, 5),
    "learning_rate": 0.01,
    "dropout": 0.0,
}


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**SMALL_SETTINGS, "epochs": 3, **changes})


@pytest.fixture(scope="module")
def histories() -> Histories:
    torch.set_num_threads(1)
    return cycling_histories(50)


@pytest.fixture(scope="module")
def plays(histories: Histories) -> dict[Phase, Histories]:
    return {"selection": histories.before(CUT), "final": histories}


@pytest.fixture(scope="module")
def validation(histories: Histories) -> Validation:
    return Validation(histories=histories, plays=np.flatnonzero(histories.played_at >= CUT))


def fit_of(config: TrainConfig, plays: dict[Phase, Histories], validation: Validation | None, host: MemoryHost) -> Fit:
    data = {
        phase: FitData(vectors=random_vectors(NUM_SONGS), counts=np.bincount(plays[phase].songs, minlength=NUM_SONGS))
        for phase in plays
    }
    return Fit(model_config(config), config, data, host, validation=validation)


def have_equal_weights(first: TasteModel, second: TasteModel) -> bool:
    return all(
        torch.equal(value, other)
        for value, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("objective", "table"), [("sampled-softmax", "trained"), ("sampled-softmax", "frozen"), ("cosine", "frozen")]
)
def test_a_planted_world_is_learned_far_above_popularity(
    plays: dict[Phase, Histories], validation: Validation, objective: Objective, table: SongTable
) -> None:
    config = settings(epochs=10, patience=9, learning_rate=0.03, refit=False, objective=objective, song_table=table)
    fit = fit_of(config, plays, validation, MemoryHost(plays, config))
    fit.run()
    counts = np.bincount(plays["selection"].songs, minlength=NUM_SONGS)
    popular = np.argsort(-counts)[:RECALL_AT]
    popularity = np.isin(validation.histories.songs[validation.plays], popular).mean()
    assert popularity < 0.5
    assert fit.progress.epochs[fit.progress.best_epoch][f"validation_recall@{RECALL_AT}"] > 0.9


def test_without_a_validation_range_the_fit_runs_all_its_epochs(plays: dict[Phase, Histories]) -> None:
    config = settings()
    host = MemoryHost(plays, config)
    fit = fit_of(config, {"final": plays["final"]}, None, host)
    fit.run()
    assert [line["epoch"] for line in fit.progress.epochs] == [0, 1, 2]
    assert {phase for phase, _ in host.reports} == {"final"}
    inputs = int((plays["final"].lengths - 1).sum())
    assert [line["plays"] for line in fit.progress.epochs] == [inputs] * 3


def replace_validation(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Replace the validation: it returns `values`, one per epoch."""
    iterator = iter(values)
    monkeypatch.setattr(Fit, "validate", lambda _: {SELECTION_METRIC: next(iterator)})


def epochs_of(fit: Fit) -> dict[str, int]:
    phases = [line["phase"] for line in fit.progress.epochs]
    return {phase: phases.count(phase) for phase in set(phases)}


def test_training_stops_when_patience_is_out_and_refits_for_the_best_epochs(
    plays: dict[Phase, Histories], validation: Validation, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_validation(monkeypatch, [0.1, 0.3, 0.2, 0.3, 0.9])
    config = settings(epochs=10, patience=2)
    fit = fit_of(config, plays, validation, MemoryHost(plays, config))
    refitted_model = fit.run()
    assert epochs_of(fit) == {"selection": 4, "final": 2}
    assert (fit.progress.best_epoch, fit.progress.best_ndcg) == (1, 0.3)
    short_config = settings(epochs=2)
    assert have_equal_weights(
        refitted_model, fit_of(short_config, {"final": plays["final"]}, None, MemoryHost(plays, short_config)).run()
    )


def test_without_refit_the_weights_of_the_best_epoch_are_kept(
    plays: dict[Phase, Histories], validation: Validation, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_validation(monkeypatch, [0.1, 0.3, 0.2, 0.2])
    config = settings(epochs=4, patience=5, refit=False)
    kept_model = fit_of(config, plays, validation, MemoryHost(plays, config)).run()
    short_config = config.replace(epochs=2)
    data: dict[Phase, Histories] = {"final": plays["selection"]}
    assert have_equal_weights(kept_model, fit_of(short_config, data, None, MemoryHost(data, short_config)).run())


DEEP = {"song_table": "frozen", "dropout": 0.2, "num_layers": 2}


@pytest.mark.parametrize(
    ("phase", "crash_after", "changes"),
    [
        ("selection", 5, {}),
        ("selection", 15, DEEP),
        ("selection", 20, {"refit": False}),
        ("final", 5, DEEP),
        ("final", 20, {}),
    ],
)
def test_a_resumed_fit_ends_where_an_undisturbed_one_ends(
    plays: dict[Phase, Histories],
    validation: Validation,
    changes: dict[str, Any],
    phase: Phase,
    crash_after: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(epochs_module, "STEPS_BETWEEN_READS", 2)
    monkeypatch.setattr(Fit, "validate", lambda fit: {SELECTION_METRIC: [0.1, 0.3, 0.2][fit.progress.epoch - 1]})
    config = settings(epochs=3, checkpoint_minutes=0.0, **changes)
    undisturbed_host = MemoryHost(plays, config)
    undisturbed = fit_of(config, plays, validation, undisturbed_host)
    expected = undisturbed.run()
    crashing_host = MemoryHost(plays, config, tmp_path, crash_after=(phase, crash_after))
    with pytest.raises(Crash):
        fit_of(config, plays, validation, crashing_host).run()
    resumed_host = MemoryHost(plays, config)
    resumed = fit_of(config, plays, validation, resumed_host)
    resumed.resume(crashing_host.checkpoints[-1])
    assert resumed.progress.phase == phase
    assert have_equal_weights(resumed.run(), expected)
    kept_steps = len(undisturbed_host.reports) - len(resumed_host.reports)
    assert 1 <= len(crashing_host.reports) - kept_steps <= 2  # only steps since the last checkpoint are lost
    assert (resumed.progress.best_epoch, resumed.progress.best_ndcg) == (
        undisturbed.progress.best_epoch,
        undisturbed.progress.best_ndcg,
    )


def test_a_fit_that_resumes_does_not_keep_the_tables_that_it_started_with(
    plays: dict[Phase, Histories], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(epochs=1)
    host = MemoryHost(plays, config, tmp_path)
    fit_of(config, {"final": plays["final"]}, None, host).run()
    resumed = fit_of(config, {"final": plays["final"]}, None, MemoryHost(plays, config))
    first_training = weakref.ref(resumed.training)
    make_model = TasteModel.__init__
    is_first_training_kept = []

    def make_model_after_check(*arguments: Any, **options: Any) -> None:
        is_first_training_kept.append(first_training() is not None)
        make_model(*arguments, **options)

    monkeypatch.setattr(TasteModel, "__init__", make_model_after_check)
    resumed.resume(host.checkpoints[-1])
    assert is_first_training_kept == [False]


def epoch_metrics(fit: Fit) -> list[tuple[Any, ...]]:
    """The figures that each epoch reported, except for times."""
    names = ("phase", "epoch", "plays", "targets")
    return [(*(line[name] for name in names), round(line["loss"], 5)) for line in fit.progress.epochs]


def test_a_fit_resumed_after_any_step_reports_the_plays_and_losses_of_an_undisturbed_one(
    plays: dict[Phase, Histories], validation: Validation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes the last step of an epoch, and the last step of the last epoch."""
    monkeypatch.setattr(epochs_module, "STEPS_BETWEEN_READS", 1)
    monkeypatch.setattr(Fit, "validate", lambda fit: {SELECTION_METRIC: [0.1, 0.3][fit.progress.epoch - 1]})
    config = settings(epochs=2, checkpoint_minutes=0.0)
    host = MemoryHost(plays, config, tmp_path)
    undisturbed = fit_of(config, plays, validation, host)
    undisturbed.run()
    last_steps = 0
    for folder in host.checkpoints[::3] + host.checkpoints[-2:]:
        resumed = fit_of(config, plays, validation, MemoryHost(plays, config))
        resumed.resume(folder)
        last_steps += resumed.progress.step == len(list(host.windows(resumed.progress.phase, 0)))
        resumed.run()
        assert epoch_metrics(resumed) == epoch_metrics(undisturbed), folder
    assert last_steps


def test_a_training_that_diverges_stops_with_advice_and_keeps_no_checkpoint_of_it(
    plays: dict[Phase, Histories], validation: Validation, tmp_path: Path
) -> None:
    config = settings(learning_rate=1e20)
    host = MemoryHost(plays, config, tmp_path)
    with pytest.raises(DivergedError, match=r"not finite in epoch 1.*lower the learning rate \(now 1e\+20\)"):
        fit_of(config, plays, validation, host).run()
    assert host.checkpoints == []


def test_a_weight_that_is_not_finite_stops_a_training_whose_loss_still_is(
    plays: dict[Phase, Histories], validation: Validation
) -> None:
    config = settings()
    fit = fit_of(config, plays, validation, MemoryHost(plays, config))
    with torch.no_grad():
        fit.training.model.heads["long"].weight.fill_(torch.inf)
    fit.training.epoch = lambda *_, **__: None  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="a weight is not finite in epoch 1"):
        fit.run()


def test_a_finished_fit_that_is_resumed_has_nothing_left_to_do(
    plays: dict[Phase, Histories], validation: Validation, tmp_path: Path
) -> None:
    config = settings(epochs=2)
    host = MemoryHost(plays, config, tmp_path)
    expected = fit_of(config, plays, validation, host).run()
    resumed_host = MemoryHost(plays, config)
    resumed = fit_of(config, plays, validation, resumed_host)
    resumed.resume(host.checkpoints[-1])
    assert have_equal_weights(resumed.run(), expected)
    assert resumed_host.reports == []


def test_songs_without_a_vector_start_at_a_random_one_and_the_others_stay() -> None:
    vectors = random_vectors(10)
    vectors[3] = 0
    filled_vectors = start_vectors(vectors, seed=1)
    assert np.linalg.norm(filled_vectors[3]) == pytest.approx(1)
    np.testing.assert_array_equal(np.delete(filled_vectors, 3, axis=0), np.delete(vectors, 3, axis=0))
    np.testing.assert_array_equal(filled_vectors, start_vectors(vectors, seed=1))
    assert not vectors[3].any()


def test_songs_are_known_by_a_play_or_by_a_vector() -> None:
    vectors = random_vectors(4)
    vectors[2:] = 0
    data = FitData(vectors=vectors, counts=np.array([0, 5, 1, 0]))
    assert data.known(Share()).tolist() == [True, True, True, False]
    assert data.known(Share(rank=1, workers=2)).tolist() == [True, False]
    newer_data = FitData(vectors=vectors[:2], counts=np.array([0, 5, 1, 0]))
    assert newer_data.known(Share()).tolist() == [True, True, True, False]


def metrics_of(model: TasteModel, vectors: np.ndarray, validation: Validation) -> dict[str, float]:
    """The validation metrics of a network whose songs have `vectors`."""
    tastes = TasteEncoder(model).vectors(validation.histories, validation.queries, "short")
    return validation_metrics(torch.from_numpy(tastes), torch.from_numpy(vectors), validation, Share())


def count_hits(model: TasteModel, vectors: np.ndarray, validation: Validation) -> int:
    """The number of validation plays whose song ranks among the first 20."""
    return round(metrics_of(model, vectors, validation)[f"validation_recall@{RECALL_AT}"] * len(validation.plays))


@pytest.mark.parametrize(
    ("table", "input_table"), [("trained", False), ("trained", True), ("mapped", False), ("frozen", False)]
)
def test_validation_reads_all_songs_even_unknown_ones_like_the_saved_network(
    validation: Validation, workspace: Workspace, table: SongTable, input_table: bool
) -> None:
    model = with_other_inputs(network(model_config(song_table=table, input_table=input_table)))
    with torch.no_grad():
        for weight in (*model.average_weights.values(), *(model.map.parameters() if model.map else ())):
            weight.uniform_(-1, 1)
    is_known = np.arange(NUM_SONGS) % 5 > 0  # every history has unknown songs
    vectors = export_song_vectors(model, is_known)
    tastes = validation_tastes(model, vectors, RowExchange(Share()), validation, Share())
    save_model(workspace, "models/m", model, is_known)
    saved_encoder = TasteEncoder(load_model(workspace, "models/m"))
    expected = saved_encoder.vectors(validation.histories, validation.queries, "short")
    np.testing.assert_allclose(tastes.numpy(), expected, atol=1e-5)


def test_ties_and_unknown_songs_are_no_hits() -> None:
    """If all 30 songs are equally near to the taste vector, no play counts as found; an unknown song never does."""
    config = settings()
    model = TasteModel(replace(model_config(config), num_songs=30), torch.ones(30, 8))
    histories = Histories.from_lists([[1, 2, 3]], [[1, 2, 3]])
    validation = Validation(histories=histories, plays=np.array([1, 2]))
    equal_vectors: np.ndarray = np.ones((30, 8), np.float32)
    assert count_hits(model, equal_vectors, validation) == 0
    known_vectors = equal_vectors.copy()
    known_vectors[10:] = 0  # ten known songs: all of them are among the first 20, ties or not
    assert count_hits(model, known_vectors, validation) == 2
    known_vectors[2] = 0
    assert count_hits(model, known_vectors, validation) == 1


def test_a_score_that_is_not_a_number_is_no_hit() -> None:
    config = settings()
    broken_model = TasteModel(replace(model_config(config), num_songs=3), torch.ones(3, 8))
    torch.nn.init.constant_(broken_model.heads["short"].bias, torch.nan)
    validation = Validation(histories=Histories.from_lists([[0, 1, 2]], [[1, 2, 3]]), plays=np.array([1, 2]))
    assert count_hits(broken_model, np.ones((3, 8), np.float32), validation) == 0
    sound_model = TasteModel(replace(model_config(config), num_songs=3), torch.ones(3, 8))
    vectors: np.ndarray = np.ones((3, 8), np.float32)
    vectors[1] = np.nan
    assert count_hits(sound_model, vectors, validation) == 1


def test_epochs_are_chosen_by_new_songs_among_those_not_heard() -> None:
    """The taste vector is that of the last song, so that the ranking is known."""
    config = settings(averages=(0.0,))
    model = TasteModel(replace(model_config(config), num_songs=4), torch.eye(8)[:4])
    with torch.no_grad():
        model.average_weights["short"].fill_(1e6)
    vectors = np.array([[1, 0, 0.5, 0], [0.9, 0, 0.4, 0], [0.8, 0, 0.3, 0], [0.1, 0, 0.9, 0]], dtype=np.float32)
    vectors = np.concatenate([vectors, np.zeros((4, 4), np.float32)], axis=1)
    histories = Histories.from_lists([[1, 0, 2, 0]], [[1, 2, 3, 4]])
    validation = Validation(histories=histories, plays=np.array([2, 3]))
    # Song 2 after song 0 ranks third, behind 0 and 1, which were heard. Song 0 after 2 ranks second and is not new.
    assert metrics_of(model, vectors, validation) == {
        f"validation_recall@{RECALL_AT}": 1.0,
        f"validation_mrr@{RECALL_AT}": pytest.approx((1 / 3 + 1 / 2) / 2),
        SELECTION_METRIC: pytest.approx(1.0),
    }


@pytest.mark.parametrize("part", [0.1, 0.33, 0.5])
@pytest.mark.parametrize("steps", [200, 2000])
def test_the_mean_age_of_averaged_steps_is_a_given_part_of_all_steps(part: float, steps: int) -> None:
    decay, ages = Decay(part), np.arange(steps)[::-1]
    factors = np.array([decay.step() for _ in range(steps)])
    weights = (1 - factors) * np.append(np.cumprod(factors[:0:-1])[::-1], 1)
    weights /= weights.sum()
    assert float(weights @ ages) / steps == pytest.approx(part, abs=0.02)
    assert weights[: steps // 10].sum() < 0.11  # the first steps have little weight


def test_the_network_kept_is_the_average_of_the_last_steps(plays: dict[Phase, Histories]) -> None:
    """Both for dense weights and for rows of tables, which are updated only when they are looked up."""
    config = settings(epochs=1, averaged_part=0.2)
    host = MemoryHost(plays, config)
    fit = fit_of(config, {"final": plays["final"]}, None, host)
    expected = {name: value.clone() for name, value in fit.training.model.state_dict().items()}
    num_steps = 0

    def average_step(*_: object) -> None:
        nonlocal num_steps
        factor = (1 + num_steps) / (5 + num_steps)
        for name, value in fit.training.model.state_dict().items():
            expected[name] = factor * expected[name] + (1 - factor) * value
        num_steps += 1

    host.stepped = average_step  # type: ignore[method-assign]
    kept_model = fit.run()
    assert num_steps > 5
    for name, value in kept_model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    assert not have_equal_weights(kept_model, fit.training.model)


def test_a_network_starts_from_another_and_new_songs_keep_their_rows(plays: dict[Phase, Histories]) -> None:
    config = settings(epochs=2)
    old_model = fit_of(config, {"final": plays["final"]}, None, MemoryHost(plays, config)).run()
    with torch.no_grad():
        old_model.songs.weight[7] = 0  # a stored network has zeros for a song that it does not know
    new_model = TasteModel(
        replace(old_model.config, num_songs=NUM_SONGS + 5), torch.from_numpy(random_vectors(NUM_SONGS + 5))
    )
    start_weights = new_model.songs.weight.clone()
    copy_weights_from(old_model, new_model, Share())
    known_songs = np.delete(np.arange(NUM_SONGS), 7)
    assert torch.equal(new_model.songs.weight[known_songs], old_model.songs.weight[known_songs])
    assert torch.equal(
        new_model.songs.weight[[7, *range(NUM_SONGS, NUM_SONGS + 5)]],
        start_weights[[7, *range(NUM_SONGS, NUM_SONGS + 5)]],
    )
    assert torch.equal(new_model.dense.weight, old_model.dense.weight)


def test_a_fit_that_starts_from_a_trained_network_begins_with_its_loss(plays: dict[Phase, Histories]) -> None:
    config = settings(epochs=6)
    host = MemoryHost(plays, config)
    first = fit_of(config, {"final": plays["final"]}, None, host)
    start_model = first.run()
    data = {"final": FitData(vectors=random_vectors(NUM_SONGS), counts=np.full(NUM_SONGS, 10))}
    short_config = config.replace(epochs=1)
    second = Fit(model_config(short_config), short_config, data, host, validation=None, start=start_model)  # type: ignore[arg-type]
    second.run()
    losses = [line["loss"] for line in first.progress.epochs]
    assert second.progress.epochs[0]["loss"] < losses[2]
