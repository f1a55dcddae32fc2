"""The retrieval stage: whatever the groups of buckets and the ranges of songs, it finds what one process would."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from without_ray import CountingFileSystem, without_ray
from worlds import random_histories, with_opinions, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.importing import import_plan
from rayrec.jobs import retrieval as job
from rayrec.jobs.planning.formulas import retrieval_requests
from rayrec.jobs.retrieval import fit_retrieval, merge_counts
from rayrec.recommend import stored_retrieval
from rayrec.recommend.stored_retrieval import Retrieval, RetrievalCounts
from rayrec.recommend.two_step_config import RetrievalConfig
from rayrec.storage.workspace import Workspace

SONGS, BUCKETS = 50, 6
SETTINGS = RetrievalConfig(sessions_per_song=3, rules_per_song=4)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)


def arrays(retrieval: Retrieval) -> dict[str, np.ndarray]:
    found: dict[str, Any] = {}
    for part in ("sessions", "rules", "plays"):
        value = getattr(retrieval, part)
        found |= {f"{part}.{field.name}": getattr(value, field.name) for field in fields(value)}
    return {**found, "recent": retrieval.recent_plays, "popular": retrieval.popular}


def cut(monkeypatch: pytest.MonkeyPatch, *, ranges: int, groups: int, plays: int) -> None:
    """As many ranges of songs and groups of buckets as very large data would have."""
    monkeypatch.setattr(stored_retrieval, "PLAYS_PER_RANGE", -(-plays // ranges))
    monkeypatch.setattr(import_plan, "READS", ranges * groups)


@pytest.mark.parametrize(
    ("ranges", "groups", "opinions"), [(1, 6, False), (5, 6, True), (5, 3, False), (5, 3, True), (50, 1, True)]
)
def test_any_groups_and_ranges_give_the_same(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, ranges: int, groups: int, opinions: bool
) -> None:
    histories = random_histories(60, SONGS, seed=2)
    histories = with_opinions(histories, SONGS) if opinions else histories
    dataset = write_dataset(workspace, histories, SONGS, buckets=BUCKETS)
    cut(monkeypatch, ranges=ranges, groups=groups, plays=dataset.manifest.plays)
    made = fit_retrieval(workspace, SETTINGS)
    whole = RetrievalCounts.fit(histories, num_songs=SONGS, newest=SETTINGS.sessions_per_song)
    expected = arrays(Retrieval.build(whole, rules_per_song=SETTINGS.rules_per_song))
    loaded = Retrieval.load(workspace, made.folder)
    found = arrays(loaded)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert (loaded.has_likes, loaded.skip_share > 0) == (opinions, opinions)


def test_a_killed_job_counts_no_group_again(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(workspace, random_histories(60, SONGS, seed=2), SONGS, buckets=BUCKETS)
    cut(monkeypatch, ranges=5, groups=3, plays=dataset.manifest.plays)
    expected = fit_retrieval(workspace, SETTINGS)
    read = []
    whole = Dataset.read_bucket

    def counted(dataset: Dataset, bucket: int, *arguments: Any, **options: Any) -> Any:
        read.append(bucket)
        return whole(dataset, bucket, *arguments, **options)

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "merge_counts", kill)
        with pytest.raises(KeyboardInterrupt):
            fit_retrieval(workspace, SETTINGS, repeat=True)
    monkeypatch.setattr(Dataset, "read_bucket", counted)
    again = fit_retrieval(workspace, SETTINGS, repeat=True)
    assert read == []
    assert again.files == expected.files  # their checksums


def test_parts_merge_like_with_like() -> None:
    """A part is copied as often as the logarithm of their number, and not once for each that follows it."""
    histories = random_histories(64, SONGS, seed=3)
    parts = [RetrievalCounts.fit(histories.take(np.arange(64) == user), num_songs=SONGS) for user in range(64)]
    copied = 0
    merge = RetrievalCounts.merge.__func__  # type: ignore[attr-defined]

    def counted(cls: type, parts: Any) -> RetrievalCounts:
        nonlocal copied
        copied += sum(len(part.rules.followers) for part in parts)
        made: RetrievalCounts = merge(cls, parts)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetrievalCounts, "merge", classmethod(counted))
        merged = merge_counts(iter(parts))
    assert copied <= 8 * sum(len(part.rules.followers) for part in parts)
    expected = RetrievalCounts.fit(histories, num_songs=SONGS)
    np.testing.assert_array_equal(merged.rules.followers, expected.rules.followers)
    np.testing.assert_array_equal(merged.sessions.songs, expected.sessions.songs)


@pytest.mark.parametrize(("ranges", "groups"), [(1, 6), (10, 3), (25, 6)])
def test_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: int, groups: int) -> None:
    workspace = Workspace(tmp_path / "w")
    dataset = write_dataset(workspace, random_histories(60, SONGS, seed=2), SONGS, buckets=BUCKETS)
    cut(monkeypatch, ranges=ranges, groups=groups, plays=dataset.manifest.plays)
    counts = CountingFileSystem()
    with monkeypatch.context() as patch:
        counts.watch(patch)
        fit_retrieval(workspace, SETTINGS)
    expected = retrieval_requests(BUCKETS, 1, groups=groups, ranges=ranges, row_groups=1, columns=3, fits=1)
    assert counts.total == pytest.approx(expected, rel=0.15)


def test_requests_for_20_billion_plays_are_under_two_million() -> None:
    plays, songs, buckets = 20 * 10**9, 10**7, 4_096
    ranges = stored_retrieval.song_ranges(songs, plays)
    groups = import_plan.bucket_groups(len(ranges), buckets)
    requests = retrieval_requests(buckets, 1, groups=len(groups), ranges=len(ranges), row_groups=5, columns=3, fits=2)
    assert len(ranges) == 1_000
    assert requests < 2_000_000
