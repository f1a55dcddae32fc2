"""Releases change under load: no request fails, no answer mixes releases, and a broken release is refused."""

import asyncio
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import pytest
from served import AT, damage, write_release, write_world
from serving_apps import running

from rayrec.bench.serve_bench import replicas
from rayrec.data.dataset import Dataset
from rayrec.errors import RayrecError
from rayrec.recommend.answer import history_of_songs, load_recommender
from rayrec.serving.live_release import SwitchWait, fetch_reports, switch
from rayrec.storage import releases
from rayrec.storage.artifacts import load_manifest, publish
from rayrec.storage.workspace import Workspace

BODY = {"history": ["song-3", "song-50", "song-9"], "at": AT, "k": 20, "horizon": "long", "exclude_heard": False}
CLIENTS = 4
SESSION_SONGS = "sessions.songs.npy"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("switch") / "workspace")
    write_world(workspace)
    for seed in (1, 2, 3):
        write_release(workspace, str(seed), seed=seed, kind="ivf" if seed == 2 else "flat", activate=seed == 1)
    return workspace


@pytest.fixture(scope="module")
def url(world: Workspace, cluster: None) -> Iterator[str]:
    releases.activate_release(world, by_model(world)["model1"])
    with running(world, replicas=2, cpus=0.25, watch_seconds=0.2) as made:
        yield made


def by_model(world: Workspace) -> dict[str, str]:
    return {release.inputs["models"]: release.id for release in releases.list_releases(world)}


def expected(world: Workspace, model: str) -> list[str]:
    """Return the song ids that a release recommends; with rankers of another release they would differ."""
    recommender = load_recommender(world, Dataset(world), releases.default_parts(world, model))
    history = history_of_songs(Dataset(world).catalog(), BODY["history"], AT)  # type: ignore[arg-type]
    rows, _ = recommender.recommend_one(history, AT, 20, horizon="long")
    return [f"song-{row}" for row in rows]


@dataclass
class Load:
    """Clients that send requests without a pause until they are stopped."""

    url: str
    answers: list[tuple[float, float, int, dict[str, Any]]] = field(
        default_factory=list
    )  # begin, seconds, status, body
    stopped: bool = False

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=30) as client:
            await asyncio.gather(*(self._ask(client) for _ in range(CLIENTS)))

    async def _ask(self, client: httpx.AsyncClient) -> None:
        while not self.stopped:
            began = time.perf_counter()
            response = await client.post("/v1/recommendations", json=BODY)
            self.answers.append((began, time.perf_counter() - began, response.status_code, response.json()))

    async def during(self, work: Any, *arguments: Any) -> tuple[float, float]:
        """Run blocking work under the load; return when it began and ended."""
        began = time.perf_counter()
        await asyncio.to_thread(work, *arguments)
        return began, time.perf_counter()

    def p99_ms(self, begin: float, end: float) -> float:
        """Return the p99 latency in ms of the requests that were in progress at any moment from `begin` to `end`."""
        times = [seconds for began, seconds, *_ in self.answers if began < end and began + seconds > begin]
        return float(np.percentile(times, 99)) * 1000


def test_releases_change_under_load_without_a_failure_or_a_mixed_answer(world: Workspace, url: str) -> None:
    ids, load, spans = by_model(world), Load(url), []
    right = {ids[model]: expected(world, model) for model in ("model1", "model2")}
    assert len({tuple(songs) for songs in right.values()}) == 2

    def change(model: str) -> None:
        switch(world, lambda: releases.activate_release(world, ids[model]), SwitchWait(url=url, seconds=60))
        assert {report.release for report in fetch_reports(url)} == {ids[model]}

    def back() -> None:
        switch(world, lambda: releases.rollback(world), SwitchWait(url=url, seconds=60))

    async def scenario() -> None:
        clients = asyncio.ensure_future(load.run())
        await asyncio.sleep(2)
        for work in (*(partial(change, model) for model in ("model2", "model1") * 3), partial(change, "model2"), back):
            await asyncio.sleep(1)  # a second without a switch, to compare with
            spans.append(await load.during(work))
        await asyncio.sleep(0.5)
        load.stopped = True
        await clients

    asyncio.run(scenario())
    assert {status for _, _, status, _ in load.answers} == {200}
    seen = {answer["release"] for *_, answer in load.answers}
    assert seen == set(right)
    for *_, answer in load.answers:
        assert [song["song_id"] for song in answer["songs"]] == right[answer["release"]]
    after = [answer["release"] for began, _, _, answer in load.answers if began > spans[-1][1]]
    assert set(after) == {ids["model1"]}
    assert p99_ratio(load, spans) < 3


def test_a_broken_release_is_refused_by_all_and_no_request_notices(world: Workspace, url: str) -> None:
    ids, load = by_model(world), Load(url)
    before = releases.read_active(world)["active"]
    damage(world, ids["model3"])

    def refuse() -> None:
        with pytest.raises(RayrecError, match=r"refuses release .* checksum"):
            switch(world, lambda: releases.activate_release(world, ids["model3"]), SwitchWait(url=url, seconds=60))

    async def scenario() -> None:
        clients = asyncio.ensure_future(load.run())
        await load.during(refuse)
        await asyncio.sleep(0.5)
        load.stopped = True
        await clients

    try:
        asyncio.run(scenario())
    finally:
        damage(world, ids["model3"])  # flips the same bit, which repairs the file
    assert {(status, answer["release"]) for _, _, status, answer in load.answers} == {(200, before)}
    assert httpx.get(f"{url}/v1/release").json()["activated"] == before


def test_the_metrics_tell_stages_batches_look_ups_paths_and_the_release(world: Workspace, url: str) -> None:
    body = {"requests": [{**BODY, "artists": ["Artist 1"]}] * 3}
    texts = []
    for _ in range(20):  # two replicas take turns in answering
        assert httpx.post(f"{url}/v1/recommendations/batch", json=body).status_code == 200
        texts.append(httpx.get(f"{url}/metrics").text)
    for line in (
        *(
            rf'rayrec_stage_seconds_count\{{.*stage="{name}"\}} \d'
            for name in ("read", "encode", "project", "choose", "write")
        ),
        r'rayrec_batch_users_bucket\{le="4.0",.*\} [1-9]',
        r'rayrec_cache_lookups\{cache="masks",outcome="hits",.*\} [1-9]',
        r'rayrec_answers_total\{path="(index|selector|exact)",.*\} [1-9]',
        rf'rayrec_release\{{.*release="{releases.read_active(world)["active"]}",.*\}} 1',
    ):
        assert any(re.search(line, text) for text in texts), line


def p99_ratio(load: Load, spans: list[tuple[float, float]]) -> float:
    """Return the median over spans of: p99 in the span / p99 in the equally long time before it, at least 1 s."""
    ratios = []
    for begin, end in spans:
        before = load.p99_ms(begin - max(1.0, end - begin), begin)
        ratios.append(load.p99_ms(begin, end) / before)
    print(f"\n{len(load.answers)} answers; p99 during a switch over before: {sorted(round(one, 2) for one in ratios)}")
    return median(ratios)


SIZE = 10_000_000_000


def write_large_release(world: Workspace, name: str, size: int) -> str:
    """Create a release like that of `model1`, but with an array of `size` bytes; return its id.

    Nearly all of these bytes are unused zeros at the end of the array, which take no space on the disk.
    """
    small = load_manifest(world, "retrieval", "retrieval1")
    large = replace(small, id=name)
    for file in small.files:
        world.write_bytes(large.path(file), world.read_bytes(small.path(file)))
    used = np.asarray(world.read_array(small.path(SESSION_SONGS)))
    path = Path(world.full(large.path(SESSION_SONGS)))
    extended = np.lib.format.open_memmap(path, mode="w+", dtype=used.dtype, shape=(size // used.itemsize,))
    extended[: len(used)] = used
    publish(world, large, list(small.files))
    parts = {"model_id": "model1", "tastes_id": "tastes1", "index_id": "index1", "rankers_id": "rankers1"}
    return releases.create_release(world, **parts, retrieval_id=large.id, activate=False).id


def read_by_replicas() -> int:
    """Return the bytes that the replicas, and the processes that they started and waited for, have read from files."""
    return sum(replica.io_counters().read_chars for replica in replicas())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no /proc/self/io: run it on Linux")
def test_two_replicas_take_a_release_of_10_gb_under_load_and_read_each_byte_once(world: Workspace, url: str) -> None:
    ids, load = by_model(world), Load(url)
    releases.activate_release(world, ids["model1"])
    right, large = expected(world, "model1"), write_large_release(world, "large", SIZE)
    spans, read = [], []

    def change() -> None:
        before = read_by_replicas()
        switch(world, lambda: releases.activate_release(world, large), SwitchWait(url=url))
        assert {report.release for report in fetch_reports(url)} == {large}
        read.append(read_by_replicas() - before)

    async def scenario() -> None:
        clients = asyncio.ensure_future(load.run())
        await asyncio.sleep(10)
        spans.append(await load.during(change))
        await asyncio.sleep(0.5)
        load.stopped = True
        await clients

    asyncio.run(scenario())
    assert {status for _, _, status, _ in load.answers} == {200}
    assert {answer["release"] for *_, answer in load.answers} == {ids["model1"], large}
    assert all([song["song_id"] for song in answer["songs"]] == right for *_, answer in load.answers)
    assert SIZE <= read[0] < 1.01 * SIZE
    ((begin, end),) = spans
    # The median over seconds: a single p99 depends on the load of the machine.
    seconds = [(at, at + 1.0) for at in np.arange(begin, end)]
    before = median(load.p99_ms(at, at + 1.0) for at in np.arange(begin - 8.0, begin - 1.0))
    during = median(load.p99_ms(*second) for second in seconds)
    print(f"\n{end - begin:.1f} s; {read[0]:,} bytes; p99 before {before:.1f} ms, during {during:.1f} ms")
    assert during < 3 * before
