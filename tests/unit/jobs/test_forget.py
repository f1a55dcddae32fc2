"""Deleted users are unknown at once, in no file after a compaction, and not restored by plays from before."""

import csv
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from served import Client, service, write_release
from stores import needs_redis
from without_ray import without_ray
from worlds import random_vectors, write_song_vectors

from rayrec.bench.redis_servers import RedisServer
from rayrec.data.dataset import Dataset, read_forgotten, read_pending_deletions
from rayrec.data.split import Split, SplitConfig, fit_range, split_dataset
from rayrec.data.synthetic import GenerateConfig
from rayrec.errors import DamagedArtifactError, InputError, NotFoundError
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs import forget, taste
from rayrec.jobs.compact import compact
from rayrec.jobs.forget import forget_users
from rayrec.jobs.generate import generate
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.jobs.recommend_all import recommend_all, recommendations_file
from rayrec.jobs.retrieval import fit_retrieval
from rayrec.jobs.taste import compute_tastes
from rayrec.jobs.train import train
from rayrec.jobs.verify import verify_workspace
from rayrec.model.taste_table import tastes_file
from rayrec.model.train_config import PLAY_COUNTS, TasteConfig, TrainConfig
from rayrec.online.load_states import load_states
from rayrec.online.state_codec import pack_state, unpack_state
from rayrec.online.state_store import NO_VERSION, Change, StateStore, StoreUnavailableError, open_store, store_uri
from rayrec.online.user_state import Plays, UserState
from rayrec.recommend.answer import RecommendConfig
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.two_step_config import RetrievalConfig
from rayrec.storage import artifacts, releases
from rayrec.storage.workspace import IMPORT_STAGING, Workspace
from rayrec_cli.main import main

START = 1_700_000_000
DAY = 86_400
LATER = 4_000_000_000  # after the deletions, which happen when the tests run; imports reject such a future time
DELETED = ("Zoë, “Jr.” 🎧/#4711", "planted-4711", "7'; DROP TABLE--4711")
OTHERS = tuple(f"user-{number}" for number in range(20))

pytestmark = pytest.mark.usefixtures("run_without_ray")


def write_plays(folder: Path, day: int, name: str | None = None) -> ImportConfig:
    """Write plays of all users on day `day`, and rows of the users to delete (`DELETED`) that an import rejects."""
    random = np.random.default_rng(day)
    path = folder / f"{name or day}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "song", "played_at"])
        for user in (*OTHERS, *DELETED):
            for _ in range(6):
                writer.writerow([user, f"song-{random.integers(40)}", START + day * DAY + int(random.integers(DAY))])
        writer.writerow([DELETED[0], "song-1", "yesterday"])
        writer.writerow([DELETED[1], "", START])
    return ImportConfig(format="csv", paths=(str(path),), buckets=3, max_rejected=1)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        build(Workspace(folder / "workspace"), folder)
    return folder / "workspace"


@pytest.fixture
def world(template: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(template, tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")


def build(workspace: Workspace, folder: Path) -> None:
    """Two releases, joined parts, states in the workspace's store, recommendations of all users, an impression log."""
    import_data(workspace, write_plays(folder, 0))
    dataset = Dataset(workspace)
    write_song_vectors(workspace, random_vectors(dataset.num_songs), {"dataset": dataset.manifest.id})
    write_release(workspace, ranked=False)
    compute_tastes(workspace, TasteConfig(), repeat=True)
    recommend_all(workspace, RecommendConfig(k=5), releases.default_parts(workspace))
    for day in (1, 2):
        # The folder has the id of a user as its name, as the export of one account may have.
        append_plays(workspace, write_plays(folder, day, f"{DELETED[1]}/{day}"))
    compute_tastes(workspace, TasteConfig())
    release = releases.create_release(workspace)
    append_plays(workspace, write_plays(folder, 3))
    compute_tastes(workspace, TasteConfig())
    recommend_all(workspace, RecommendConfig(k=5), releases.default_parts(workspace))
    compact(workspace)
    store = open_store(store_uri(workspace, None), Dataset(workspace).lineage)
    load_states(Dataset(workspace), store, release)
    store.close()
    with service(workspace, log_impressions=True) as open_service:
        for user in (*DELETED, *OTHERS):
            assert Client(open_service).post("/v1/recommendations", {"user_id": user, "k": 2}).status_code == 200


def content(path: Path) -> bytes:
    """The bytes of a file, followed by its decoded content if it is Parquet, SQLite, .npy or JSON."""
    data = path.read_bytes()
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        data += repr(file.metadata.metadata).encode() + str(file.schema).encode()
        data += json.dumps(file.read().to_pydict(), default=str, ensure_ascii=False).encode()
        for group in range(file.num_row_groups):
            columns = range(file.metadata.num_columns)
            data += repr([str(file.metadata.row_group(group).column(index).statistics) for index in columns]).encode()
    elif data.startswith(b"SQLite format 3"):
        with sqlite3.connect(path) as connection:
            for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                data += repr(connection.execute(f"SELECT * FROM {table}").fetchall()).encode()
    elif path.suffix == ".npy":
        data += repr(np.load(path, allow_pickle=False).tolist()).encode()
    elif data[:1] in (b"{", b"["):
        data += repr(json.loads(data)).encode() + json.dumps(json.loads(data), ensure_ascii=False).encode()
    return data


def files_with_user(folder: Path, user: str) -> list[str]:
    """The files below a folder that contain a user's id in some encoding, or have the id in their name."""
    spellings = [user.encode(), user.encode("utf-16-le"), json.dumps(user)[1:-1].encode(), repr(user)[1:-1].encode()]
    names = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and (user in name or any(spelling in content(path) for spelling in spellings)):
            names.append(name)
    return names


def root(workspace: Workspace) -> Path:
    return Path(workspace.full(""))


def rows_of(workspace: Workspace, path_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """The rows of the other users in a file of every bucket."""
    tables = [workspace.read_table(path_of(bucket)) for bucket in range(3)]
    return [row for row in pa.concat_tables(tables).to_pylist() if row["user_id"] in OTHERS]


def all_rows(workspace: Workspace) -> dict[str, list[dict[str, Any]]]:
    """The rows of the other users in all taste vectors, recommendations and histories."""
    rows_by_folder = {
        manifest.folder: rows_of(workspace, lambda bucket, manifest=manifest: tastes_file(manifest.folder, bucket))
        for manifest in artifacts.listing(workspace, "tastes")
    }
    for manifest in artifacts.listing(workspace, artifacts.RECOMMENDATIONS):
        rows_by_folder[manifest.folder] = rows_of(
            workspace, lambda bucket, manifest=manifest: recommendations_file(manifest.folder, bucket)
        )
    histories = [batch for batch in Dataset(workspace).read_all() if len(batch)]
    rows = [row for batch in histories for row in batch.to_arrow().to_pylist() if row["user_id"] in OTHERS]
    return {**rows_by_folder, "histories": rows}


def answers(workspace: Workspace) -> list[Any]:
    """The songs that the server recommends to the other users."""
    with service(workspace) as open_service:
        client = Client(open_service)
        at = (START + 9 * DAY) * 1000
        requests = [{"user_id": user, "at": at, "k": 5, "exclude_heard": False} for user in OTHERS]
        return [client.post("/v1/recommendations", request).json()["songs"] for request in requests]


def delete_all(workspace: Workspace, folder: Path) -> None:
    """Delete the users in `DELETED`: one by the command, one by a file of users, one over HTTP."""
    users_file = folder / "users.txt"
    users_file.write_text(f"{DELETED[2]}\n\n", encoding="utf-8-sig")  # with the byte order mark of a spreadsheet
    command = ["--workspace", workspace.uri, "forget", "--user", DELETED[0], "--users", str(users_file)]
    assert main(command) == 0
    with service(workspace) as open_service:
        assert Client(open_service).request("DELETE", f"/v1/users/{DELETED[1]}").status_code == 204


def require_sound(workspace: Workspace) -> None:
    audit = verify_workspace(workspace)
    assert audit.problems == []
    for release in releases.list_releases(workspace):
        releases.verify_release(workspace, release)


def test_no_file_holds_a_deleted_user_and_all_else_is_as_it_was(world: Workspace, tmp_path: Path) -> None:
    require_sound(world)
    rows_before, answers_before, manifest_before = all_rows(world), answers(world), Dataset(world).manifest
    for user in DELETED:
        names = " ".join(files_with_user(root(world), user))
        for folder in (
            "histories",
            "users",
            "rejected",
            "tastes/",
            "recommendations/",
            "dataset.json",
            "earlier",
            "answers",
        ):
            assert folder in names or (user == DELETED[2] and folder in ("rejected", "dataset.json", "earlier"))
    delete_all(world, tmp_path)
    assert len(read_pending_deletions(world)) == 3
    require_sound(world)
    assert main(["--workspace", world.uri, "compact"]) == 0
    for user in DELETED:
        assert files_with_user(root(world), user) == []
    require_sound(world)
    assert all_rows(world) == rows_before
    assert answers(world) == answers_before
    after = Dataset(world).manifest
    assert (after.id, after.users, after.plays) == (manifest_before.id, len(OTHERS), len(OTHERS) * 24)
    assert (len(read_pending_deletions(world)), len(read_forgotten(world))) == (0, 3)
    tastes = compute_tastes(world, TasteConfig())
    assert tastes.id == artifacts.listing(world, "tastes")[-1].id  # nothing is computed again
    assert tastes.metrics["users"] == len(OTHERS)


def test_a_deleted_user_is_unknown_at_once(
    world: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def recommend_output(user: str) -> tuple[str, str]:
        at = str(START + 9 * DAY)
        assert main(["--workspace", world.uri, "recommend", "--user", user, "--at", at]) == 0
        output = capsys.readouterr()
        return output.out.replace(user, "?"), output.err.replace(user, "?")

    assert recommend_output(DELETED[0]) != recommend_output("nobody")
    delete_all(world, tmp_path)
    capsys.readouterr()
    assert recommend_output(DELETED[0]) == recommend_output("nobody")
    with pytest.raises(NotFoundError):
        Dataset(world).history(DELETED[1])
    with service(world) as open_service:
        client = Client(open_service)
        request = {"at": (START + 9 * DAY) * 1000, "k": 5}
        expected = client.post("/v1/recommendations", {**request, "user_id": "nobody"}).json()
        for user in (DELETED[0], DELETED[2]):
            answer = client.post("/v1/recommendations", {**request, "user_id": user}).json()
            assert answer["songs"] == expected["songs"]
    store = open_store(f"sqlite:///{tmp_path}/new.sqlite", Dataset(world).lineage)
    release = releases.list_releases(world)[-1]
    load_result = load_states(Dataset(world), store, release)
    assert (load_result.users, load_result.deleted) == (len(OTHERS), len(DELETED))
    store.close()
    recommendations = recommend_all(world, RecommendConfig(k=3), releases.default_parts(world))
    assert recommendations.metrics["users"] == len(OTHERS)
    assert files_with_user(root(world), DELETED[0]) == []  # a job that reads users erases deleted users first


def test_plays_from_before_a_deletion_are_rejected_and_later_plays_make_a_new_user(
    world: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete_all(world, tmp_path)
    same_day_result = append_plays(world, write_plays(tmp_path, 2, "again"))
    assert (same_day_result.plays, same_day_result.users) == (0, 0)
    older_result = append_plays(world, write_plays(tmp_path, 7))
    assert (older_result.plays, older_result.users) == (len(OTHERS) * 6, 0)
    assert older_result.rejected["user was deleted"] == len(DELETED) * 6
    for user in DELETED:
        assert files_with_user(root(world), user) == []
    require_sound(world)
    monkeypatch.setattr("time.time", lambda: LATER)
    path = tmp_path / "later.csv"
    path.write_text(f"user,song,played_at\n{DELETED[1]},song-3,{LATER - DAY}\n{OTHERS[0]},song-3,{LATER - DAY}\n")
    later_result = append_plays(world, ImportConfig(format="csv", paths=(str(path),), buckets=3))
    assert (later_result.plays, later_result.users) == (2, 1)
    assert Dataset(world).history(DELETED[1]).num_plays == 1
    compute_tastes(world, TasteConfig())
    release = releases.create_release(world)
    store = open_store(store_uri(world, None), Dataset(world).lineage)
    load_result = load_states(Dataset(world), store, release)
    assert (load_result.users, load_result.deleted) == (len(OTHERS) + 1, 0)
    store.close()
    require_sound(world)
    forget_users(world, [DELETED[1]])
    compact(world)
    assert files_with_user(root(world), DELETED[1]) == []
    require_sound(world)


def test_deleting_users_whose_ids_are_words_of_settings_changes_no_setting(
    workspace: Workspace, tmp_path: Path
) -> None:
    users = ("user", "csv", "UTC", "plays", "plan", "song", "real", "reasons", "format")

    def write_day(day: int) -> ImportConfig:
        path = tmp_path / f"{day}.csv"
        rows = [f"{user},song-{day},{START + day * DAY}" for user in (*users, *OTHERS)]
        path.write_text("\n".join(["user,song,played_at", *rows, "csv,song-1,yesterday"]) + "\n")
        return ImportConfig(format="csv", paths=(str(path),), buckets=1, columns={"user": "user", "song": "song"})

    import_data(workspace, write_day(0))
    append_plays(workspace, write_day(1))
    before = Dataset(workspace).manifest
    forget_users(workspace, users)
    compact(workspace)
    after = Dataset(workspace).manifest
    assert after.users == len(OTHERS)
    assert (after.config, after.appended) == (before.config, before.appended)
    assert after.last_import.keys() == before.last_import.keys()
    assert append_plays(workspace, write_day(2)).plays == len(OTHERS)


def put_plays(uri: str, lineage: str) -> None:
    """Store a play of each user to delete."""
    store = open_store(uri, lineage)
    state = pack_state(UserState(window=Plays.of([1], [START * 1000])))
    assert all(store.put([Change(user_id=user_id, state=state, expected=NO_VERSION) for user_id in DELETED]))
    store.close()


def stored_states(uri: str, lineage: str) -> list[UserState]:
    """Return the stored states of the users to delete."""
    store = open_store(uri, lineage)
    records = store.read(DELETED)
    store.close()
    return [unpack_state(record.stored.state) for record in records if record is not None]


def test_a_deletion_covers_replaced_data_sets_of_its_workspace_and_no_other_workspace_with_the_same_store(
    uri: str, tmp_path: Path
) -> None:
    lineages: dict[str, list[str]] = {"staging": [], "production": []}
    for day, name in enumerate(["staging", "production"] * 3):
        workspace = Workspace(tmp_path / name)
        if day < 2:
            generate(workspace, GenerateConfig(users=20, songs=50, artists=20, playlists=0, seed=day))
        else:
            import_data(workspace, write_plays(tmp_path, day), repeat=True)
        lineages[name].append(Dataset(workspace).lineage)
        put_plays(uri, lineages[name][-1])
    forget_users(Workspace(tmp_path / "staging"), DELETED[:1], store=uri)
    require_sound(Workspace(tmp_path / "staging"))
    for lineage in lineages["staging"]:
        states = stored_states(uri, lineage)
        assert [(state.forgotten, state.plays) for state in states] == [(True, 0), (False, 1), (False, 1)]
    for lineage in lineages["production"]:
        assert [(state.forgotten, state.plays) for state in stored_states(uri, lineage)] == [(False, 1)] * 3


@pytest.mark.parametrize("store", ["http://127.0.0.1/0", "sqlite:////dev/null/states.db"])
def test_with_a_store_that_cannot_be_opened_no_user_is_deleted(world: Workspace, store: str) -> None:
    waiting_users = dict(read_pending_deletions(world).moments)
    with pytest.raises(InputError):
        forget_users(world, OTHERS[:2], store=store)
    assert dict(read_pending_deletions(world).moments) == waiting_users


def test_if_the_store_fails_the_error_says_where_the_users_are_deleted_and_a_second_call_completes_it(
    world: Workspace, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise StoreUnavailableError("store S does not answer: down; try again")

    put_plays(uri, Dataset(world).lineage)
    with monkeypatch.context() as patch:
        patch.setattr(type(open_store(uri, "")), "forget", fail)
        with pytest.raises(StoreUnavailableError) as raised:
            forget_users(world, DELETED, store=uri)
    assert str(raised.value) == (
        "store S does not answer: down; the users are deleted from the workspace, but not from this store: run the "
        "same command again"
    )
    assert len(read_pending_deletions(world)) == len(DELETED)
    assert not any(state.forgotten for state in stored_states(uri, Dataset(world).lineage))
    forget_users(world, DELETED, store=uri)
    assert all(state.forgotten for state in stored_states(uri, Dataset(world).lineage))


def test_a_deletion_covers_a_replaced_data_set_from_which_a_server_still_answers(
    world: Workspace, tmp_path: Path, uri: str
) -> None:
    lineages = [Dataset(world).lineage]
    with service(world, store=uri) as open_service:
        client = Client(open_service)
        import_data(world, write_plays(tmp_path, 5), repeat=True)
        lineages.append(Dataset(world).lineage)
        assert len(set(lineages)) == 2
        for lineage in lineages:
            put_plays(uri, lineage)
        statuses = [client.get(f"/v1/users/{user}/taste").status_code for user in DELETED[1:]]
        assert statuses == [200, 200]
        forget_users(world, DELETED[1:2], store=uri)
        assert client.request("DELETE", f"/v1/users/{DELETED[2]}").status_code == 204
        statuses = [client.get(f"/v1/users/{user}/taste").status_code for user in DELETED[1:]]
        assert statuses == [404, 404]
    for lineage in lineages:
        assert [state.forgotten for state in stored_states(uri, lineage)] == [False, True, True]


@needs_redis
def test_redis_keeps_no_bytes_of_a_deleted_user(world: Workspace, tmp_path: Path) -> None:
    """This holds for its memory and its files; the append-only file keeps the bytes until `compact`."""
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder, "--rdbcompression", "no")  # so that bytes can be found in the base file, too
    server.start()
    try:
        store = open_store(server.uri, Dataset(world).lineage)
        load_states(Dataset(world), store, releases.list_releases(world)[-1])
        kept_bytes = [user_bytes(store, user) for user in OTHERS]
        deleted_bytes = [user_bytes(store, user) for user in DELETED]
        assert all(count_in(folder, parts) == 1 for parts in [*kept_bytes, *deleted_bytes])
        command = ["--workspace", world.uri, "forget", "--store", server.uri]
        with service(world, store=server.uri) as open_service:
            client = Client(open_service)
            assert client.request("DELETE", f"/v1/users/{DELETED[1]}").status_code == 204
            assert main([*command, "--user", DELETED[0]]) == 0
            assert client.get(f"/v1/users/{DELETED[1]}/taste").status_code == 404
        assert main([*command, "--user", DELETED[2], "--compact"]) == 0
        assert [count_in(folder, parts) for parts in deleted_bytes] == [0] * len(DELETED)
        assert [count_in(folder, parts) for parts in kept_bytes] == [1] * len(OTHERS)
        assert [user_bytes(store, user) for user in OTHERS] == kept_bytes
        for record in store.read(DELETED):
            assert record is not None
            assert unpack_state(record.stored.state).forgotten
            assert (record.log, record.heard) == ([], None)
        assert load_states(Dataset(world), store, releases.list_releases(world)[-1], repeat=True).added == 0
        store.close()
    finally:
        server.kill()


def user_bytes(store: StateStore, user: str) -> tuple[bytes, ...]:
    """The packed state and the packed plays of a user."""
    (record,) = store.read([user])
    assert record is not None
    return (record.stored.state, *record.log)


def count_in(folder: Path, parts: tuple[bytes, ...]) -> float:
    """Number of files of a folder that contain a part, averaged over `parts`."""
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return sum(part in data for data in files for part in parts) / len(parts)


@pytest.mark.parametrize("step", ["third file", "first move", "second move", "last"])
def test_a_killed_run_is_finished_by_the_next(
    world: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    rows_before = all_rows(world)
    delete_all(world, tmp_path)
    calls: list[Any] = []

    def kill_at(function: Callable[..., Any], call_number: int) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            calls.append(arguments)
            if len(calls) == call_number:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return run

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        if step == "third file":
            patch.setattr(forget.FileEraser, "__call__", kill_at(forget.FileEraser.__call__, 3))
        elif step == "first move":
            patch.setattr(Workspace, "move", kill_at(Workspace.move, 1))
        elif step == "second move":
            patch.setattr(Workspace, "move", kill_at(Workspace.move, 2))
        else:
            patch.setattr(forget, "mark_erased", kill_at(forget.mark_erased, 1))
        compact(world)
    compact(world)
    require_sound(world)
    assert all_rows(world) == rows_before
    for user in DELETED:
        assert files_with_user(root(world), user) == []


def test_what_killed_jobs_left_is_erased_too(world: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leftovers are buckets of unfinished taste vectors, pieces of an unfinished import, and half a file."""
    computed_buckets: list[int] = []

    def compute_two_buckets(worker: Any, bucket: int, compute: Any = taste.BucketTastes.__call__) -> Any:
        if len(computed_buckets) == 2:
            raise KeyboardInterrupt
        computed_buckets.append(bucket)
        return compute(worker, bucket)

    config = TasteConfig(at=(START + 8 * DAY) * 1000)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(taste.BucketTastes, "__call__", compute_two_buckets)
        compute_tastes(world, config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr("rayrec.importing.import_run.BucketMerger", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
        append_plays(world, write_plays(tmp_path, 5))
    assert world.files(IMPORT_STAGING)
    half_file = root(world) / "tastes" / artifacts.listing(world, "tastes")[0].id / f".tastes.parquet.{'0' * 32}"
    half_file.write_text(DELETED[0])
    delete_all(world, tmp_path)
    compact(world)
    assert not half_file.exists()
    for user in DELETED:
        assert files_with_user(root(world), user) == []
    tastes = compute_tastes(world, config)
    assert (tastes.metrics["users"], tastes.metrics["buckets_computed"]) == (len(OTHERS), 1)
    require_sound(world)


def kill(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def four_days(workspace: Workspace, tmp_path: Path) -> Workspace:
    import_data(workspace, write_plays(tmp_path, 0))
    for day in (1, 2, 3):
        append_plays(workspace, write_plays(tmp_path, day))
    return workspace


def start_and_kill_fits(workspace: Workspace) -> Split:
    """Start a training and a retrieval that are killed, and return their split."""
    split = split_dataset(workspace, SplitConfig(test_days=1, validation_days=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayrec.jobs.train.train_worker", kill)
        patch.setattr("rayrec.jobs.retrieval.merge_counts", kill)
        for fit in (train_network, fit_retrieval_of):
            with pytest.raises(KeyboardInterrupt):
                fit(workspace, split)
    return split


def train_network(workspace: Workspace, split: Split) -> artifacts.Manifest:
    return train(workspace, TrainConfig(dim=8, hidden_dim=8, epochs=1, negatives=4, workers=0), split=split)


def fit_retrieval_of(workspace: Workspace, split: Split) -> artifacts.Manifest:
    return fit_retrieval(workspace, RetrievalConfig(), split=split)


def test_killed_fits_leave_no_plays_of_a_deleted_user_and_nothing_new_is_made_of_them(four_days: Workspace) -> None:
    split = start_and_kill_fits(four_days)
    for user in DELETED:
        assert any(name.startswith("models/") for name in files_with_user(root(four_days), user))
    assert four_days.files("retrieval")
    forget_users(four_days, DELETED)
    compact(four_days)
    for user in DELETED:
        assert files_with_user(root(four_days), user) == []
    remaining_plays = sum(fit_range(split).select(batch).num_plays for batch in Dataset(four_days).read_all())
    retrieval, model = fit_retrieval_of(four_days, split), train_network(four_days, split)
    assert Retrieval.load(four_days, retrieval.folder).plays.plays.sum() == remaining_plays
    assert four_days.read_array(model.path(PLAY_COUNTS)).sum() == remaining_plays
    require_sound(four_days)


def test_a_retrieval_continues_none_that_was_fitted_before_a_deletion(four_days: Workspace, tmp_path: Path) -> None:
    fit_retrieval(four_days, RetrievalConfig())
    forget_users(four_days, DELETED)
    append_plays(four_days, write_plays(tmp_path, 4))
    first = fit_retrieval(four_days, RetrievalConfig())
    assert Retrieval.load(four_days, first.folder).plays.plays.sum() == Dataset(four_days).manifest.plays
    assert first.metrics["base"] == ""
    append_plays(four_days, write_plays(tmp_path, 5))
    second = fit_retrieval(four_days, RetrievalConfig())
    assert Retrieval.load(four_days, second.folder).plays.plays.sum() == Dataset(four_days).manifest.plays
    assert second.metrics["base"] == first.id


def test_a_training_that_was_stopped_before_a_deletion_starts_over_without_a_question_and_says_so(
    four_days: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    split = start_and_kill_fits(four_days)
    # As if workers had left a checkpoint.
    monkeypatch.setattr("rayrec.jobs.train.has_checkpoint", lambda workspace, folder: workspace.exists(f"{folder}/run"))
    with pytest.raises(InputError, match="was stopped and left a checkpoint"):
        train_network(four_days, split)
    forget_users(four_days, DELETED[:1])
    with caplog.at_level("WARNING"):
        assert train_network(four_days, split).metrics["epochs"] == 1
    assert "was unfinished and had plays of deleted users: it is deleted and starts over" in caplog.text


def test_an_unfinished_fit_stays_where_nobody_was_deleted_since(four_days: Workspace) -> None:
    forget_users(four_days, DELETED)
    start_and_kill_fits(four_days)
    files = [*four_days.files("models"), *four_days.files("retrieval")]
    compact(four_days)
    assert [*four_days.files("models"), *four_days.files("retrieval")] == files != []


def test_a_damaged_file_does_not_get_a_new_checksum(world: Workspace, tmp_path: Path) -> None:
    delete_all(world, tmp_path)
    path = next(
        path
        for path in Dataset(world).manifest.histories_files(int(Dataset(world).bucket_of(np.array(DELETED[:1]))[0]))
    )
    table = world.read_table(path)
    assert table.num_rows > 1
    world.write_table(path, table.slice(0, table.num_rows - 1))
    with pytest.raises(DamagedArtifactError, match=path):
        compact(world)
    assert len(read_pending_deletions(world)) == 3


def test_the_list_of_deleted_users_holds_no_readable_id(world: Workspace, tmp_path: Path) -> None:
    delete_all(world, tmp_path)
    for folder in ("waiting", "."):
        list_folder = root(world) / "forgotten" / folder
        assert any(path.is_file() for path in list_folder.rglob("*"))
        for user in DELETED:
            assert files_with_user(list_folder, user) == []
        compact(world)


def test_a_command_without_users_is_wrong_use(world: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--workspace", world.uri, "forget"]) == 2
    assert "--user ID or --users FILE" in capsys.readouterr().err
    assert main(["--workspace", world.uri, "forget", "--user", " "]) == 2
    assert len(read_pending_deletions(world)) == 0
    assert main(["--workspace", world.uri, "--json", "forget", "--user", DELETED[0], "--compact"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["users"], report["compact"]["erased"]["users"]) == (1, 1)
    assert files_with_user(root(world), DELETED[0]) == []
