"""The audit finds each planted fault, names its place, and finds no fault in a sound workspace."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from killed_jobs import killed_before_manifest
from networks import NUM_SONGS, model_config, network
from without_ray import without_ray
from worlds import random_histories, random_vectors, write_song_vectors

from rayrec.data import columns
from rayrec.data.catalog import DESCRIPTIONS_FILE
from rayrec.data.dataset import Dataset, bucket_of
from rayrec.embeddings.vectors import SongVectors
from rayrec.importing.descriptions import store_descriptions
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.compact import compact
from rayrec.jobs.forget import forget_users
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.jobs.recommend_all import recommendations_file
from rayrec.jobs.verify import verify_workspace
from rayrec.model.checkpoint import save_model
from rayrec.model.inference import TasteEncoder
from rayrec.model.taste_table import taste_table, tastes_file
from rayrec.recommend.index import INDEX_FILE, IndexConfig, SongIndex
from rayrec.storage import releases
from rayrec.storage.artifacts import DatasetManifest, Manifest, load_manifest, publish, sha256, write_dataset_manifest
from rayrec.storage.workspace import SONGS_TABLE, Workspace, histories_file
from rayrec_cli.main import main

BUCKETS = 2
AT = 10**7


def build(workspace: Workspace, kind: str = "flat") -> Workspace:
    """Write everything that a release needs, without a fault."""
    histories = random_histories(30, NUM_SONGS, seed=3)
    histories = histories.take(histories.lengths > 0)
    songs = {
        columns.SONG: pa.array(range(NUM_SONGS), pa.int32()),
        columns.SONG_ID: [f"s{song}" for song in range(NUM_SONGS)],
        columns.TITLE: [""] * NUM_SONGS,
        columns.ARTIST: [""] * NUM_SONGS,
    }
    workspace.write_table(SONGS_TABLE, pa.table(songs, schema=columns.SONGS_TABLE))
    bucket = bucket_of(histories.user_ids, BUCKETS)
    parts = [histories.take(bucket == number) for number in range(BUCKETS)]
    for number, part in enumerate(parts):
        workspace.write_table(histories_file(0, number), part.to_arrow())
    put_dataset_manifest(workspace)
    descriptions = pa.table({columns.SONG_ID: ["s1"], columns.TITLE: ["One"]})
    rows = [
        descriptions[field.name] if field.name in descriptions.column_names else pa.nulls(1, field.type)
        for field in columns.DESCRIPTIONS
    ]
    store_descriptions(Dataset(workspace), pa.table(rows, schema=columns.DESCRIPTIONS), {})
    dataset = {"dataset": "data"}
    song_vectors = write_song_vectors(workspace, random_vectors(NUM_SONGS), dataset)
    model = network(model_config())
    names = save_model(workspace, "models/m", model, np.arange(NUM_SONGS) != 7)
    publish(workspace, Manifest(kind="models", id="m", inputs={**dataset, "songs": song_vectors.id}), names)
    tastes = Manifest(kind="tastes", id="t", inputs={**dataset, "models": "m"})
    for number, part in enumerate(parts):
        workspace.write_table(tastes_file(tastes.folder, number), taste_table(TasteEncoder(model), part, AT))
    publish(workspace, tastes, [f"bucket={number:05d}/tastes.parquet" for number in range(BUCKETS)])
    vectors = np.array(workspace.read_array("models/m/song_vectors.npy"))
    index = SongIndex.build(vectors, IndexConfig(kind=kind, nlist=4, queries=10))  # type: ignore[arg-type]
    index.save(workspace, f"indexes/i/{INDEX_FILE}")
    metrics = vars(index.figures)
    publish(workspace, Manifest(kind="indexes", id="i", inputs={"models": "m"}, metrics=metrics), [INDEX_FILE])
    releases.create_release(workspace)
    return workspace


def put_dataset_manifest(workspace: Workspace, **changes: int) -> None:
    """Write a manifest that fits the stored histories, apart from the wrong values in `changes`."""
    paths = [path.removeprefix("dataset/") for path in workspace.files("dataset") if path.endswith(".parquet")]
    parts = list(_plain_histories(workspace))
    counts = {
        "users": sum(map(len, parts)),
        "plays": sum(part.num_plays for part in parts),
        "first_play": min(int(part.played_at.min()) for part in parts),
        "last_play": max(int(part.played_at.max()) for part in parts),
        "songs": NUM_SONGS,
    }
    files = {path: sha256(workspace, f"dataset/{path}") for path in paths}
    write_dataset_manifest(
        workspace,
        DatasetManifest(id="data", source="x", buckets=BUCKETS, parts=1, files=files, **{**counts, **changes}),
    )


def _plain_histories(workspace: Workspace):
    from rayrec.data.histories import Histories

    for bucket in range(BUCKETS):
        yield Histories.from_arrow(workspace.read_table(histories_file(0, bucket)))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "workspace"
    build(Workspace(folder))
    return folder


@pytest.fixture
def sound(template: Path, tmp_path: Path) -> Workspace:
    shutil.copytree(template, tmp_path / "copy")
    return Workspace(tmp_path / "copy")


def problems(workspace: Workspace) -> list[str]:
    return [f"{finding.path} {finding.text}" for finding in verify_workspace(workspace).problems]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_sound_workspace_has_neither_problems_nor_notes(tmp_path: Path, kind: str) -> None:
    workspace = build(Workspace(tmp_path / "new"), kind)
    audit = verify_workspace(workspace)
    assert (audit.problems, audit.notes) == ([], [])
    assert [item.kind for item in audit.checked] == [
        "dataset",
        "descriptions",
        "songs",
        "models",
        "tastes",
        "indexes",
        "releases",
    ]
    stored_paths = [
        path for path in workspace.files("") if path.endswith((".npy", ".parquet", ".safetensors", ".faiss"))
    ]
    assert stored_paths
    assert set(stored_paths) <= audit.covered


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_byte_changed_or_a_file_gone_is_named_whatever_the_file(sound: Workspace, damage: str) -> None:
    for path in sound.files(""):
        if path in ("releases/active", "current.json") or path.startswith("lineages/"):
            continue
        content = sound.read_bytes(path)
        if damage == "changed":
            sound.write_bytes(path, content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        else:
            sound.delete(path)
        audit = verify_workspace(sound)
        reported_paths = [finding.path for finding in audit.problems + audit.notes]
        assert not audit.is_sound or path.endswith("manifest.json"), path
        assert any(path.startswith(name) for name in reported_paths) or path == "dataset/dataset.json", (
            path,
            reported_paths,
        )
        sound.write_bytes(path, content)
    assert problems(sound) == []


def test_a_damaged_file_of_a_tuning_is_named(sound: Workspace) -> None:
    sound.write_bytes("tunings/a/best.toml", b"epochs = 3")
    publish(sound, Manifest(kind="tunings", id="a", inputs={"dataset": "data"}), ["best.toml"])
    assert problems(sound) == []
    sound.write_bytes("tunings/a/best.toml", b"epochs = 4")
    (problem,) = problems(sound)
    assert problem.startswith("tunings/a/best.toml does not match its checksum")


def update_checksums(workspace: Workspace, kind: str, name: str) -> None:
    """Store the checksums of an artifact's changed files, so that only their content shows the fault."""
    manifest = load_manifest(workspace, kind, name)
    publish(workspace, manifest, manifest.files)
    workspace.delete("releases")


def drop_a_taste(workspace: Workspace) -> None:
    path = tastes_file("tastes/t", 0)
    workspace.write_table(path, workspace.read_table(path).slice(1))
    update_checksums(workspace, "tastes", "t")


def repeat_a_taste(workspace: Workspace) -> None:
    path = tastes_file("tastes/t", 1)
    table = workspace.read_table(path)
    workspace.write_table(path, pa.concat_tables([table, table.slice(0, 1)]))
    update_checksums(workspace, "tastes", "t")


def stretch_a_taste(workspace: Workspace) -> None:
    path = tastes_file("tastes/t", 0)
    table = workspace.read_table(path)
    values = [[2.0 * value for value in row] for row in table.column("taste_short").to_pylist()]
    column = table.column_names.index("taste_short")
    workspace.write_table(path, table.set_column(column, "taste_short", pa.array(values, pa.list_(pa.float32()))))
    update_checksums(workspace, "tastes", "t")


def break_song_vectors(workspace: Workspace) -> None:
    vectors = np.array(workspace.read_array("songs/by-hand/vectors.npy"))
    vectors[5, 0] = np.nan
    workspace.write_array("songs/by-hand/vectors.npy", vectors)
    update_checksums(workspace, "songs", "by-hand")


def index_other_vectors(workspace: Workspace) -> None:
    vectors = np.array(workspace.read_array("models/m/song_vectors.npy"))
    vectors[3] = SongVectors.normalized(vectors[3:4] + 0.1).vectors[0]
    SongIndex.build(vectors, IndexConfig()).save(workspace, f"indexes/i/{INDEX_FILE}")
    update_checksums(workspace, "indexes", "i")


def move_a_user(workspace: Workspace) -> None:
    first, second = (workspace.read_table(histories_file(0, bucket)) for bucket in range(2))
    workspace.write_table(histories_file(0, 1), pa.concat_tables([second, first.slice(0, 1)]))
    workspace.write_table(histories_file(0, 0), first.slice(1))
    put_dataset_manifest(workspace)
    workspace.delete("releases")


def repeat_a_user(workspace: Workspace) -> None:
    table = workspace.read_table(histories_file(0, 0))
    workspace.write_table(histories_file(0, 0), pa.concat_tables([table, table.slice(2, 1)]))
    put_dataset_manifest(workspace)
    workspace.delete("releases")


def reverse_plays(workspace: Workspace) -> None:
    table = workspace.read_table(histories_file(0, 0))
    times = [row[::-1] for row in table.column("played_at").to_pylist()]
    column = table.column_names.index("played_at")
    workspace.write_table(histories_file(0, 0), table.set_column(column, "played_at", [times]).cast(table.schema))
    put_dataset_manifest(workspace)
    workspace.delete("releases")


def write_wrong_play_count(workspace: Workspace) -> None:
    put_dataset_manifest(workspace, plays=12)
    workspace.delete("releases")


def describe_a_song_twice(workspace: Workspace) -> None:
    descriptions = Dataset(workspace).descriptions()[-1]
    table = workspace.read_table(descriptions.path(DESCRIPTIONS_FILE))
    workspace.write_table(descriptions.path(DESCRIPTIONS_FILE), pa.concat_tables([table, table]))
    update_checksums(workspace, "descriptions", descriptions.id)


def leave_a_stray_file(workspace: Workspace) -> None:
    workspace.write_array("models/m/forgotten.npy", np.zeros(3))


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (drop_a_taste, "bucket=00000/tastes.parquet 1 users are missing"),
        (repeat_a_taste, "bucket=00001/tastes.parquet a user occurs twice"),
        (stretch_a_taste, "taste_short holds a row that is not of length 1"),
        (break_song_vectors, "songs/by-hand/vectors.npy rows 0 to 59 contain a row that is neither of length 1"),
        (index_other_vectors, "indexes/i/index.faiss differs from models/m/song_vectors.npy"),
        (move_a_user, "bucket=00001 user"),
        (repeat_a_user, "bucket=00000 a user occurs twice"),
        (reverse_plays, "bucket=00000 plays are not sorted by time"),
        (write_wrong_play_count, "dataset/dataset.json plays is 12, but"),
        (describe_a_song_twice, "descriptions.parquet a song is described twice"),
        (leave_a_stray_file, "models/m/forgotten.npy is listed in no manifest"),
    ],
)
def test_a_planted_fault_is_found_where_it_is(
    sound: Workspace, plant: Callable[[Workspace], None], expected: str
) -> None:
    plant(sound)
    assert [line for line in problems(sound) if expected in line], problems(sound)


@pytest.mark.parametrize(
    ("scores", "expected"), [([0.9, 0.1, 0.5, 0.4], 0), ([0.9, 0.1, 0.4, 0.5], 1)], ids=["sorted", "not sorted"]
)
def test_explored_songs_may_be_anywhere_among_the_songs_sorted_by_score(
    sound: Workspace, scores: list[float], expected: int
) -> None:
    """The second song is explored."""
    (user,) = sound.read_table(histories_file(0, 0)).column(columns.USER).to_pylist()[:1]
    rows = {
        columns.USER: [user],
        columns.SONG_IDS: [["s1", "s2", "s3", "s4"]],
        columns.SCORES: pa.array([scores], pa.list_(pa.float32())),
        columns.PROBABILITIES: pa.array([[None, 0.2, None, None]], pa.list_(pa.float64())),
    }
    manifest = Manifest(
        kind="recommendations",
        id="r",
        inputs={"dataset": "data", "models": "m"},
        config={"k": 4},
        metrics={"users": 1, "songs": 4},
    )
    path = recommendations_file(manifest.folder, 0)
    sound.write_table(path, pa.table(rows))
    publish(sound, manifest, [path.removeprefix(f"{manifest.folder}/")])
    assert problems(sound) == [f"{path} songs are not sorted by score"] * expected


def test_a_user_in_another_bucket_is_named_by_the_id_alone(sound: Workspace) -> None:
    (user,) = sound.read_table(histories_file(0, 0)).column(columns.USER).to_pylist()[:1]
    move_a_user(sound)
    lines = [line for line in problems(sound) if "histories" in line and "another bucket" in line]
    assert lines == [f"dataset/histories/part=*/bucket=00001 user {user} belongs to another bucket"]


def test_what_unfinished_jobs_leave_is_a_note(sound: Workspace) -> None:
    sound.write_array("models/half/song_vectors.npy", np.zeros(3))
    sound.write_bytes("dataset/.staging/units/0004-abc/rows-0000.arrow", b"x")
    sound.write_bytes("tastes/t/bucket=00000/.tastes.parquet.1234", b"x")
    audit = verify_workspace(sound)
    assert audit.problems == []
    assert sorted(note.path for note in audit.notes) == [
        "dataset/.staging",
        "models/half",
        "tastes/t/bucket=00000/.tastes.parquet.1234",
    ]


def write_rows(path: Path, *rows: str) -> ImportConfig:
    path.write_text("\n".join(["user,song,played_at", *rows]) + "\n")
    return ImportConfig(format="csv", paths=(str(path),), buckets=1)


def test_an_append_that_was_killed_while_it_was_published_is_a_note(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    import_data(workspace, write_rows(tmp_path / "1.csv", "u,s,1700000000"))
    with killed_before_manifest(monkeypatch):
        append_plays(workspace, write_rows(tmp_path / "2.csv", "v,t,1700000100"))
    audit = verify_workspace(workspace)
    assert (audit.problems, [note.path for note in audit.notes]) == ([], ["dataset/.staging"])
    dataset = {"dataset": Dataset(workspace).manifest.id}
    for kind, inputs in (("models", dataset), ("tastes", {**dataset, "models": "m"}), ("indexes", {"models": "m"})):
        publish(workspace, Manifest(kind=kind, id="m", inputs=inputs), [])
    releases.verify_release(workspace, releases.create_release(workspace), plays=False)  # as servers do


def test_a_damaged_manifest_of_an_unfinished_import_is_one_problem(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    import_data(workspace, write_rows(tmp_path / "1.csv", "u,s,1700000000"))
    workspace.write_bytes("dataset/.staging/import/out/dataset.json", b"{")
    assert [problem.path for problem in verify_workspace(workspace).problems] == ["dataset/.staging"]


def test_a_workspace_is_sound_after_a_deletion_and_an_import_of_playlists(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    import_data(workspace, write_rows(tmp_path / "1.csv", "u,s,1700000000", "v,t,1700000100"))
    forget_users(workspace, ["u"])
    compact(workspace)
    (tmp_path / "2.csv").write_text("playlist,position,song\np,0,s\n")
    import_data(workspace, ImportConfig(format="csv", paths=(str(tmp_path / "2.csv"),), kind="playlists"))
    assert problems(workspace) == []
    assert Dataset(workspace).manifest.first_play == 1_700_000_000_000  # that of the erased play


def test_an_empty_workspace_is_sound(workspace: Workspace) -> None:
    audit = verify_workspace(workspace)
    assert (audit.problems, [note.path for note in audit.notes]) == ([], ["dataset/dataset.json"])


def test_a_live_release_whose_data_set_was_replaced_is_a_problem(sound: Workspace) -> None:
    manifest = sound.read_json("dataset/dataset.json")
    sound.write_json("dataset/dataset.json", {**manifest, "id": "other"})
    assert ["its data set data no longer exists" in line for line in problems(sound)] == [True]


def test_exit_codes_and_json_tell_what_is_wrong(sound: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--workspace", sound.uri, "verify"]) == 0
    assert "No problems found." in capsys.readouterr().out
    sound.delete("models/m/song_vectors.npy")
    assert main(["--workspace", sound.uri, "--json", "verify"]) == 1
    assert '"path": "models/m/song_vectors.npy", "text": "is missing"' in capsys.readouterr().out
    assert Dataset(sound).manifest.id == "data"
