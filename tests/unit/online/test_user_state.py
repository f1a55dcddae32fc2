"""The online state equals the batch job's over the same plays, in any order, for each of two models."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import MINUTE, NUM_SONGS, model_config, network

from rayrec.data.histories import Histories
from rayrec.data.windows import NEVER
from rayrec.model.inference import TasteEncoder
from rayrec.model.taste_table import States
from rayrec.model.train_config import FeatureSpec
from rayrec.online import user_state
from rayrec.online.user_state import (
    OUTCOMES,
    CatchUp,
    Plays,
    Step,
    UserState,
    fold_heard,
    gather,
    join_plays,
    plan_plays,
    scatter,
)
from rayrec.recommend.base import LATEST_PLAYS

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
FEATURES = FeatureSpec(contexts=("radio", "search"), hour=True, skipped=True, pause_hours=0.05)
ENCODERS = {
    "gru": TasteEncoder(network(model_config(layers=2, features=FEATURES))),
    "lstm": TasteEncoder(network(model_config(layers=1, cell="lstm", features=FEATURES))),
}


@pytest.fixture(autouse=True)
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the window hold only 4 to 8 plays, so that tests with few plays reach far beyond it."""
    monkeypatch.setattr(user_state, "WINDOW", 4)
    monkeypatch.setattr(user_state, "MAX_PLAYS_OF_ONE_TIME", 20)


@pytest.fixture(params=list(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> TasteEncoder:
    return ENCODERS[request.param]


Runner = Callable[[Histories, States], States]  # returns the states after plays, from the states before them


def runner(encoder: TasteEncoder) -> Runner:
    return lambda plays, start: encoder.run(plays, start=start)[1]


def advance(run: Runner, state: UserState, model: str, arrived: Plays) -> tuple[UserState, Step]:
    """Add plays to a state with the network `run`; return the new state and the step."""
    step = plan_plays(state, model, arrived)
    return scatter([step], run(*gather([step])) if step.runs else None)[0], step


def new_user(encoder: TasteEncoder) -> UserState:
    return UserState.start("m", encoder.initial_states(1))


def random_plays(count: int, seed: int = 0) -> Plays:
    """Return random plays in time order, no two of them at one moment."""
    random = np.random.default_rng(seed)
    return Plays.of(
        random.integers(0, NUM_SONGS + 3, count),  # three songs are newer than the network
        np.cumsum(random.integers(1, 30 * MINUTE, count)),
        contexts=random.integers(0, 4, count),
        skipped=random.random(count) < 0.3,
    )


def require_batch_state(encoder: TasteEncoder, state: UserState, plays: Plays, model: str = "m") -> None:
    """Check that the state equals the network's after one pass over the plays in time order."""
    ordered = plays.take(np.argsort(plays.played_at, kind="stable"))
    expected = encoder.run(join_plays([ordered]))[1]
    model_state = state.current(model)
    assert model_state is not None
    np.testing.assert_allclose(model_state.hidden, expected.hidden[0], **TOLERANCE)
    assert (state.last_played_at, state.plays) == (expected.last_played_at[0], len(plays))
    states_before = encoder.run(join_plays([ordered.take(slice(state.log_plays))]))[1]
    np.testing.assert_allclose(model_state.start_hidden, states_before.hidden[0], **TOLERANCE)
    assert state.before_at == model_state.before_at == states_before.last_played_at[0]
    for name in ("songs", "played_at", "contexts", "skipped"):
        np.testing.assert_array_equal(getattr(state.window, name), getattr(ordered, name)[state.log_plays :])


def post(encoder: TasteEncoder, state: UserState, parts: Sequence[Plays]) -> tuple[UserState, list[Step]]:
    steps = []
    for part in parts:
        state, step = advance(runner(encoder), state, "m", part)
        steps.append(step)
    return state, steps


def outcomes(step: Step) -> list[str]:
    return [OUTCOMES[code] for code in step.outcomes]


def test_plays_in_turn_cost_one_step_each_however_long_the_history(encoder: TasteEncoder) -> None:
    plays, state, play_counts = random_plays(100), new_user(encoder), []

    def run_and_count(histories: Histories, start: States) -> States:
        play_counts.append(histories.num_plays)
        return encoder.run(histories, start=start)[1]

    for position in range(100):
        state, _ = advance(run_and_count, state, "m", plays.take(slice(position, position + 1)))
        assert len(state.window) <= 8
    require_batch_state(encoder, state, plays)
    assert len(play_counts) == 100
    assert set(play_counts) == {1, 1 + 5}  # a new play, at times with the 5 oldest plays, which leave a full window
    assert sum(play_counts) <= 2 * 100


@given(data=st.data())
@settings(max_examples=60)
def test_any_order_within_the_window_gives_the_state_of_the_batch(data: st.DataObject) -> None:
    """Plays are out of order by less than the window and come in calls of any size."""
    encoder = ENCODERS[data.draw(st.sampled_from(sorted(ENCODERS)))]
    plays = random_plays(data.draw(st.integers(1, 30)), seed=data.draw(st.integers(0, 9)))
    arrival_positions = [position + data.draw(st.floats(0, 3.9)) for position in range(len(plays))]
    order = np.argsort(arrival_positions, kind="stable")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=12)))
    parts = [plays.take(part) for part in np.split(order, cuts)]
    state, steps = post(encoder, new_user(encoder), parts)
    require_batch_state(encoder, state, plays)
    assert sum(step.count("rejected") for step in steps) == state.rejected == 0
    left_plays = Plays.concatenate([step.leaving_plays for step in steps])
    np.testing.assert_array_equal(left_plays.songs, plays.songs[: state.log_plays])
    np.testing.assert_array_equal(left_plays.played_at, plays.played_at[: state.log_plays])


def test_plays_from_before_the_window_are_rejected_and_counted(encoder: TasteEncoder) -> None:
    plays = random_plays(12)
    late_plays, other_plays = plays.take(slice(0, 2)), plays.take(slice(2, None))
    state, _ = post(encoder, new_user(encoder), [other_plays])
    assert state.log_plays == 6
    state, (step,) = post(encoder, state, [late_plays])
    assert outcomes(step) == ["rejected", "rejected"]
    assert (state.rejected, step.runs) == (2, ())
    require_batch_state(encoder, state, other_plays)


def test_a_play_at_the_time_of_the_last_play_that_left_the_window_is_rejected(encoder: TasteEncoder) -> None:
    """After a load the batch's own last play may be sent again: it must not count twice."""
    states = encoder.run(join_plays([random_plays(5)]))[1]
    state = UserState.start("m", states, plays=5)
    state, (step,) = post(encoder, state, [Plays.of([1], [state.before_at])])
    assert outcomes(step) == ["rejected"]
    assert (state.plays, state.last_played_at) == (5, states.last_played_at[0])


def test_plays_whose_events_are_stored_change_nothing(encoder: TasteEncoder) -> None:
    state, _ = post(encoder, new_user(encoder), [Plays.of([1, 2], [10, 20])])
    step = plan_plays(state, "m", Plays.of([9, 2, 3], [30, 20, 40]), np.array([True, True, False]))
    assert outcomes(step) == ["repeated", "repeated", "taken"]
    state_after = scatter([step], runner(encoder)(*gather([step])))[0]
    require_batch_state(encoder, state_after, Plays.of([1, 2, 3], [10, 20, 40]))
    step = plan_plays(state_after, "m", Plays.of([9], [30]), np.array([True]))
    assert not step.changes
    require_batch_state(encoder, scatter([step], None)[0], Plays.of([1, 2, 3], [10, 20, 40]))


def test_two_plays_of_one_song_at_one_moment_both_count(encoder: TasteEncoder) -> None:
    state, (step,) = post(encoder, new_user(encoder), [Plays.of([1, 1, 1, 2], [10, 20, 10, 10])])
    assert outcomes(step) == ["taken"] * 4
    require_batch_state(encoder, state, Plays.of([1, 1, 2, 1], [10, 10, 10, 20]))


def test_plays_of_one_moment_keep_the_order_in_which_they_came_and_leave_together(encoder: TasteEncoder) -> None:
    plays = Plays.of([5, 1, 4, 2, 3, 9, 8, 7, 6, 0], [10, 10, 10, 10, 10, 10, 11, 12, 13, 14])
    state, steps = post(encoder, new_user(encoder), [plays.take(np.array([position])) for position in range(10)])
    assert [step.leaving for step in steps] == [0] * 9 + [6]
    assert state.log_plays == 6
    require_batch_state(encoder, state, plays)
    assert steps[-1].leaving_plays.songs.tolist() == [5, 1, 4, 2, 3, 9]
    state_at_once, _ = post(encoder, new_user(encoder), [plays])
    np.testing.assert_allclose(state_at_once.models["m"].hidden, state.models["m"].hidden, **TOLERANCE)


def test_plays_of_one_moment_do_not_push_each_other_out_of_the_window(encoder: TasteEncoder) -> None:
    """Plays of one moment stay in the window, whether sent at once or one by one, until later plays fill it."""
    plays = Plays.of(np.arange(12), np.full(12, 10))
    state, _ = post(encoder, new_user(encoder), [plays])
    assert (state.log_plays, len(state.window)) == (0, 12)
    more_plays = [Plays.of([1], [10]), Plays.of([2], [9]), Plays.of([3, 4], [10, 11]), Plays.of([5, 6], [12, 13])]
    state, steps = post(encoder, state, more_plays)
    assert {outcome for step in steps for outcome in outcomes(step)} == {"taken"}
    assert (state.log_plays, state.before_at) == (1, 9)
    last_play = Plays.of([7], [14])
    state, (step,) = post(encoder, state, [last_play])
    assert (step.leaving, state.before_at, state.window.played_at.tolist()) == (14, 10, [11, 12, 13, 14])
    require_batch_state(encoder, state, Plays.concatenate([plays, *more_plays, last_play]))
    state, (step,) = post(encoder, state, [Plays.of([8, 9], [10, 11])])
    assert outcomes(step) == ["rejected", "taken"]


def test_of_too_many_plays_of_one_moment_the_later_ones_are_rejected(encoder: TasteEncoder) -> None:
    plays = Plays.of(np.arange(20), np.full(20, 10))
    state, (_, step) = post(encoder, new_user(encoder), [plays, Plays.of([1, 2], [10, 10])])
    assert outcomes(step) == ["taken", "taken"]
    assert (state.log_plays, len(state.window)) == (22, 0)
    state, (step,) = post(encoder, state, [Plays.of([1, 2], [10, 11])])
    assert outcomes(step) == ["rejected", "taken"]
    require_batch_state(encoder, state, Plays.concatenate([plays, Plays.of([1, 2, 2], [10, 10, 11])]))


def test_steps_of_many_users_are_run_as_one_batch(encoder: TasteEncoder) -> None:
    user_plays = [random_plays(count, seed=count) for count in (3, 11, 20)]
    early_plays = [plays.take(slice(len(plays) - 2)) for plays in user_plays]
    late_plays = [plays.take(slice(len(plays) - 2, None)) for plays in user_plays]
    states = [post(encoder, new_user(encoder), [plays])[0] for plays in early_plays]
    late_plays[2] = late_plays[2].take(np.array([1, 0]))
    late_plays.append(Plays.of([], []))
    steps = [plan_plays(state, "m", plays) for state, plays in zip([*states, states[0]], late_plays, strict=True)]
    end_states = encoder.run(gather(steps)[0], start=gather(steps)[1])[1]
    new_states = scatter(steps, end_states)
    for state, plays in zip(new_states, user_plays, strict=False):
        require_batch_state(encoder, state, plays)
    np.testing.assert_array_equal(new_states[3].models["m"].hidden, states[0].models["m"].hidden)


def other_encoder() -> TasteEncoder:
    return TasteEncoder(network(model_config(layers=1, features=FEATURES), seed=5))


def catch_up(encoder: TasteEncoder, state: UserState, model: str, log: Plays) -> tuple[UserState, int]:
    """Return the state with the model up to date, and the number of plays that its network ran over."""
    step = CatchUp.of(state, model, encoder.initial_states(1), log)
    plays, start = gather([step])
    return scatter([step], runner(encoder)(plays, start))[0], plays.num_plays


def test_another_model_is_computed_from_log_and_window_beside_the_first(encoder: TasteEncoder) -> None:
    plays, second_encoder = random_plays(14), other_encoder()
    state, (step,) = post(encoder, new_user(encoder), [plays])
    state_of_both, _ = catch_up(second_encoder, state, "n", step.leaving_plays)
    require_batch_state(second_encoder, state_of_both, plays, "n")
    require_batch_state(encoder, state_of_both, plays)
    late_play = Plays.of([3], [int(plays.played_at[-2]) + 1])
    state_after = advance(runner(second_encoder), state_of_both, "n", late_play)[0]
    require_batch_state(second_encoder, state_after, Plays.concatenate([plays, late_play]), "n")
    assert state_after.current("m") is None


def test_a_model_that_is_behind_runs_over_only_the_plays_since(encoder: TasteEncoder) -> None:
    plays, second_encoder = random_plays(60), other_encoder()
    state, steps = post(encoder, new_user(encoder), [plays.take(slice(50))])
    state, _ = catch_up(second_encoder, state, "n", Plays.concatenate([step.leaving_plays for step in steps]))
    state, later_steps = post(encoder, state, [plays.take(slice(50, None))])
    log = Plays.concatenate([step.leaving_plays for step in [*steps, *later_steps]])
    current_state, num_plays = catch_up(second_encoder, state, "n", log)
    require_batch_state(second_encoder, current_state, plays, "n")
    assert num_plays < 30


def test_of_three_models_the_two_written_last_are_kept(encoder: TasteEncoder) -> None:
    state, (step,) = post(encoder, new_user(encoder), [random_plays(14)])
    for model in ("n", "o"):
        state, _ = catch_up(other_encoder(), state, model, step.leaving_plays)
    assert list(state.models) == ["n", "o"]


def test_a_log_that_was_replaced_is_run_over_from_the_first_play(encoder: TasteEncoder) -> None:
    plays = random_plays(14)
    state, (step,) = post(encoder, new_user(encoder), [plays])
    restarted_state = replace(state, restarts=1, turn=state.turn + 1)
    current_state, num_plays = catch_up(encoder, restarted_state, "m", step.leaving_plays)
    require_batch_state(encoder, current_state, plays)
    assert num_plays == len(plays) + state.log_plays


def test_a_log_that_the_store_has_lost_is_run_over_as_far_as_it_is_there(
    encoder: TasteEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    plays = random_plays(14)
    state, (step,) = post(encoder, new_user(encoder), [plays])
    for num_left in (0, 2):
        plays_left = step.leaving_plays.last(num_left)
        caught_up, _ = catch_up(other_encoder(), state, "n", plays_left)
        expected = other_encoder().run(join_plays([Plays.concatenate([plays_left, state.window])]))[1]
        np.testing.assert_allclose(caught_up.states("n").hidden, expected.hidden, **TOLERANCE)
        assert f"a user's log has {num_left} plays, expected the last 10 of 10: the store has lost some" in caplog.text


def test_plays_from_before_a_deletion_are_rejected(encoder: TasteEncoder) -> None:
    forgotten_state = replace(new_user(encoder), forgotten_at=100)
    assert forgotten_state.forgotten
    state, (step,) = post(encoder, forgotten_state, [Plays.of([1, 2, 3], [90, 100, 101])])
    assert outcomes(step) == ["rejected", "rejected", "taken"]
    require_batch_state(encoder, state, Plays.of([3], [101]))
    assert not state.forgotten


def test_songs_of_plays_that_no_answer_reads_stay_heard() -> None:
    songs = np.arange(LATEST_PLAYS + 10, dtype=np.int32) % 4_000
    state = UserState(log_plays=len(songs))
    folded_state, heard_songs = fold_heard(state, songs, np.zeros(0, np.int32))
    assert len(songs) - folded_state.folded == LATEST_PLAYS // 2
    assert set(heard_songs) == set(songs[: folded_state.folded])
    more_songs = np.concatenate([songs, np.full(3_000, 9_999, np.int32)])
    second_state, all_heard_songs = fold_heard(
        replace(folded_state, log_plays=len(more_songs)), more_songs[-LATEST_PLAYS - 600 :], heard_songs
    )
    assert set(all_heard_songs) == set(more_songs[: second_state.folded])


def test_a_new_user_has_no_plays(encoder: TasteEncoder) -> None:
    state = new_user(encoder)
    assert (state.plays, state.last_played_at) == (0, NEVER)
    assert state.states("m").hidden.shape == encoder.initial_states(1).hidden.shape
    step = plan_plays(state, "m", Plays.of([], []))
    assert scatter([step], None)[0].plays == 0


def test_arrays_of_unlike_length_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Plays.of([1, 2], [10])
