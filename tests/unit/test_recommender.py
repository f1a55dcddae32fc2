"""The facade: tables of plays in, tables of songs out, saved and loaded as one folder."""

import copy
import gc
import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest
import ray
from rings import HEAD, ring_plays
from s3 import s3_server
from without_ray import without_ray

import rayrec
from rayrec import Dataset, ImportConfig, InputError, NotFoundError, Recommender
from rayrec.errors import BusyError
from rayrec.jobs.compact import compact
from rayrec.jobs.forget import forget_users
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.jobs.taste import compute_tastes
from rayrec.jobs.verify import verify_workspace
from rayrec.model.train_config import TasteConfig
from rayrec.recommend import reranking
from rayrec.recommend.reranking import choose_for_users
from rayrec.storage.locking import exclusive
from rayrec.storage.releases import read_active
from rayrec.storage.workspace import LOCK, LOCK_HOLDER, Workspace

SETTINGS: dict[str, Any] = {"hidden_dim": 16, "epochs": 4, "learning_rate": 0.01, "negatives": 16, "progress": False}
COLUMNS = ["user_id", "rank", "song_id", "title", "artist", "score"]


def frame(rows: list[str]) -> pd.DataFrame:
    """Return the rows as a DataFrame with pandas timestamps without a time zone."""
    table = pd.DataFrame([row.strip().split(",") for row in rows], columns=HEAD.strip().split(","))
    table["timestamp"] = pd.to_datetime(table["timestamp"].astype("int64"), unit="s")
    return table


@pytest.fixture(scope="module")
def model() -> Recommender:
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        return Recommender(**SETTINGS).fit(frame(ring_plays(range(60), follow=0.97)))


def test_recommendations_are_a_table_of_ranked_songs(model: Recommender) -> None:
    moment = datetime(2026, 1, 1)
    table = model.recommend(users=["u3", "u40"], k=10, at=moment)
    assert list(table.columns) == COLUMNS
    assert table["user_id"].tolist() == ["u3"] * 10 + ["u40"] * 10
    assert table["rank"].tolist() == [*range(1, 11)] * 2
    assert (np.diff(table["score"][:10]) <= 0).all()
    assert table["title"][0] == f"Song {table['song_id'][0][1:]}"
    single_user = model.recommend("u3", k=10, at=moment)
    assert single_user["song_id"].tolist() == table["song_id"][:10].tolist()
    np.testing.assert_allclose(single_user["score"], table["score"][:10], rtol=1e-4)


def test_the_song_after_the_last_one_comes_first(model: Recommender) -> None:
    rows = frame(ring_plays(range(60), follow=0.97))
    hits = 0
    for user in (f"u{number}" for number in range(10)):
        last_song = int(rows[rows["user_id"] == user]["track"].iloc[-1][1:])
        hits += f"s{(last_song + 1) % 60}" in model.recommend(user, k=3, exclude_heard=False)["song_id"].tolist()
    assert hits >= 8


@pytest.mark.parametrize(("horizon", "weight"), [("short", 0), ("long", 1), (0.4, 0.4)])
def test_a_number_as_horizon_is_the_weight_of_the_long_one(
    model: Recommender, horizon: Any, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[float] = []

    def choose(*arguments: Any) -> Any:
        weights.extend(options.long_weight for options in arguments[3])
        return choose_for_users(*arguments)

    monkeypatch.setattr(reranking, "choose_for_users", choose)
    assert len(model.recommend(["u3", "u5"], k=4, horizon=horizon)) == 8
    assert weights == [weight, weight]


@pytest.mark.parametrize("horizon", [0.5, "foo"])
def test_a_taste_is_of_one_horizon(model: Recommender, horizon: Any) -> None:
    with pytest.raises(InputError, match="expected short or long"):
        model.taste("u1", horizon=horizon)


def test_an_unknown_horizon_is_refused(model: Recommender) -> None:
    with pytest.raises(InputError, match="horizon is 2; expected short, long, or a number from 0 to 1"):
        model.recommend("u3", horizon=2)


def test_timestamps_without_a_zone_are_of_the_time_zone_that_fit_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    rows = frame(ring_plays(range(3), plays=12))
    model = Recommender(**SETTINGS | {"epochs": 1}).fit(rows, timezone="Asia/Tokyo")
    last_play = Dataset(model.workspace).manifest.last_play
    assert last_play == int(rows["timestamp"].max().tz_localize("Asia/Tokyo").timestamp() * 1000)
    with pytest.raises(InputError, match="unknown time zone 'Mars'"):
        model.fit(rows, timezone="Mars")


def test_plays_after_the_given_time_are_ignored(model: Recommender) -> None:
    moment = datetime(2023, 11, 25)
    early = model.recommend("u3", at=moment)
    assert not early.equals(model.recommend("u3"))
    assert early.equals(model.recommend("u3", at="2023-11-25T00:00:00Z"))
    seconds = int(moment.replace(tzinfo=timezone.utc).timestamp())
    for number in (seconds, np.int64(seconds), np.uint64(seconds * 1000), np.float64(seconds)):
        assert early.equals(model.recommend("u3", at=number)), repr(number)


def test_similar_songs_and_tastes(model: Recommender) -> None:
    similar_songs = model.similar("s10", k=4)
    assert list(similar_songs.columns) == ["rank", "song_id", "title", "artist", "score"]
    assert "s10" not in similar_songs["song_id"].tolist()
    tastes = model.taste(["u3", "u40"])
    assert tastes.index.tolist() == ["u3", "u40"]
    assert tastes.to_numpy().dtype == np.float32
    np.testing.assert_allclose(model.taste("u40").to_numpy()[0], tastes.loc["u40"].to_numpy(), atol=1e-6)


def test_users_without_a_known_play_get_popular_songs_and_are_named(
    model: Recommender, capsys: pytest.CaptureFixture[str]
) -> None:
    table = model.recommend(["u3", "nobody", "u40"], k=5, at="2024-01-01T00:00:00Z")
    assert list(table.columns) == COLUMNS
    assert table["user_id"].tolist() == [user for user in ("u3", "nobody", "u40") for _ in range(5)]
    assert "1 of the users, who get popular songs: 'nobody'" in capsys.readouterr().err
    early = model.recommend("u3", k=5, at=pd.Timestamp("2020-01-01"))  # before the first play
    popular = table[table["user_id"] == "nobody"].reset_index(drop=True)
    assert early.drop(columns="user_id").equals(popular.drop(columns="user_id"))
    assert popular["score"].min() > 1  # scores are numbers of recent plays


def test_an_unknown_user_has_no_taste_and_an_unknown_song_no_similar_songs(model: Recommender) -> None:
    with pytest.raises(NotFoundError, match="user 'nobody' has no known plays before"):
        model.taste(["u3", "nobody"])
    with pytest.raises(InputError, match="nothing"):
        model.similar("nothing")


def test_a_saved_model_recommends_the_same_songs_when_loaded(model: Recommender, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    loaded_model = rayrec.load(tmp_path / "saved")
    at = "2024-01-01T00:00:00Z"
    assert loaded_model.recommend("u3", at=at).equals(model.recommend("u3", at=at))
    with pytest.raises(InputError, match="not empty"):
        model.save(tmp_path / "saved")
    with pytest.raises(NotFoundError, match="no live release"):
        rayrec.load(tmp_path / "none")


def test_an_update_adds_users_and_a_second_fit_replaces_all(
    model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    model.save(tmp_path / "saved")
    loaded_model = rayrec.load(tmp_path / "saved", progress=False)
    loaded_model.update(frame(ring_plays(range(60, 62), plays=5, begin=20, days=1)))
    assert len(loaded_model.recommend("u61", k=5)) == 5
    loaded_model.fit(frame(ring_plays(range(100, 140))))
    with pytest.raises(NotFoundError, match="u61"):
        loaded_model.taste("u61")
    assert len(loaded_model.recommend("u120", k=5)) == 5


def test_an_update_without_new_plays_keeps_the_quality(
    model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    model.save(tmp_path / "saved")
    loaded_model = rayrec.load(tmp_path / "saved", progress=False)
    loaded_model.quality = model.quality
    loaded_model.update(frame(ring_plays(range(60), follow=0.97)))
    assert loaded_model.quality is model.quality is not None


def test_a_table_that_a_killed_run_left_is_deleted_by_a_compaction_or_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)

    def files_with_plays() -> list[Path]:
        return [path for path in tmp_path.rglob("*.parquet") if b"planted-4711" in path.read_bytes()]

    def kill() -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
            patch.setattr("rayrec.jobs.fit.guess_import", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            patch.setattr(Workspace, "delete", lambda *_: None)  # a killed process deletes nothing
            model.fit(pd.DataFrame({"user": ["planted-4711"] * 9}))
        assert files_with_plays()

    rows = frame(ring_plays(range(3), plays=12))
    model = Recommender(**SETTINGS | {"epochs": 1}, workspace=tmp_path)
    kill()
    model.fit(rows)
    assert files_with_plays() == []
    kill()
    assert verify_workspace(model.workspace).problems == []
    forget_users(model.workspace, ["planted-4711"])
    compute_tastes(model.workspace, TasteConfig())
    assert files_with_plays() == []
    kill()  # a run after the deletion leaves the user's plays again
    compact(model.workspace)
    assert files_with_plays() == []


def test_an_update_adds_plays_while_users_wait_to_be_erased(
    model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    model.save(tmp_path / "saved")
    loaded_model = rayrec.load(tmp_path / "saved", progress=False)
    forget_users(loaded_model.workspace, ["u3"])
    loaded_model.update(frame(ring_plays(range(60, 62), plays=5, begin=20, days=1)))
    assert len(loaded_model.taste("u61")) == 1
    with pytest.raises(NotFoundError, match="u3"):
        loaded_model.taste("u3")


def test_a_stopped_fit_continues_with_the_same_plays_and_other_plays_replace_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    first_plays, other_plays = frame(ring_plays(range(3), plays=12)), frame(ring_plays(range(10, 14), plays=12))
    model = Recommender(**SETTINGS | {"epochs": 1}, workspace=tmp_path)

    def stop_at(stage: str, plays: pd.DataFrame) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
            patch.setattr(f"rayrec.jobs.pipeline.{stage}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            model.fit(plays)

    stop_at("train", first_plays)
    (songs,) = model.workspace.folders("songs")
    stop_at("train", first_plays)
    assert model.workspace.folders("songs") == [songs]
    model.fit(other_plays)
    assert Dataset(model.workspace).manifest.users == 4
    with pytest.raises(NotFoundError):
        model.taste("u2")
    assert len(model.taste("u12")) == 1


def test_a_fit_replaces_no_plays_that_were_appended_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    model = Recommender(workspace=tmp_path / "w", progress=False)
    for number, job in enumerate((import_data, append_plays)):
        path = str(tmp_path / f"{number}.parquet")
        frame(ring_plays(range(4 * number, 4 * number + 3), plays=12)).to_parquet(path)
        roles = {"user": "user_id", "song": "track", "played_at": "timestamp"}
        job(model.workspace, ImportConfig(format="parquet", paths=(path,), columns=roles))
    with pytest.raises(InputError, match="already contains 72 plays from parquet, some of them appended later"):
        model.fit(frame(ring_plays(range(10, 14), plays=12)))
    assert Dataset(model.workspace).manifest.plays == 72


def test_a_table_is_imported_where_the_uri_of_the_workspace_has_options(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moto.server", reason="no moto: pip install 'rayrec[dev]'")
    without_ray(monkeypatch)
    with s3_server() as server:
        model = Recommender(workspace=server.uri("a/b"), progress=False)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
            patch.setattr("rayrec.jobs.pipeline.embed", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            model.fit(frame(ring_plays(range(3), plays=12)))
        assert Dataset(model.workspace).manifest.plays == 36
        assert model.workspace.files(".inputs") == []


def test_a_refused_run_leaves_the_table_of_the_run_that_holds_the_workspace(tmp_path: Path) -> None:
    model, table_file = Recommender(workspace=tmp_path), ".inputs/plays-0.parquet"

    def keeps_table_when_refused() -> bool:
        with pytest.raises(BusyError):
            model.fit(pd.DataFrame({"user": ["ann"]}))
        return model.workspace.files(".inputs") == [table_file]

    with exclusive(model.workspace, "fit"), ThreadPoolExecutor(1) as executor:
        model.workspace.write_bytes(table_file, b"")
        assert executor.submit(keeps_table_when_refused).result()


def test_plays_of_an_update_that_is_not_used_are_known_at_once(
    model: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_ray(monkeypatch)
    monkeypatch.setattr("rayrec.jobs.update.decide", lambda *arguments, **options: (False, "worse"))
    model.save(tmp_path / "saved")
    loaded_model = rayrec.load(tmp_path / "saved", progress=False)
    with pytest.raises(NotFoundError, match="u70"):
        loaded_model.taste("u70")
    loaded_model.update(frame(ring_plays([*range(60), 70], plays=10, begin=20, days=2)))
    assert "The update is not used" in capsys.readouterr().err
    reloaded_tastes = rayrec.load(tmp_path / "saved").taste(["u3", "u70"])
    np.testing.assert_array_equal(loaded_model.taste(["u3", "u70"]).to_numpy(), reloaded_tastes.to_numpy())


def test_a_notebook_shows_data_and_quality(model: Recommender) -> None:
    html = model._repr_html_()
    for text in ("2,400", "two-step", "popularity", "Validation"):
        assert text in html
    assert "not fitted" in Recommender()._repr_html_()
    assert "2,400" in rayrec.Dataset(model.workspace)._repr_html_()


def with_categories(rows: pd.DataFrame) -> polars.DataFrame:
    return polars.from_pandas(rows).with_columns(polars.col("user_id", "track").cast(polars.Categorical))


def with_periods(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(timestamp=rows["timestamp"].dt.to_period("s"))


def with_time_index(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.set_index("timestamp")


def with_users_in_column_and_index(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.set_index("user_id", drop=False)


@pytest.mark.parametrize(
    "kind",
    [
        pa.Table.from_pandas,
        polars.from_pandas,
        with_categories,
        with_periods,
        with_time_index,
        with_users_in_column_and_index,
        "csv",
    ],
)
def test_every_kind_of_table_gives_the_same_plays(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    rows = frame(ring_plays(range(8), plays=10))
    plays = kind(rows) if callable(kind) else tmp_path / "plays.csv"
    if not callable(kind):
        (tmp_path / "plays.csv").write_text(HEAD + "".join(ring_plays(range(8), plays=10)))
    model = Recommender(**{**SETTINGS, "epochs": 1}).fit(plays)
    manifest = rayrec.Dataset(model.workspace).manifest
    assert (manifest.plays, manifest.users) == (80, 8)
    assert manifest.first_play == int(rows["timestamp"].min().timestamp() * 1000)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plays: plays.assign(extra=[1, "a"] * (len(plays) // 2)),
        lambda plays: pd.concat([plays, plays[["user_id"]]], axis=1),
        lambda plays: plays.assign(extra=[{}] * len(plays)),
    ],
    ids=["mixed", "twice", "empty"],
)
def test_columns_that_cannot_be_read_are_bad_input(spoil: Any) -> None:
    with pytest.raises(InputError, match=r"the plays cannot be read: .*; drop the column, or convert it to text"):
        Recommender(progress=False).fit(spoil(frame(ring_plays(range(3), plays=4))))


def test_plays_without_users_are_of_the_user_that_fit_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    rows = frame(ring_plays(range(1), plays=30)).drop(columns="user_id")
    model = Recommender(**SETTINGS | {"epochs": 1}).fit(rows, user="me")
    assert len(model.taste("me")) == 1
    model.update(frame(ring_plays(range(1), plays=5, begin=20, days=1)).drop(columns="user_id"))
    manifest = Dataset(model.workspace).manifest
    assert (manifest.users, manifest.plays) == (1, 35)


def test_errors_about_a_table_name_its_columns_and_arguments_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    model, rows = Recommender(progress=False), frame(ring_plays(range(3), plays=4))
    with pytest.raises(InputError) as error:
        model.fit(rows[["user_id", "track", "timestamp"]].rename(columns={"user_id": "who, exactly", "track": "x"}))
    assert ".inputs" not in str(error.value)
    assert "--" not in str(error.value)
    assert str(error.value).startswith("the table has no column that looks like user or song; it has")
    assert 'columns={"user": "NAME", "song": "NAME"}, or if all plays belong to one person, pass user="NAME"' in str(
        error.value
    )
    with pytest.raises(InputError, match=r'the table has no column .who. .*columns=\{"user": "user_id"\}'):
        model.fit(rows, columns={"user": "who"})
    with pytest.raises(InputError, match=r"""map it, for example with columns=\{"user": "listener's"\}"""):
        model.fit(rows.rename(columns={"user_id": "listener's"}), columns={"user": "who"})
    with pytest.raises(InputError, match=r"the table has no column '.*song=5\"' for user"):  # a quote without its end
        model.fit(rows, columns={"user": '--columns song=5"'})
    with pytest.raises(InputError, match=r"user= would merge them; import without user=$"):
        model.fit(rows, columns={"user": "user_id"}, user="me")


@pytest.mark.parametrize("users", [np.array(["u1"]), pd.Series(["u1"]), pa.array(["u1"]), {"u1"}, iter(["u1"])])
def test_users_may_be_any_kind_of_column(model: Recommender, users: Any) -> None:
    assert model.recommend(users, k=np.int64(3))["user_id"].tolist() == ["u1"] * 3


@pytest.mark.parametrize("users", [["u1", np.nan], [None], ["u1", pd.NA], [b"\xff"], pd.DataFrame({"user": ["u1"]})])
def test_users_that_are_no_ids_are_refused(model: Recommender, users: Any) -> None:
    with pytest.raises(InputError, match=r"^users(\[0\]|\[1\]| are a)"):
        model.recommend(users)
    with pytest.raises(InputError, match=r"^users(\[0\]|\[1\]| are a)"):
        model.taste(users)


def test_bytes_and_a_uuid_are_ids(model: Recommender, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.recommend(b"u1", k=2)["song_id"].tolist() == model.recommend("u1", k=2)["song_id"].tolist()
    assert not capsys.readouterr().err
    user = uuid.UUID(int=7)
    assert model.recommend(user, k=2)["user_id"].tolist() == model.recommend([user], k=2)["user_id"].tolist()
    assert capsys.readouterr().err.count(f"who get popular songs: {user!r}") == 2


def test_a_fit_of_other_plays_that_was_stopped_gives_no_wrong_songs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    model = Recommender(**SETTINGS | {"epochs": 1}, workspace=tmp_path).fit(frame(ring_plays(range(8), plays=10)))
    loaded_model = rayrec.load(tmp_path, progress=False)
    assert len(model.recommend("u1")) == len(loaded_model.recommend("u1"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr("rayrec.jobs.pipeline.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        model.fit(frame(ring_plays(range(20, 28), plays=10)))
    for recommender in (model, loaded_model, rayrec.load(tmp_path, progress=False)):
        with pytest.raises(NotFoundError, match="the last fit, on other plays, did not finish; call fit again"):
            recommender.recommend("u1")


def test_after_the_folder_of_the_live_release_was_deleted_a_fit_makes_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    model = Recommender(**SETTINGS | {"epochs": 1}, workspace=tmp_path).fit(frame(ring_plays(range(8), plays=10)))
    model.workspace.delete(f"releases/{read_active(model.workspace)['active']}")
    assert "release" in repr(model)
    with pytest.raises(NotFoundError, match=r"the live release cannot be used .*; run `rayrec fit`"):
        model.recommend("u1")
    model.fit(frame(ring_plays(range(8), plays=10)))
    assert len(model.recommend("u1")) == 10


def test_a_model_in_a_temporary_folder_is_copied_only_by_saving(model: Recommender, tmp_path: Path) -> None:
    for make_copy in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"use save and rayrec\.load"):
            make_copy(model)
    with pytest.raises(NotFoundError, match="call fit first"):
        Recommender().save(tmp_path / "nothing")
    saved_model = rayrec.load(model.save(tmp_path / "kept"), progress=False)
    assert not any(map(saved_model.workspace.exists, (LOCK, LOCK_HOLDER)))  # a copied lock would block the copy
    unpickled_model = pickle.loads(pickle.dumps(saved_model))
    pd.testing.assert_frame_equal(
        unpickled_model.recommend("u1", at="2030-01-01T00:00:00Z"),
        saved_model.recommend("u1", at="2030-01-01T00:00:00Z"),
    )


def test_wrong_use_is_an_error_before_any_work() -> None:
    with pytest.raises(InputError, match="unknown setting 'epoch'"):
        Recommender(epoch=3)
    with pytest.raises(NotFoundError, match="call fit first"):
        Recommender().recommend("ann")
    with pytest.raises(InputError, match="plays are a list; expected a pandas or polars DataFrame"):
        Recommender().fit([1, 2])


def test_a_temporary_folder_is_refused_where_ray_has_several_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    nodes = [{"Alive": True}, {"Alive": True}, {"Alive": False}]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    plays = frame(ring_plays(range(3), plays=5))
    for method in (Recommender(progress=False).fit, Recommender(progress=False).update):
        with pytest.raises(InputError, match=r"Ray runs on 2 nodes.*temporary folder.*use Recommender\(workspace="):
            method(plays)
    with pytest.raises(InputError, match="no live release"):
        Recommender(workspace=tmp_path / "shared", progress=False).update(plays)
    nodes[1]["Alive"] = False
    with pytest.raises(InputError, match="no live release"):
        Recommender(progress=False).update(plays)


def test_the_temporary_folder_is_deleted_with_the_object() -> None:
    recommender = Recommender()
    folder = Path(recommender.workspace.root)
    assert folder.exists()
    del recommender
    gc.collect()
    assert not folder.exists()
