"""The report: files that programs and people can read."""

import base64
import html
import re
from typing import Any

import pytest

from rayrec.errors import DamagedArtifactError
from rayrec.evaluation.plots import Plot, cosine_plot, curve_name
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.report import headline, html_page, read_results, summary, verdict, write_report
from rayrec.storage.artifacts import Manifest, publish
from rayrec.storage.workspace import Workspace

PNG = b"\x89PNG\r\n\x1a\n"


def _entry(model: str, users: str, value: float, k: int = 20, metric: str = "recall") -> dict[str, Any]:
    interval = {"value": value, "low": value - 0.01, "high": value + 0.01}
    labels = {"model": model, "kind": "baseline", "users": users, "target": "next", "metric": metric, "k": k}
    return {**labels, **interval, "plays": 1234, "users_count": 56}


def _curve(model: str, kind: str = "baseline", horizon: str = "short") -> dict[str, Any]:
    values = {"value": [0.5, 0.4], "low": [0.4, 0.3], "high": [0.6, 0.5], "plays": [20, 10]}
    return {"model": model, "kind": kind, "horizon": horizon, "offset": [1, 2], **values}


@pytest.fixture
def results() -> list[dict[str, Any]]:
    return [
        _entry(model, users, value, k, metric)
        for users in ("all", "seen", "new")
        for model, value in (("weak", 0.1), ("strong <&>", 0.4))
        for k in (10, 20)
        for metric in ("recall", "mrr")
    ]


def test_the_report_is_written_with_everything_in_it(workspace: Workspace, results: list[dict[str, Any]]) -> None:
    curves = [_curve("weak"), _curve("taste", "network")]
    statistics = {"results": results, "cosine_by_offset": curves, "pairwise": []}
    plot = cosine_plot(curves)
    assert plot is not None
    names = write_report(workspace, "reports/r", statistics, default="taste", about={"split": "abc"}, plots=[plot])
    assert sorted(names) == ["cosine_by_offset.png", "report.html", "results.json"]
    stored = workspace.read_json("reports/r/results.json")
    assert re.fullmatch(r"rayrec \S+, Python \S+, torch \S+, numpy \S+, lightgbm \S+", stored["about"].pop("versions"))
    assert stored["about"] == {"split": "abc"}
    assert stored["default"] == "taste"
    assert stored["results"] == results
    assert stored["cosine_by_offset"] == curves
    picture = workspace.read_bytes("reports/r/cosine_by_offset.png")
    assert picture.startswith(PNG)
    assert base64.b64encode(picture).decode() in workspace.read_bytes("reports/r/report.html").decode()


def test_figures_are_read_from_the_results_and_checked(workspace: Workspace, results: list[dict[str, Any]]) -> None:
    statistics = {"results": results, "cosine_by_offset": [_curve("weak")], "breakdowns": []}
    names = write_report(workspace, "reports/r", statistics, default="weak", about={"split": "abc"})
    report = publish(workspace, Manifest(kind="reports", id="r", metrics={"default": "weak", "plays": 9}), names)
    assert read_results(workspace, report) == {"default": "weak", "plays": 9, "results": results, "breakdowns": []}
    workspace.write_json("reports/r/results.json", {"default": "weak", "results": []})
    with pytest.raises(DamagedArtifactError, match=r"results.json does not match"):
        read_results(workspace, report)


def test_the_headline_is_recall_and_mrr_of_the_default_model(results: list[dict[str, Any]]) -> None:
    assert headline({"results": results}, "strong <&>") == {"recall@20": 0.4, "mrr@20": 0.4}
    served_entries = [{**_entry("weak", "all", 0.3, metric=metric), "target": "served"} for metric in ("recall", "mrr")]
    metrics = headline({"results": [*results, *served_entries]}, "weak")
    assert metrics == {"served_recall@20": 0.3, "served_mrr@20": 0.3, "recall@20": 0.1, "mrr@20": 0.1}
    assert headline({"results": results}, "taste") == {}


def test_a_summary_holds_the_verdict_and_a_row_of_each_model_the_best_first(results: list[dict[str, Any]]) -> None:
    result = summary({"results": results}, "weak")
    assert result["verdict"] == verdict({"results": results}, "weak")
    assert result["recall@20"] == 0.1
    assert [row["model"] for row in result["by_model"]] == ["strong <&>", "weak"]
    expected = {"recall@20": 0.1, "mrr@20": 0.1, "low": pytest.approx(0.09), "high": pytest.approx(0.11)}
    assert result["by_model"][1] == {"model": "weak", **expected}


def _text(page: str) -> str:
    """The page without its tags, on one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def _served(model: str, value: float, kind: str = "baseline") -> dict[str, Any]:
    return {**_entry(model, "all", value), "target": "served", "kind": kind}


def _difference(other: str, value: float, margin: float) -> dict[str, Any]:
    labels = {"model": "taste", "other": other, "users": "all", "target": "served", "metric": "recall", "k": 20}
    return {**labels, "difference": value, "low": value - margin, "high": value + margin}


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (_difference("vstan", 0.03, 0.01), "3.0 more than the best baseline, vstan (interval 2.0 to 4.0)."),
        (_difference("vstan", -0.03, 0.01), "3.0 fewer than the best baseline, vstan (interval 2.0 to 4.0)."),
        (_difference("vstan", 0.01, 0.02), "no significant difference from the best baseline, vstan (-1.0 to +3.0)."),
    ],
)
def test_the_verdict_is_the_default_model_against_the_best_baseline(difference: dict[str, Any], expected: str) -> None:
    rows = [_served("popularity", 0.1), _served("vstan", 0.39), _served("taste", 0.42, "network")]
    rows += [_served("hybrid", 0.5, "network")]  # not a baseline
    statistics = {"results": rows, "comparisons": [_difference("popularity", 0.3, 0.01), difference]}
    assert verdict(statistics, "taste") == f"taste finds 42 of 100 next new songs in its first 20: {expected}"
    assert f"<h1>{html.escape(verdict(statistics, 'taste'))}</h1>" in html_page(statistics, default="taste", about={})
    assert verdict({"results": rows[:2]}, "taste") == "vstan finds 39 of 100 next new songs in its first 20."


def test_the_chart_shows_the_five_best_models_and_always_the_default() -> None:
    rows = [_served(f"model-{number}", number / 10) for number in range(1, 9)]
    page = html_page({"results": rows}, default="model-1", about={})
    chart = page[page.index('class="bars"') : page.index("The 4 best of 8 models and model-1 (used by recommend);")]
    assert re.findall(r'class="name">([^<]+)<', chart) == ["model-8", "model-7", "model-6", "model-5", "model-1"]
    widths = [float(width) for width in re.findall(r'class="bar[^"]*" style="width: ([0-9.]+)%', chart)]
    assert widths == pytest.approx([100 * value / 0.81 for value in (0.8, 0.7, 0.6, 0.5, 0.1)], abs=0.01)
    assert "The 5 best of 8 models; the tables" in html_page({"results": rows}, default="model-4", about={})
    assert "best of" not in html_page({"results": rows[:5]}, default="model-1", about={})


def test_a_warning_about_leakage_stands_before_every_figure(results: list[dict[str, Any]]) -> None:
    page = html_page({"results": results}, default="weak", about={"warning": "the song vectors: leak"})
    assert page.index("the song vectors: leak") < page.index('class="bars"')
    assert 'class="warning"' not in html_page({"results": results}, default="weak", about={})


def test_the_calibration_error_of_the_default_model_is_shown(results: list[dict[str, Any]]) -> None:
    entry = {"target": "served", "mean_probability": 0.04, "right": 0.041, "songs": 987}
    errors = [{**entry, "model": "weak", "value": 0.00312}, {**entry, "model": "strong", "value": 0.5}]
    errors.append({**entry, "model": "weak", "value": 0.0021, "target": "next"})
    page = html_page({"results": results, "calibration": errors}, default="weak", about={"split": "abc"})
    assert "expected calibration error of weak as served: 0.0031; all next plays: 0.0021" in _text(page)
    assert "0.5000" not in _text(page)


def test_settings_of_baselines_are_shown(results: list[dict[str, Any]]) -> None:
    settings = [{"model": "vstan", "days_decay": 30.0, "neighbors": 200}]
    page = html_page({"results": results, "settings": settings}, default="weak", about={"split": "abc"})
    assert "settings of vstan days decay: 30; neighbors: 200" in _text(page)


def test_the_page_shows_the_health_of_each_table_of_song_embeddings(results: list[dict[str, Any]]) -> None:
    neighbor_row = {"song": "A <b>", "plays": 1234, "neighbors": ["C", "D & E"], "cosines": [0.91, 0.5]}
    entry = {"coverage": 0.9, "songs_with_vector": 1800, "mean_cosine": 0.123, "directions": 9.26, "dim": 64}
    tables = [{**entry, "vectors": role, "id": "x", "neighbors": [neighbor_row]} for role in ("songs", "models")]
    page = html_page({"results": results, "song_vectors": tables}, default="weak", about={})
    assert page.count("<td>9.3 of 64</td>") == 2
    assert "Neighbors of the most played songs, from the embed stage" in page
    assert "A &lt;b&gt;</th><td>1,234</td><td><div>C (0.91)</div><div>D &amp; E (0.50)</div></td>" in page
    assert "Song embeddings" not in html_page({"results": results}, default="weak", about={})


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(results: list[dict[str, Any]]) -> None:
    plot = Plot(file="x.png", title="X", note="n", alt="<a>", png=PNG)
    examples = [{"last_plays": ["<i>"], "songs": ["S & T"]}]
    statistics = {"results": results, "examples": examples}
    page = html_page(statistics, default="weak", about={"data set": "<b>"}, plots=[plot])
    assert "strong &lt;&amp;&gt;" in page
    assert "<dd>&lt;b&gt;</dd>" in page
    assert "Last played</p>\n<ul><li>&lt;i&gt;</li></ul>" in page
    assert "<li>S &amp; T</li>" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    links = re.findall(r'href="#([^"]+)"', page)
    assert links
    # Every link leads to a chapter, which the browser then opens.
    assert set(links) <= set(re.findall(r'<details><summary>[^<]+</summary><div id="([^"]+)"', page))
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_tables_list_the_best_first_and_mark_the_default(results: list[dict[str, Any]]) -> None:
    page = html_page({"results": results}, default="weak", about={})
    table = page[page.index('id="metrics-next-all-20"') :]
    assert table.index("strong") < table.index("weak<small>")
    assert "1,234 plays of 56 users" in table
    assert "<td>0.4000<small>0.3900 to 0.4100</small></td>" in table


def test_one_group_alone_is_not_shown_twice(results: list[dict[str, Any]]) -> None:
    one_group = [entry for entry in results if entry["users"] in ("all", "seen") and entry["k"] == 20]
    assert "metrics-next-seen" not in html_page({"results": one_group}, default="weak", about={})
    assert "metrics-next-seen" in html_page({"results": results}, default="weak", about={})


def test_every_kind_of_figure_has_its_table(results: list[dict[str, Any]]) -> None:
    interval = {"value": 0.25, "low": 0.2, "high": 0.3}
    labels = {"model": "weak", "kind": "baseline", "target": "next", "metric": "recall", "k": 20}
    difference = {"difference": -0.031, "low": -0.04, "high": -0.02}
    ranks = {"popularity_rank": 3210.4, "popularity_rank_low": 3000.0, "popularity_rank_high": 3400.0}
    repeats = {"repeats": 0.2, "repeats_low": 0.1, "repeats_high": 0.3}
    statistics = {
        "results": [*results, {**_entry("weak", "all", 0.1), "target": "offsets25_50"}],
        "comparisons": [{**labels, "other": "strong <&>", "users": "all", **difference}],
        "retrieval": [{"model": "weak", "retriever": "all", "target": "next", "candidates": 12.34, **interval}],
        "pairwise": [{**labels, "horizon": "short", "negatives": "zipf", **interval, "pairs": 9}],
        "breakdowns": [{**labels, "by": "history", "slice": "5-19", **interval, "plays": 4321}],
        "recommended": [{"model": "weak", "coverage": 0.5, **ranks, **repeats, "lists": 77}],
        "leave_one_out": [_entry("weak", "all", 0.6)],
    }
    page = html_page(statistics, default="weak", about={})
    assert "<td>-0.0310<small>-0.0400 to -0.0200</small></td>" in page
    assert "all together</th><td>12.3</td><td>0.2500" in page
    assert "all next plays, against popular songs" in page
    assert "25 to 50 plays ahead" in page
    assert "5-19: 4,321" in page
    assert "3,210<small>3,000 to 3,400</small>" in page
    assert "0.6000" in page[page.index("Leave one out") :]
    assert "<td>–</td>" in page  # "strong" has no figure for the long term


def test_what_a_model_loses_without_a_part_stands_in_a_table_of_its_own() -> None:
    ablation = {**_served("without sessions", 0.9), "kind": "ablation"}
    rows = [_served("taste", 0.42, "network"), _served("vstan", 0.3), ablation]
    comparisons = [_difference("vstan", 0.12, 0.01), _difference("without sessions", 0.05, 0.01)]
    page = html_page({"results": rows, "comparisons": comparisons}, default="taste", about={})
    assert page.count("without sessions") == 1
    chapter = page[page.index('<div id="ablation"') :]
    assert "+0.0500" in chapter
    assert "+0.1200" not in chapter


def test_a_plot_is_drawn_of_one_curve_or_many_but_not_of_none() -> None:
    many_curves = [_curve(f"average-{discount}") for discount in range(7)]
    many_curves += [_curve("taste", "network"), _curve("taste", "network", "long"), _curve("item-knn")]
    empty_curve = {**_curve("x"), **{name: [] for name in ("offset", "value", "low", "high", "plays")}}
    for curves in (many_curves, many_curves[:1]):
        plot = cosine_plot(curves)
        assert plot is not None
        assert plot.png.startswith(PNG)
    assert cosine_plot([]) is cosine_plot([empty_curve]) is None


def test_a_model_with_two_curves_is_named_with_its_horizon() -> None:
    curves = [_curve("taste", horizon="short"), _curve("taste", horizon="long"), _curve("item-knn")]
    assert [curve_name(curve, curves) for curve in curves] == ["taste, short", "taste, long", "item-knn"]


@pytest.mark.parametrize(
    ("settings", "drawn", "expected"),
    [
        ({}, "users", "means over queries, with 95 % bootstrap intervals over users."),
        ({"confidence": 0.9}, "users", "means over queries, with 90 % bootstrap intervals over users."),
        ({"confidence": 0.999}, "pairs", "means over queries, with 99.9 % bootstrap intervals over pairs."),
        ({"bootstrap_samples": 0}, "users", "means over queries."),
    ],
)
def test_the_page_says_which_intervals_were_computed(settings: dict[str, Any], drawn: str, expected: str) -> None:
    rows = [_served("taste", 0.42, "network"), _served("vstan", 0.3)]
    statistics = {"results": rows, "comparisons": [_difference("vstan", 0.12, 0.01)]}
    page = html_page(statistics, default="taste", about={}, config=EvaluateConfig(**settings), drawn=drawn)
    assert f"Figures are {expected}" in _text(page)
    assert (f"significant (bootstrap over {drawn})" in page) == ("intervals" in expected)


def test_without_samples_no_interval_is_shown_and_the_results_are_kept_as_they_are(workspace: Workspace) -> None:
    ranks = {"popularity_rank": 3210.4, "popularity_rank_low": 3210.4, "popularity_rank_high": 3210.4}
    repeats = {"repeats": 0.2, "repeats_low": 0.2, "repeats_high": 0.2}
    statistics = {
        "results": [
            {**row, "low": row["value"], "high": row["value"]}
            for row in (_served("taste", 0.42, "network"), _served("vstan", 0.3))
        ],
        "comparisons": [_difference("vstan", 0.12, 0)],
        "recommended": [{"model": "taste", "coverage": 0.5, **ranks, **repeats, "lists": 77}],
    }
    config = EvaluateConfig(bootstrap_samples=0)
    write_report(workspace, "reports/r", statistics, default="taste", about={}, config=config)
    stored = workspace.read_json("reports/r/results.json")
    assert {name: stored[name] for name in statistics} == statistics
    page = workspace.read_bytes("reports/r/report.html").decode()
    assert " to 0." not in page
    assert "3,210</td>" in page
    assert '<div class="whisker"' not in page
    report_summary = summary(statistics, "taste", config)
    assert report_summary["verdict"].endswith(": 12.0 more than the best baseline, vstan.")
    assert f"<h1>{report_summary['verdict']}</h1>" in page
    assert report_summary["by_model"][0]["low"] is None


def test_the_note_of_a_plot_mentions_intervals_only_if_the_plot_has_some() -> None:
    curve_without_intervals = {**_curve("weak"), "low": [0.5, 0.4], "high": [0.5, 0.4]}
    for curve, has_intervals in ((_curve("weak"), True), (curve_without_intervals, False)):
        plot = cosine_plot([curve])
        assert plot is not None
        assert ("bootstrap" in plot.note) == has_intervals
