"""The report: files that programs and people can read."""

import base64
import re
from typing import Any

import numpy as np
import pytest

from rayrec.errors import DamagedArtifactError
from rayrec.evaluation.figure import LABEL_GAP, cosine_figure, curve_name, spread
from rayrec.evaluation.report import headline, html_page, read_figures, write_report
from rayrec.storage.artifacts import Manifest, publish
from rayrec.storage.workspace import Workspace

PNG = b"\x89PNG\r\n\x1a\n"


def _entry(model: str, users: str, value: float, k: int = 20, metric: str = "recall") -> dict[str, Any]:
    interval = {"value": value, "low": value - 0.01, "high": value + 0.01}
    about = {"model": model, "kind": "baseline", "users": users, "target": "next", "metric": metric, "k": k}
    return {**about, **interval, "plays": 1234, "users_count": 56}


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
    figures = {"results": results, "cosine_by_offset": curves, "pairwise": []}
    names = write_report(workspace, "reports/r", figures, default="taste", about={"split": "abc"})
    assert sorted(names) == ["cosine_by_offset.png", "report.html", "results.json"]
    stored = workspace.read_json("reports/r/results.json")
    assert stored["default"] == "taste"
    assert stored["results"] == results
    assert stored["cosine_by_offset"] == curves
    picture = workspace.read_bytes("reports/r/cosine_by_offset.png")
    assert picture.startswith(PNG)
    assert base64.b64encode(picture).decode() in workspace.read_bytes("reports/r/report.html").decode()


@pytest.mark.parametrize("earlier", [False, True])
def test_what_was_found_is_read_from_the_results_and_no_longer_from_the_manifest(
    workspace: Workspace, results: list[dict[str, Any]], earlier: bool
) -> None:
    """Manifests of earlier reports held the figures too."""
    figures = {"results": results, "cosine_by_offset": [_curve("weak")], "breakdowns": []}
    names = write_report(workspace, "reports/r", figures, default="weak", about={"split": "abc"})
    metrics = {"default": "weak", "plays": 9, **({"results": results} if earlier else {})}
    report = publish(workspace, Manifest(kind="reports", id="r", metrics=metrics), names)
    assert read_figures(workspace, report) == {"default": "weak", "plays": 9, "results": results, "breakdowns": []}
    workspace.write_json("reports/r/results.json", {"default": "weak", "results": []})
    with pytest.raises(DamagedArtifactError, match=r"results.json does not match"):
        read_figures(workspace, report)


def test_the_headline_is_the_next_play_by_what_recommends(results: list[dict[str, Any]]) -> None:
    assert headline({"results": results}, "strong <&>") == {"recall@20": 0.4, "mrr@20": 0.4}
    served = [{**_entry("weak", "all", 0.3, metric=metric), "target": "served"} for metric in ("recall", "mrr")]
    found = headline({"results": [*results, *served]}, "weak")
    assert found == {"served_recall@20": 0.3, "served_mrr@20": 0.3, "recall@20": 0.1, "mrr@20": 0.1}
    assert headline({"results": results}, "taste") == {}


def test_the_page_shows_the_health_of_each_table_of_song_vectors(results: list[dict[str, Any]]) -> None:
    near = {"song": "A <b>", "plays": 1234, "neighbours": ["C", "D & E"], "cosines": [0.91, 0.5]}
    entry = {"coverage": 0.9, "songs_with_vector": 1800, "mean_cosine": 0.123, "directions": 9.26, "dim": 64}
    tables = [{**entry, "vectors": role, "id": "x", "neighbours": [near]} for role in ("songs", "models")]
    page = html_page({"results": results, "song_vectors": tables}, None, default="weak", about={})
    assert page.count("<td>9.3 of 64</td>") == 2
    assert "Neighbours of the most played songs, as embedded" in page
    assert "A &lt;b&gt;</th><td>1,234</td><td><div>C (0.91)<br>D &amp; E (0.50)</div></td>" in page
    assert "song vectors" not in html_page({"results": results}, None, default="weak", about={})


def test_without_curves_there_is_no_figure(workspace: Workspace, results: list[dict[str, Any]]) -> None:
    names = write_report(workspace, "reports/r", {"results": results}, default="taste", about={})
    assert names == ["results.json", "report.html"]


def test_the_page_needs_no_other_file_and_escapes_what_it_shows(results: list[dict[str, Any]]) -> None:
    page = html_page({"results": results}, PNG, default="weak", about={"data set": "<b>"})
    assert "strong &lt;&amp;&gt;" in page
    assert "<dd>&lt;b&gt;</dd>" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page


def test_the_page_lists_the_best_first_and_marks_the_default(results: list[dict[str, Any]]) -> None:
    page = html_page({"results": results}, None, default="weak", about={})
    assert page.index("strong") < page.index("weak<small>")
    assert page.count("<tr class=default>") == 4  # one a table: all, seen and new at 20, all at 10
    assert "1,234 plays of 56 users" in page
    assert "0.4000<small>0.3900 to 0.4100</small>" in page


def test_one_group_alone_is_not_told_twice(results: list[dict[str, Any]]) -> None:
    lone = [entry for entry in results if entry["users"] in ("all", "seen") and entry["k"] == 20]
    assert html_page({"results": lone}, None, default="weak", about={}).count("<table>") == 1


def test_every_kind_of_figure_has_its_table(results: list[dict[str, Any]]) -> None:
    interval = {"value": 0.25, "low": 0.2, "high": 0.3}
    about = {"model": "weak", "kind": "baseline", "target": "next", "metric": "recall", "k": 20}
    difference = {"difference": -0.031, "low": -0.04, "high": -0.02}
    ranks = {"popularity_rank": 3210.4, "popularity_rank_low": 3000.0, "popularity_rank_high": 3400.0}
    repeats = {"repeats": 0.2, "repeats_low": 0.1, "repeats_high": 0.3}
    figures = {
        "results": [*results, {**_entry("weak", "all", 0.1), "target": "offsets25_50"}],
        "comparisons": [{**about, "other": "strong <&>", "users": "all", **difference}],
        "pairwise": [{**about, "horizon": "short", "negatives": "zipf", **interval, "pairs": 9}],
        "breakdowns": [{**about, "by": "history", "slice": "5-19", **interval, "plays": 4321}],
        "recommended": [{"model": "weak", "coverage": 0.5, **ranks, **repeats, "lists": 77}],
        "leave_one_out": [_entry("weak", "all", 0.6)],
    }
    page = html_page(figures, None, default="weak", about={})
    assert "<td>-0.0310<small>-0.0400 to -0.0200</small></td>" in page
    assert "all next plays, against popular songs" in page
    assert "25 to 50 plays ahead" in page
    assert "5-19: 4,321" in page
    assert "3,210<small>3,000 to 3,400</small>" in page
    assert "0.6000" in page[page.index("Leave one out") :]
    assert "<td>–</td>" in page  # strong was not asked for the long term


def test_a_figure_can_be_drawn_of_many_curves_of_one_and_of_none() -> None:
    many = [_curve(f"average-{discount}") for discount in range(7)]
    many += [_curve("taste", "network"), _curve("taste", "network", "long"), _curve("neighbours")]
    nothing = {**_curve("x"), **{name: [] for name in ("offset", "value", "low", "high", "plays")}}
    for curves in (many, many[:1], [], [nothing]):
        assert cosine_figure(curves).startswith(PNG)


def test_a_model_with_two_curves_is_named_with_its_horizon() -> None:
    curves = [_curve("taste", horizon="short"), _curve("taste", horizon="long"), _curve("neighbours")]
    assert [curve_name(curve, curves) for curve in curves] == ["taste, short", "taste, long", "neighbours"]


def test_labels_are_spread_apart_in_their_order() -> None:
    heights = np.array([0.5, 0.51, 0.1, 0.505, 0.9, 0.1])
    spaced = spread(heights, LABEL_GAP)
    assert np.diff(np.sort(spaced)).min() >= LABEL_GAP - 1e-9
    assert (np.argsort(spaced, kind="stable") == np.argsort(heights, kind="stable")).all()
    assert spaced[4] == 0.9
    np.testing.assert_allclose(spaced[[0, 1, 3]].mean(), heights[[0, 1, 3]].mean())
