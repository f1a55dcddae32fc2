"""Appends end to end on a local cluster: new plays become a new part, and the earlier files stay unchanged."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import model_config, network
from worlds import random_vectors, write_song_vectors

from rayrec.data.dataset import Dataset
from rayrec.data.split import SplitConfig, choose_split, split_dataset
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.errors import DamagedArtifactError, InputError, MismatchError, NotFoundError
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.staging import Staging
from rayrec.jobs.build_index import build_index
from rayrec.jobs.embed import embed
from rayrec.jobs.evaluate import evaluate
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.jobs.retrieval import fit_retrieval
from rayrec.jobs.taste import compute_tastes
from rayrec.model.checkpoint import save_model
from rayrec.model.taste_table import tastes_file
from rayrec.model.train_config import TasteConfig
from rayrec.recommend.answer import RecommendConfig, answer, load_recommender
from rayrec.recommend.index import IndexConfig
from rayrec.recommend.two_step_config import RetrievalConfig
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import sha256
from rayrec.storage.workspace import IMPORT_STAGING, Workspace, histories_file

pytestmark = pytest.mark.usefixtures("cluster")

START = 1421163674
HEADER = ["user", "song", "played_at", "contexts", "skipped"]

Play = list[Any]


def plays(rows: int, seed: int, *, start: int = START, users: int = 60, songs: int = 80) -> list[Play]:
    random = np.random.default_rng(seed)
    return [
        [
            f"u{random.integers(users)}",
            f"s{random.integers(songs)}",
            start + int(random.integers(20_000)),
            ["", "radio", "search|album"][row % 3],
            row % 2,
        ]
        for row in range(rows)
    ]


def config_of(path: Path, rows: list[Play], **changes: Any) -> ImportConfig:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return ImportConfig(format="csv", paths=(str(path),), buckets=4, **changes)


def content(workspace: Workspace) -> dict[str, list[tuple[Any, ...]]]:
    """Return user -> (ms, song id, contexts, skipped) of every play; fail if a user occurs twice."""
    dataset = Dataset(workspace)
    song_ids, context_names = dataset.catalog().table.column("song_id").to_pylist(), dataset.manifest.contexts
    result: dict[str, list[tuple[Any, ...]]] = {}
    for batch in dataset.read_all():
        for user, start, stop in zip(batch.user_ids, batch.offsets[:-1], batch.offsets[1:], strict=True):
            assert user not in result
            assert batch.contexts is not None
            assert batch.skipped is not None
            result[user] = [
                (
                    int(batch.played_at[play]),
                    song_ids[batch.songs[play]],
                    {name for bit, name in enumerate(context_names) if batch.contexts[play] >> bit & 1},
                    bool(batch.skipped[play]),
                )
                for play in range(start, stop)
            ]
    return result


def test_parts_hold_what_one_import_of_all_files_holds(tmp_path: Path, workspace: Workspace) -> None:
    days = [
        plays(900, 1),
        plays(500, 2, start=START + 15_000, users=70, songs=100),  # overlaps the first file in time
        [["new", "only-new", START - 5, "podcast", 1], *plays(300, 3, start=START + 90_000, users=90, songs=120)],
    ]
    first = import_data(workspace, config_of(tmp_path / "0.csv", days[0]))
    songs = Dataset(workspace).catalog().table.column("song_id").to_pylist()
    files = {path: sha256(workspace, f"dataset/{path}") for path in first.files if path.startswith("histories")}
    results = [append_plays(workspace, config_of(tmp_path / f"{day}.csv", days[day])) for day in (1, 2)]
    manifest = Dataset(workspace).manifest

    full_workspace = Workspace(tmp_path / "together")
    full = import_data(
        full_workspace,
        config_of(tmp_path / "0.csv", days[0]).replace(paths=tuple(f"{tmp_path}/{n}.csv" for n in range(3))),
    )
    assert content(workspace) == content(full_workspace)
    for name in ("users", "plays", "songs", "first_play", "last_play", "has_skipped", "read", "merged", "rejected"):
        assert getattr(manifest, name) == getattr(full, name), name
    assert (manifest.parts, manifest.buckets, manifest.lineage) == (3, 4, first.id)
    assert manifest.ancestors == [first.id, results[0].dataset.id]
    assert manifest.contexts == [*first.contexts, "podcast"]
    assert [results[1].dataset.plays, sum(result.plays for result in results)] == [
        manifest.plays,
        manifest.plays - first.plays,
    ]
    assert Dataset(workspace).catalog().table.column("song_id").to_pylist()[: len(songs)] == songs
    for path, digest in {**files, **manifest.files}.items():
        assert sha256(workspace, f"dataset/{path}") == digest
    stored_paths = {path.removeprefix("dataset/") for path in workspace.files("dataset")}
    replaced_paths = stored_paths - {*manifest.files, "dataset.json"}
    assert {*manifest.files, "dataset.json"} <= stored_paths
    assert all(path.startswith("users/") for path in replaced_paths)
    assert Dataset(workspace).earlier(first.id) == first
    assert len(Dataset(workspace).history("new").songs) == 1


def test_the_same_plays_again_change_nothing_and_are_counted(tmp_path: Path, workspace: Workspace) -> None:
    rows = plays(400, 1)
    first = import_data(workspace, config_of(tmp_path / "a.csv", rows))
    repeat = append_plays(workspace, config_of(tmp_path / "a.csv", rows))
    assert (repeat.dataset, repeat.plays, repeat.users, repeat.songs) == (first, 0, 0, 0)
    copy = append_plays(workspace, config_of(tmp_path / "b.csv", rows))
    assert (copy.dataset, copy.plays, copy.read, copy.merged) == (first, 0, 400, 400)
    mixed = append_plays(workspace, config_of(tmp_path / "c.csv", [*rows[:50], *plays(70, 9, start=START + 90_000)]))
    assert (mixed.read, mixed.merged, mixed.plays, mixed.dataset.parts) == (120, 50, 70, 2)
    assert append_plays(workspace, mixed_config(tmp_path).replace(min_song_plays=1)).dataset == mixed.dataset


def mixed_config(folder: Path) -> ImportConfig:
    return ImportConfig(format="csv", paths=(str(folder / "c.csv"),), buckets=4)


def test_minimum_counts_apply_to_new_users_and_songs_only(tmp_path: Path, workspace: Workspace) -> None:
    base_plays = [["ann", f"s{song}", START + song, "radio", 0] for song in range(5)]
    import_data(workspace, config_of(tmp_path / "a.csv", base_plays))
    new_plays = [["ann", "s1", START + 90, "", 0], ["bob", "s1", START + 91, "", 0], ["ann", "rare", START + 92, "", 0]]
    result = append_plays(workspace, config_of(tmp_path / "b.csv", new_plays, min_user_plays=2, min_song_plays=2))
    assert result.plays == 1
    assert result.rejected == {"user with fewer than 2 plays": 1, "song with fewer than 2 plays": 1}
    assert [play[:2] for play in content(workspace)["ann"]][-1] == ((START + 90) * 1000, "s1")


@pytest.mark.parametrize("step", ["songs_file", "bucket_results", "publish"])
def test_a_killed_append_leaves_the_data_set_intact_and_can_be_resumed(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    first = import_data(workspace, config_of(tmp_path / "a.csv", plays(300, 1)))
    original_content = content(workspace)

    def raise_interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    new_config = config_of(tmp_path / "b.csv", plays(200, 2, start=START + 90_000, songs=90))
    with monkeypatch.context() as patch:
        patch.setattr(Staging, step, raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            append_plays(workspace, new_config)
    assert Dataset(workspace).manifest == first
    assert content(workspace) == original_content
    assert append_plays(workspace, new_config).dataset.plays == first.plays + 200


def test_an_append_killed_while_it_is_published_is_never_seen_in_part(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = import_data(workspace, config_of(tmp_path / "a.csv", plays(300, 1)))
    original_content = content(workspace)
    new_config = config_of(tmp_path / "b.csv", plays(200, 2, start=START + 90_000, songs=90))
    original_move, moves_left = Workspace.move, [0]

    def failing_move(self: Workspace, source: str, target: str) -> None:
        if not moves_left[0]:
            raise KeyboardInterrupt
        moves_left[0] -= 1
        original_move(self, source, target)

    for moves in range(20):
        moves_left[0] = moves
        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "move", failing_move)
            try:
                append_plays(workspace, new_config)
            except KeyboardInterrupt:
                assert Dataset(workspace).manifest == first
                assert len(Dataset(workspace).catalog()) == first.songs
                assert content(workspace) == original_content
                continue
        break
    assert Dataset(workspace).manifest.plays == first.plays + 200
    assert not workspace.exists(IMPORT_STAGING)


def test_what_cannot_be_appended_is_refused(tmp_path: Path, workspace: Workspace) -> None:
    config = config_of(tmp_path / "a.csv", plays(10, 1))
    with pytest.raises(NotFoundError, match="has no data set"):
        append_plays(workspace, config)
    import_data(workspace, config)
    (tmp_path / "lists.csv").write_text("playlist,position,song\np,0,s1\n")
    playlists_config = ImportConfig(format="csv", paths=(str(tmp_path / "lists.csv"),), kind="playlists")
    with pytest.raises(InputError, match="Playlists cannot be appended"):
        append_plays(workspace, playlists_config)
    (tmp_path / "lines.txt").write_text("s1 s2\n")
    with pytest.raises(InputError, match="Plays without times cannot be appended"):
        append_plays(workspace, ImportConfig(format="sequences", paths=(str(tmp_path / "lines.txt"),)))


def test_an_import_of_playlists_keeps_the_data_set_of_plays_as_an_ancestor(
    tmp_path: Path, workspace: Workspace
) -> None:
    first = import_data(workspace, config_of(tmp_path / "a.csv", plays(50, 1)))
    (tmp_path / "lists.csv").write_text("playlist,position,song\np,0,s1\np,1,other\n")
    second = import_data(workspace, ImportConfig(format="csv", paths=(str(tmp_path / "lists.csv"),), kind="playlists"))
    assert (second.ancestors, second.lineage) == ([first.id], first.id)
    assert Dataset(workspace).descends_from(first.id)
    replacement = import_data(workspace, config_of(tmp_path / "b.csv", plays(60, 2)), repeat=True)
    assert (replacement.ancestors, replacement.lineage) == ([], first.id)


def test_plays_before_the_first_contexts_and_skips_have_no_context_and_no_skip(
    tmp_path: Path, workspace: Workspace
) -> None:
    lines = [f"u{row % 9},s{row % 5},{START + row}" for row in range(90)]
    (tmp_path / "a.csv").write_text("\n".join(["user,song,played_at", *lines]) + "\n")
    import_data(workspace, ImportConfig(format="csv", paths=(str(tmp_path / "a.csv"),), buckets=4))
    append_plays(workspace, config_of(tmp_path / "b.csv", [["u1", "s1", START + 900, "radio", 1]]))
    plays_by_user = content(workspace)
    assert plays_by_user["u1"][-1] == ((START + 900) * 1000, "s1", {"radio"}, True)
    contexts_and_skips = [play[2:] for plays in plays_by_user.values() for play in plays[:10]]
    assert all(play == (set(), False) for play in contexts_and_skips)


@pytest.fixture
def released(tmp_path: Path, workspace: Workspace) -> str:
    """The id of a release of an untrained network over a small data set."""
    dataset = import_data(workspace, config_of(tmp_path / "a.csv", plays(600, 1)))
    vectors = write_song_vectors(workspace, random_vectors(dataset.songs), {"dataset": dataset.id})
    names = save_model(
        workspace, "models/m", network(model_config(num_songs=dataset.songs)), np.ones(dataset.songs, dtype=bool)
    )
    inputs = {"dataset": dataset.id, "songs": vectors.id}
    artifacts.publish(workspace, artifacts.Manifest(kind="models", id="m", inputs=inputs), names)
    build_index(workspace, IndexConfig())
    compute_tastes(workspace, TasteConfig())
    return releases.create_release(workspace).id


def test_a_model_of_the_data_set_before_an_append_stays_usable(
    tmp_path: Path, workspace: Workspace, released: str
) -> None:
    first = Dataset(workspace).manifest
    append_plays(workspace, config_of(tmp_path / "b.csv", plays(200, 2, start=START + 90_000, songs=120)))
    dataset = Dataset(workspace)
    assert dataset.num_songs > first.songs
    releases.verify_release(workspace, artifacts.load_manifest(workspace, "releases", released))

    parts = {"models": "m"}
    recommender, config = load_recommender(workspace, dataset, parts), RecommendConfig(k=200, exclude_heard=False)
    recommendations = answer(dataset, recommender, config, parts=parts, at=START * 2000, user="u1")
    assert len(recommendations.song_ids) == first.songs  # songs newer than the network are never recommended
    tastes = compute_tastes(workspace, TasteConfig())
    assert tastes.inputs["dataset"] == dataset.manifest.id
    new_release = releases.create_release(workspace)
    assert (new_release.inputs["dataset"], new_release.inputs["tastes"], new_release.inputs["models"]) == (
        dataset.manifest.id,
        tastes.id,
        "m",
    )
    releases.verify_release(workspace, new_release)
    releases.verify_release(workspace, artifacts.load_manifest(workspace, "releases", released))
    histories_path = next(path for path in first.files if path.startswith("histories"))
    workspace.write_bytes(f"dataset/{histories_path}", b"changed")
    with pytest.raises(DamagedArtifactError, match="histories"):
        releases.verify_release(workspace, artifacts.load_manifest(workspace, "releases", released))


def test_a_model_is_evaluated_on_appended_plays_but_not_with_a_split_that_moves(
    tmp_path: Path, workspace: Workspace
) -> None:
    first = import_data(workspace, config_of(tmp_path / "a.csv", plays(600, 1)))
    splits = [
        split_dataset(workspace, config)
        for config in (SplitConfig(test_days=0.05, validation_days=0.01), SplitConfig(last_fraction=0.2))
    ]
    append_plays(workspace, config_of(tmp_path / "b.csv", plays(200, 2, start=START + 90_000, songs=120)))
    config = EvaluateConfig(models=("popularity",), bootstrap_samples=10, offsets=0)
    report = evaluate(workspace, config, split=splits[0])
    assert report.inputs["dataset"] == Dataset(workspace).manifest.id != first.id
    assert report.metrics["plays"] > 200
    assert choose_split(workspace, splits[0].id) == splits[0]
    assert choose_split(workspace) == splits[0]  # still valid: the appended plays are in its test range
    with pytest.raises(MismatchError, match="run `rayrec split` again"):
        choose_split(workspace, splits[1].id)
    with pytest.raises(MismatchError, match="run `rayrec split` again"):
        embed(workspace, EmbedConfig(), split=splits[1])


def test_tastes_go_on_from_earlier_ones_and_equal_a_full_run(
    tmp_path: Path, workspace: Workspace, released: str
) -> None:
    first = Dataset(workspace).manifest
    base = artifacts.newest(workspace, "tastes")
    new_plays = plays(120, 2, start=START + 90_000, users=30)
    older_plays = [["u40", "s1", START - 500, "", 0]]
    new_user_plays = [["newcomer", "s1", START + 500, "", 0]]
    append_plays(workspace, config_of(tmp_path / "b.csv", new_plays))
    append_plays(workspace, config_of(tmp_path / "c.csv", [*older_plays, *new_user_plays]))
    incremental = compute_tastes(workspace, TasteConfig(users=7))
    num_continued = len({play[0] for play in new_plays})
    metrics = incremental.metrics
    assert metrics["base"] == base.id
    assert {name: metrics[name] for name in ("new", "continued", "recomputed", "unchanged")} == {
        "new": 1,
        "continued": num_continued,
        "recomputed": 1,
        "unchanged": first.users - num_continued - 1,
    }
    recomputed_plays = Dataset(workspace).history("u40").num_plays
    assert metrics["plays_computed"] == len(new_plays) + recomputed_plays + 1
    assert (metrics["users"], metrics["plays"]) == (first.users + 1, Dataset(workspace).manifest.plays)
    full = compute_tastes(workspace, TasteConfig(users=7), repeat=True)
    assert (full.metrics["base"], full.metrics["new"]) == ("", first.users + 1)
    actual, expected = (taste_rows_by_user(workspace, tastes) for tastes in (incremental, full))
    assert list(actual) == list(expected)
    for user, row in expected.items():
        for name, values in row.items():
            np.testing.assert_allclose(actual[user][name], values, atol=2e-6, err_msg=f"{user} {name}")


def test_a_retrieval_goes_on_from_an_earlier_one_without_reading_earlier_parts(
    tmp_path: Path, workspace: Workspace
) -> None:
    """The second part has other users than the first, so no session and no rule spans both parts."""
    import_data(workspace, config_of(tmp_path / "0.csv", plays(900, 1)))
    first = fit_retrieval(workspace, RetrievalConfig())
    later_plays = [[f"other-{user}", *play] for user, *play in plays(500, 2, start=START + 15_000, songs=100)]
    append_plays(workspace, config_of(tmp_path / "1.csv", later_plays))
    earlier_files = {path: workspace.read_bytes(path) for path in (histories_file(0, bucket) for bucket in range(4))}
    for path in earlier_files:
        workspace.delete(path)
    incremental = fit_retrieval(workspace, RetrievalConfig())
    for path, content_of_file in earlier_files.items():
        workspace.write_bytes(path, content_of_file)
    full = fit_retrieval(workspace, RetrievalConfig(full=True))
    assert (incremental.metrics["base"], full.metrics["base"]) == (first.id, "")
    assert incremental.metrics["plays"] == full.metrics["plays"] > first.metrics["plays"]
    assert incremental.files == full.files != first.files


def taste_rows_by_user(workspace: Workspace, manifest: artifacts.Manifest) -> dict[str, dict[str, Any]]:
    """Return user -> the other columns of the taste vectors' table; fail if a user occurs twice."""
    rows = [
        row for bucket in range(4) for row in workspace.read_table(tastes_file(manifest.folder, bucket)).to_pylist()
    ]
    result = {row.pop("user_id"): row for row in rows}
    assert len(result) == len(rows)
    return result


def test_a_killed_taste_job_resumes_with_the_missing_buckets_and_counts_all_buckets(
    tmp_path: Path, workspace: Workspace, released: str
) -> None:
    append_plays(workspace, config_of(tmp_path / "b.csv", plays(120, 2, start=START + 90_000, users=30)))
    first = compute_tastes(workspace, TasteConfig())
    workspace.delete(first.path("manifest.json"))  # as if the job had been killed
    workspace.delete(tastes_file(first.folder, 2))
    second = compute_tastes(workspace, TasteConfig())
    assert second.metrics["buckets_computed"] == 1
    metric_names = ("base", "users", "plays", "new", "continued", "unchanged", "plays_computed")
    assert {name: second.metrics[name] for name in metric_names} == {name: first.metrics[name] for name in metric_names}
    assert second.files == first.files


def test_full_computes_every_user_from_the_first_play_on(tmp_path: Path, workspace: Workspace, released: str) -> None:
    append_plays(workspace, config_of(tmp_path / "b.csv", plays(20, 2, start=START + 90_000, users=30)))
    full = compute_tastes(workspace, TasteConfig(full=True))
    assert (full.metrics["base"], full.metrics["plays_computed"]) == ("", Dataset(workspace).manifest.plays)
