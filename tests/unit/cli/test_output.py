"""What people see fits into 80 columns and reads well; what programs see is JSON."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rayrec.jobs.pipeline import Demo
from rayrec.recommend.answer import Answer
from rayrec_cli.main import app
from rayrec_cli.output import Shown, day, figures, number, show, size, table
from rayrec_cli.recommend_commands import results_table


def lines(view: object) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(view)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (343183, "343,183"),
        (0.41234, "0.412"),
        (12.34, "12.3"),
        (74000.6, "74,001"),
        (True, "yes"),
        (None, "–"),
        ("a", "a"),
    ],
)
def test_numbers_are_read_by_people(value: object, read: str) -> None:
    assert number(value) == read


def test_sizes_and_dates_are_read_by_people() -> None:
    assert [size(n) for n in (0, 999, 1500, 2_000_000, 3 * 10**12)] == ["0 B", "999 B", "1.5 kB", "2.0 MB", "3.0 TB"]
    assert day("2015-01-20T18:30:12+00:00") == "2015-01-20 18:30"


def test_numbers_are_right_aligned_and_never_cut() -> None:
    long = "a title that is far too long for a terminal of eighty columns, whatever one does about it"
    told = lines(table("", ["song", "plays", "also"], [[long, 1, long], ["b", 1234567, "c"]], left=["also"]))
    assert all(len(line) <= 80 for line in told)
    assert "…" in told[2]
    assert told[3].index("1,234,567") + len("1,234,567") == told[2].index(" 1 ") + len(" 1")


def test_brackets_in_titles_are_no_markup() -> None:
    assert "Song [red]" in lines(table("", ["song"], [["Song [red]"]]))[2]


def test_figures_leave_lists_and_nothing_out() -> None:
    told = "\n".join(lines(figures("Index", {"seconds": 1.5, "songs_with_vector": 9999, "none": None, "list": [1]})))
    assert "songs with vector  9,999" in told
    assert "none" not in told
    assert "list" not in told


def results(*targets: str) -> dict:
    """Models in one order as served, and in the opposite one by any other target."""
    return {
        "default": "taste",
        "results": [
            {
                "model": model,
                "kind": "baseline",
                "users": users,
                "target": target,
                "metric": metric,
                "k": k,
                "value": value if target == "next" else 0.9 - value,
                "low": value - 0.01,
                "high": value + 0.01,
            }
            for target in targets
            for model, value in (("sequential-rules", 0.3), ("taste", 0.4), ("average-0.25", 0.2))
            for users in ("all", "seen")
            for metric in ("recall", "mrr", "ndcg")
            for k in (10, 20)
        ],
    }


def test_the_results_fit_in_80_columns_the_best_as_served_first() -> None:
    shown = lines(results_table(results("next", "next_repeat", "served", "offsets25_50", "served25_50")))
    assert all(len(line) <= 80 for line in shown)
    in_days = lines(
        results_table(results("served", "next", "next_repeat", "offsets25_50", "days0_28", "served_days0_28"))
    )
    assert all(len(line) <= 80 for line in in_days)
    assert in_days[1].split()[-2:] == ["0-28", "d"]
    assert shown[1].split()[:4] == ["model", "served", "95", "%"]
    assert [line.split()[0] for line in shown[3:]] == ["average-0.25", "sequential-rules", "taste"]
    alone = lines(results_table(results("next")))
    assert [line.split()[0] for line in alone[3:]] == ["taste", "sequential-rules", "average-0.25"]
    assert "0.390–0.410" in alone[3]


def test_results_without_intervals_are_shown_too() -> None:
    data = results("next")
    for row in data["results"]:
        row["low"] = row["high"] = None
    assert "0.400" in lines(results_table(data))[3]


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    show(Shown({"titles": ["Ä – é"], "n": 1}, ["for people"]), as_json=True)
    told = capsys.readouterr()
    assert json.loads(told.out) == {"titles": ["Ä – é"], "n": 1}
    assert told.out.count("\n") == 1
    assert told.err == ""


def test_json_has_null_where_a_number_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    show(Shown({"loss": float("nan"), "rows": [{"low": -float("inf"), "high": 1.5}]}), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [{"low": None, "high": 1.5}]}


def test_the_demo_ends_with_the_address_of_its_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evaluation = {"default": "a", "results": results("served", "next")["results"]}
    shown = Answer(songs=[], at=0, last_plays=[], plays=0)
    ended = Demo(outcomes=[], evaluation=evaluation, report="report.html", user="ann", answer=shown)
    monkeypatch.setattr("rayrec.jobs.pipeline.demo", lambda *args, **options: ended)
    workspace = str(tmp_path / "my demo")
    told = CliRunner().invoke(app, ["--workspace", workspace, "demo"]).output.split()
    expected = f"Page: run `rayrec --workspace '{workspace}' serve` and open http://127.0.0.1:8000/"
    assert " ".join(told).endswith(expected)
