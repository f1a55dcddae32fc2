"""Every benchmark runs once on a tiny world, and returns the expected figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayrec.bench.answers_bench import build_answers_release
from rayrec.bench.bench_config import (
    AnswersBenchConfig,
    BenchConfig,
    EmbedBenchConfig,
    IndexBenchConfig,
    MemoryBenchConfig,
    ScaleBenchConfig,
    ServeBenchConfig,
    SimulateBenchConfig,
    TasteBenchConfig,
    TrainBenchConfig,
)
from rayrec.bench.suite import bench, bench_workspace
from rayrec.errors import InputError
from rayrec.recommend.retrievers import COUNTS
from rayrec.storage.workspace import Workspace

TINY: dict[str, BenchConfig] = {
    "train": TrainBenchConfig(rounds=1, users=600, songs=100, plays=10.0, seconds=0.2),
    "taste": TasteBenchConfig(rounds=1, users=150, songs=100, plays=10.0),
    "embed": EmbedBenchConfig(rounds=1, users=150, songs=100, plays=10.0, epochs=1),
    "index": IndexBenchConfig(rounds=1, songs=1_000, dim=8, queries=100),
    "memory": MemoryBenchConfig(users=(100, 200), songs=(300, 3_000), plays=10.0),
    "scale": ScaleBenchConfig(users=(60, 120), songs=100, plays=10.0, workers=(1, 2), word2vec_epochs=1),
    "simulate": SimulateBenchConfig(measured_users=300, measured_songs=100, measured_plays=10.0),
    "answers": AnswersBenchConfig(songs=(100, 300), plays=3_000, plays_per_user=10.0, queries=10),
}
COMMON = {"name", "unit", "ratio", "ratio_low", "ratio_high", "per_second", "plain_per_second", "peak_mb", "rounds"}


def check_common(report: dict[str, Any], name: str, unit: str) -> None:
    assert report.keys() >= COMMON
    assert (report["name"], report["unit"], report["rounds"]) == (name, unit, 1)
    assert report["ratio"] == pytest.approx(report["per_second"] / report["plain_per_second"])
    assert report["ratio_low"] == report["ratio"] == report["ratio_high"]
    assert report["peak_mb"] > 0


@pytest.mark.usefixtures("cluster")
class TestBench:
    @pytest.fixture
    def place(self, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
        """One workspace for all tests, so that data sets of the same size are generated once."""
        return Workspace(tmp_path_factory.getbasetemp() / "bench-data")

    def test_taste_counts_plays_against_the_plain_loop(self, place: Workspace) -> None:
        report = bench("taste", place, TINY["taste"])
        check_common(report, "taste", "plays")
        assert report["users"] == 150

    def test_embed_counts_tokens_against_gensim_alone(self, place: Workspace, tmp_path: Path) -> None:
        report = bench("embed", place, TINY["embed"], save=str(tmp_path / "rates.json"))
        assert json.loads((tmp_path / "rates.json").read_text())["rates"] == {
            "embed_tokens_per_second_per_cpu": report["per_second"]
        }
        check_common(report, "embed", "tokens")
        assert report["workers"] == 1
        assert 0 < report["corpus_tokens"] < 2_000

    @pytest.mark.slow
    def test_train_counts_plays_and_tells_what_the_data_path_feeds(self, place: Workspace) -> None:
        report = bench("train", place, TINY["train"])
        check_common(report, "train", "plays")
        assert report["feed"] == pytest.approx(report["data_per_second"] / report["per_second"])

    def test_index_needs_no_cluster(self, place: Workspace) -> None:
        check_common(bench("index", place, TINY["index"]), "index", "queries")

    @pytest.mark.slow
    def test_memory_tells_the_growth_of_the_driver_and_of_the_workers_of_both_jobs(self, place: Workspace) -> None:
        report = bench("memory", place, TINY["memory"])
        assert report["growth"] == max(report["growth_by_role"].values())
        assert report["growth_by_role"].keys() == {"taste driver", "taste worker", "data driver", "data worker"}
        assert report["users"] == [100, 200]
        assert report["growth"] < 0.1
        assert report["songs"] == [300, 3_000]
        assert report["songs_growth_mb"] == pytest.approx(report["songs_peaks_mb"][1] - report["songs_peaks_mb"][0])

    @pytest.mark.slow
    def test_simulate_tells_hours_of_every_stage_beside_those_of_plan(self, place: Workspace) -> None:
        report = bench("simulate", place, TINY["simulate"])
        by_stage = {stage["stage"]: stage for stage in report["stages"]}
        stages = ["import", "embed", "train", "retrieval", "rank", "taste", "index", "evaluate", "recommend"]
        assert list(by_stage) == stages
        assert report["hours"] == pytest.approx(sum(stage["hours"] for stage in report["stages"]))
        assert all(stage["hours"] > 0 for stage in report["stages"])
        assert all(by_stage[name]["plan_hours"] > 0 for name in stages if name != "index")

    @pytest.mark.slow
    def test_scale_tells_every_stage_by_workers_and_by_size(self, place: Workspace, tmp_path: Path) -> None:
        report = bench("scale", place, TINY["scale"], save=str(tmp_path / "rates.json"))
        stages = {"import", "embed", "train", "taste"}
        assert report["workers"] == [1, 2]
        for part in ("throughput", "speedups", "cost"):
            assert report[part].keys() == stages
        for stage in stages:
            assert report["throughput"][stage].keys() == {"1", "2"}
            assert len(report["cost"][stage]["plays"]) == 2
        assert report["word2vec"]["speedup"].keys() == {"1", "2"}
        assert report["word2vec"]["speedup"]["1"] == 1.0
        assert report["extrapolated"]["extrapolated"] is True
        assert json.loads((tmp_path / "rates.json").read_text())["rates"].keys() == {
            "train_plays_per_second_per_cpu",
            "taste_plays_per_second_per_cpu",
            "import_plays_per_second_per_cpu",
            "embed_tokens_per_second_per_cpu",
        }
        assert place.files("bench/chain") == []

    def test_nothing_is_left_in_the_workspace_but_the_data(self, place: Workspace) -> None:
        bench("taste", place, TINY["taste"])
        data_folder, *_ = [name for name in place.folders("bench") if place.exists(f"bench/{name}/models")]
        assert set(place.folders(f"bench/{data_folder}")) <= {"dataset", "lineages", "models", "tastes", "songs"}
        assert not place.files(f"bench/{data_folder}/tastes")

    @pytest.mark.slow
    def test_answers_are_measured_by_stage_and_catalog(self, place: Workspace) -> None:
        report = bench("answers", place, TINY["answers"])
        assert [catalog["songs"] for catalog in report["catalogs"]] == [100, 300]
        for catalog in report["catalogs"]:
            assert catalog["stages"].keys() >= {"taste vectors", "sessions", "rules", "features", "ranker"}
            assert all(stage["bytes"] > 0 for stage in catalog["stages"].values())
            assert 0 < catalog["candidates"] <= min(catalog["songs"], sum(COUNTS.values()))
            assert min(catalog["cpu_ms"], catalog["first_cpu_ms"]) > 0
            assert catalog["recall"] == catalog["exact_recall"] > 0  # small catalogs are searched exactly
            assert catalog["index_recall"] == 1
        assert report["rates"] == {"answers_per_second_per_cpu": 1000 / report["cpu_ms"]}
        assert report["cpu_growth"] == report["catalogs"][1]["cpu_ms"] / report["catalogs"][0]["cpu_ms"]
        second = bench("answers", place, TINY["answers"])
        assert [catalog["build_seconds"] for catalog in second["catalogs"]] == [0, 0]

    @pytest.mark.slow
    def test_serve_measures_the_default_recommender_and_its_overhead_over_the_answer(self, place: Workspace) -> None:
        report = bench("serve", place, ServeBenchConfig.quick())
        (catalog,) = report["catalogs"]
        assert {"models", "indexes", "retrieval", "rankers"} <= set(catalog["parts"])
        assert catalog["loads"].keys() == {
            *(f"{target} history {clients}" for target in ("bare", "serve") for clients in (1, 16)),
            *("bare noop 1", "bare stored 1", "serve stored 1"),
        }
        assert report["errors"] == 0
        assert min(load["per_second"] for load in catalog["loads"].values()) > 0
        over_noop = report["stored_over_noop_ms"]
        assert report["stored_over_cpu_ms"] == pytest.approx(over_noop - report["answer_cpu_ms"])
        assert 0 < report["answer_cpu_ms"] < catalog["loads"]["bare history 1"]["p50_ms"]
        assert catalog["replica_mb"].keys() == {"1", "4"}
        assert report["replica_growth_mb"] == 0  # there is only one catalog
        assert report.keys() >= {"p50_ratio", "throughput_ratio", "plays_cost_ratio", "load_generator"}
        with bench_workspace(place) as workspace:
            # 0 seconds: its release exists already
            assert build_answers_release(workspace, ServeBenchConfig.quick(), 500)[2] == 0

    def test_an_unknown_name_is_refused(self) -> None:
        with pytest.raises(InputError, match="Unknown benchmark 'speed'"):
            bench("speed")
