"""New songs of a night are described, added, released and recommended; nothing is trained or built again."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from rankings import retrieval_of
from served import AT, NUM_SONGS, WITHOUT_VECTOR, write_release, write_world
from without_ray import without_ray

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Queries
from rayrec.errors import MismatchError
from rayrec.importing.descriptions import DescribeConfig, describe
from rayrec.jobs.add_songs import add_songs
from rayrec.jobs.recommend_all import recommend_all
from rayrec.jobs.taste import tastes_before
from rayrec.jobs.verify import verify_workspace
from rayrec.model.added_songs import AddedSongs
from rayrec.recommend.answer import RecommendConfig, load_recommender
from rayrec.recommend.filters import AnswerFilter, SongSet
from rayrec.recommend.two_step import CandidateSource, TwoStepRecommender
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

NEW_SONGS = 5  # number of described songs that nobody has played
FIRST_NEW = NUM_SONGS


def describe_new_songs(workspace: Workspace, folder: Path, count: int = NEW_SONGS, artist: str = "Artist {}") -> None:
    path = folder / f"new-{count}-{artist}.csv"
    lines = [f"new-{song},New {song},{artist.format(song % 7)}" for song in range(count)]
    path.write_text("\n".join(["song,title,artist", *lines]) + "\n")
    describe(workspace, DescribeConfig(append=True), str(path))


@pytest.fixture
def released(workspace: Workspace) -> Manifest:
    write_world(workspace)
    return write_release(workspace)


def test_described_songs_are_recommended_from_the_next_release_on(
    workspace: Workspace, released: Manifest, tmp_path: Path
) -> None:
    describe_new_songs(workspace, tmp_path)
    added_songs = add_songs(workspace)
    release = releases.create_release(workspace)
    assert (added_songs.metrics["new_songs"], added_songs.metrics["songs"]) == (NEW_SONGS, NEW_SONGS + 1)
    assert release.inputs["added_songs"] == added_songs.id
    assert {kind: release.inputs[kind] for kind in ("models", "tastes", "indexes", "rankers")} == {
        kind: released.inputs[kind] for kind in ("models", "tastes", "indexes", "rankers")
    }
    dataset = Dataset(workspace)
    assert dataset.catalog().song_ids(np.arange(FIRST_NEW, FIRST_NEW + NEW_SONGS)) == [
        f"new-{song}" for song in range(NEW_SONGS)
    ]
    recommender = load_recommender(workspace, dataset, release.inputs)
    assert isinstance(recommender, TwoStepRecommender)
    assert recommender.added_songs.tolist() == [WITHOUT_VECTOR, *range(FIRST_NEW, FIRST_NEW + NEW_SONGS)]
    # A user who plays one artist is proposed the new song by that artist; a filter can allow the new songs only.
    artist = 2
    history = Histories.from_lists([[artist + 7 * position for position in range(9)]], [[AT - 60_000] * 9])
    retrieval = retrieval_of(
        list(dataset.read_all()),
        num_songs=NUM_SONGS,
        artist_of_song=dataset.catalog().codes(columns.ARTIST)[:FIRST_NEW],
    )
    source = CandidateSource(recommender.source.network, retrieval)
    (_, batch), *_ = source.batches(history, Queries.at_end(history, AT))
    proposed_songs = batch.candidates.proposals["new_artists"].songs.tolist()
    assert proposed_songs == [FIRST_NEW + artist]
    allowed = SongSet.of_rows(np.arange(FIRST_NEW, FIRST_NEW + NEW_SONGS))
    ranking = recommender.rank(history, AT, NEW_SONGS, filters=[AnswerFilter(allowed=allowed)])
    assert sorted(ranking.songs[0].tolist()) == list(range(FIRST_NEW, FIRST_NEW + NEW_SONGS))
    assert np.isfinite(ranking.scores).all()


def test_the_earlier_release_stays_valid_after_songs_were_added(
    workspace: Workspace, released: Manifest, tmp_path: Path
) -> None:
    describe_new_songs(workspace, tmp_path)
    add_songs(workspace)
    release = releases.create_release(workspace)
    for manifest in (released, release):
        releases.verify_release(workspace, manifest)
    dataset = Dataset(workspace)
    recommender = load_recommender(workspace, dataset, released.inputs)
    assert recommender.num_songs == NUM_SONGS
    plays_id = dataset.manifest.plays_id
    assert plays_id == released.inputs["dataset"]  # the plays are the same, so artifacts made from them stay valid
    assert dataset.descends_from(released.inputs["dataset"])


def test_verify_finds_nothing_wrong_with_added_songs_unless_they_are_damaged(
    workspace: Workspace, released: Manifest, tmp_path: Path
) -> None:
    describe_new_songs(workspace, tmp_path)
    added_songs = add_songs(workspace)
    assert not [problem for problem in verify_workspace(workspace).problems if "added" in problem.path]
    vectors = np.array(workspace.read_array(added_songs.path("song_vectors.npy")))
    vectors[1, 2] = np.nan
    digest = workspace.write_array(added_songs.path("song_vectors.npy"), vectors)
    workspace.write_json(
        added_songs.path("manifest.json"),
        asdict(replace(added_songs, files={**added_songs.files, "song_vectors.npy": digest})),
    )
    (finding,) = [problem for problem in verify_workspace(workspace).problems if "added" in problem.path]
    assert "expected a finite vector per song" in finding.text


def test_songs_for_all_users_are_computed_anew_once_songs_were_added(
    workspace: Workspace, released: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    config = RecommendConfig(k=5)
    before = recommend_all(workspace, config, released.inputs, at=AT)
    assert recommend_all(workspace, config, released.inputs, at=AT).id == before.id
    describe_new_songs(workspace, tmp_path)
    added_songs = add_songs(workspace)
    after = recommend_all(workspace, config, releases.create_release(workspace).inputs, at=AT)
    assert (after.id != before.id, after.inputs["added_songs"]) == (True, added_songs.id)


def test_what_is_written_grows_with_the_new_songs_alone(
    workspace: Workspace, released: Manifest, tmp_path: Path
) -> None:
    describe_new_songs(workspace, tmp_path)
    before = workspace.sizes("")
    first = add_songs(workspace)
    changed_paths = {path for path, size in workspace.sizes("").items() if before.get(path) != size}
    folders = {path.split("/")[0] for path in changed_paths}
    assert folders <= {"added_songs", "dataset", "current.json"}
    assert not any(path.startswith("dataset/histories") for path in changed_paths)
    describe_new_songs(workspace, tmp_path, 2 * NEW_SONGS)
    second = add_songs(workspace)
    sizes = [
        [workspace.size(manifest.path(name)) for name in ("song_vectors.npy", "input_vectors.npy", "rows.npy")]
        for manifest in (first, second)
    ]
    row_bytes = 8 * 4  # bytes of a vector
    assert sizes[1][0] - sizes[0][0] == sizes[1][1] - sizes[0][1] == NEW_SONGS * row_bytes
    assert first.metrics["map_strengths"] == second.metrics["map_strengths"]
    added_songs = AddedSongs.load(workspace, second.folder)
    np.testing.assert_array_equal(
        added_songs.outputs[: NEW_SONGS + 1], AddedSongs.load(workspace, first.folder).outputs
    )
    assert second.metrics["new_songs"] == NEW_SONGS


def test_adding_to_a_catalog_five_times_as_large_writes_as_much(tmp_path: Path) -> None:
    totals = []
    for num_songs in (20_000, 100_000):
        workspace = Workspace(tmp_path / str(num_songs))
        write_world(workspace, users=20, num_songs=num_songs)
        write_release(workspace, ranked=False)
        (tmp_path / "new.csv").write_text(
            "\n".join(["song,title,artist", *(f"new-{song},New {song},Artist {song % 7}" for song in range(1_000))])
        )
        before = workspace.sizes("")
        modified_at = {path: Path(workspace.full(path)).stat().st_mtime_ns for path in before}
        describe(workspace, DescribeConfig(append=True), str(tmp_path / "new.csv"))
        added_songs = add_songs(workspace)
        releases.create_release(workspace)
        assert added_songs.metrics["songs"] == 1_000 + 1  # and the catalog's song that had no vector
        assert len(Dataset(workspace).catalog()) == num_songs + 1_000
        after = workspace.sizes("")
        changed_paths = [
            path for path in after if modified_at.get(path) != Path(workspace.full(path)).stat().st_mtime_ns
        ]
        totals.append((len(changed_paths), sum(after[path] for path in changed_paths)))
        releases.verify_release(workspace, releases.list_releases(workspace)[-1])
        # The song table that was written by hand is in no manifest.
        song_problems = [
            problem for problem in verify_workspace(workspace).problems if problem.path.startswith("dataset/songs")
        ]
        assert {(problem.path, problem.text) for problem in song_problems} == {
            ("dataset/songs.parquet", "is listed in no manifest")
        }
    (first_files, first_bytes), (second_files, second_bytes) = totals
    assert first_files == second_files
    assert abs(second_bytes - first_bytes) < 0.1 * first_bytes


def test_adding_the_same_songs_again_changes_nothing(workspace: Workspace, released: Manifest, tmp_path: Path) -> None:
    describe_new_songs(workspace, tmp_path)
    added_songs = add_songs(workspace)
    dataset_id = Dataset(workspace).manifest.id
    assert add_songs(workspace).id == added_songs.id
    assert Dataset(workspace).manifest.id == dataset_id
    assert add_songs(workspace, repeat=True).id == f"{added_songs.id}.2"


def test_tastes_go_on_from_earlier_ones_after_songs_were_added_that_nobody_had_played(
    workspace: Workspace, released: Manifest, tmp_path: Path
) -> None:
    model = artifacts.load_manifest(workspace, "models", released.inputs["models"])
    assert tastes_before(Dataset(workspace), model) is not None
    describe_new_songs(workspace, tmp_path)
    added_songs = add_songs(workspace)
    # The song that had no vector has been played: the network would read its plays differently now.
    assert tastes_before(Dataset(workspace), model, added_songs) is None
    tastes = Manifest(
        kind="tastes",
        id="later",
        inputs={"dataset": Dataset(workspace).manifest.plays_id, "models": model.id, "added_songs": added_songs.id},
    )
    artifacts.publish(workspace, tastes, [])
    describe_new_songs(workspace, tmp_path, 2 * NEW_SONGS)
    base = tastes_before(Dataset(workspace), model, add_songs(workspace))
    assert base is not None
    assert base.id == "later"


def test_content_that_nobody_played_comes_into_the_catalog(
    workspace: Workspace, released: Manifest, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    np.save(tmp_path / "content.npy", random.normal(size=(NUM_SONGS + 3, 4)))
    ids = [f"song-{song}" for song in range(NUM_SONGS)] + ["by-content-0", "by-content-1", "by-content-2"]
    (tmp_path / "content.ids.txt").write_text("\n".join(ids))
    counts = describe(workspace, DescribeConfig(vectors=str(tmp_path / "content.npy")))
    assert (counts.songs, counts.content) == (NUM_SONGS, NUM_SONGS)
    added_songs = add_songs(workspace)
    dataset = Dataset(workspace)
    assert dataset.catalog().table.column(columns.SONG_ID).to_pylist()[FIRST_NEW:] == ids[NUM_SONGS:]
    # The network is untrained and its vectors are random, so this test cannot check whether content helps.
    assert added_songs.metrics["new_songs"] == 3


def test_a_night_without_new_songs_changes_no_answer(workspace: Workspace, released: Manifest) -> None:
    model = artifacts.load_manifest(workspace, "models", released.inputs["models"])
    vectors = np.array(workspace.read_array(model.path("song_vectors.npy")))
    vectors[WITHOUT_VECTOR] = vectors[0]
    workspace.write_array(model.path("song_vectors.npy"), vectors)
    assert add_songs(workspace).metrics["songs"] == 0
    dataset = Dataset(workspace)
    history = Histories.from_lists([[2, 9, 16]], [[AT - 60_000] * 3])
    new_answer, old_answer = (
        load_recommender(workspace, dataset, parts).recommend(history, AT, 20)
        for parts in (releases.create_release(workspace).inputs, released.inputs)
    )
    np.testing.assert_array_equal(new_answer[0], old_answer[0])


def test_added_songs_of_another_model_are_refused(workspace: Workspace, released: Manifest, tmp_path: Path) -> None:
    write_release(workspace, "2", seed=1)
    describe_new_songs(workspace, tmp_path)
    other_songs = add_songs(workspace, model_id="model2")
    with pytest.raises(MismatchError, match=r"added songs .* were made for model model2"):
        load_recommender(workspace, Dataset(workspace), {**released.inputs, "added_songs": other_songs.id})
