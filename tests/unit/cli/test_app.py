"""Flags are made from settings and override a TOML file; output is text of 80 columns for people, or JSON."""

import io
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field, PositiveInt
from rich.console import Console
from typer.testing import CliRunner

from rayrec.config import Settings
from rayrec.errors import InputError
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.jobs.pipeline import Demo
from rayrec.recommend.answer import Answer
from rayrec_cli.app import (
    Call,
    CommandOutput,
    Globals,
    command,
    day,
    note,
    number,
    short,
    show,
    size,
    table,
    values_view,
)
from rayrec_cli.cluster_commands import answer_stages
from rayrec_cli.main import app as commands
from rayrec_cli.recommend_commands import results_table, score_notes

WHERE = Annotated[str | None, typer.Argument(metavar="WHERE")]


class Sample(Settings):
    """One setting of each kind."""

    where: str = Field(description="Required")
    size: int = Field(64, ge=1, description="Size in songs")
    rate: float | None = Field(None, description="Learning rate")
    quick: bool = Field(True, description="Use the quick way")
    way: Literal["up", "down"] = Field("up", description="Direction")
    cuts: tuple[PositiveInt, ...] = Field((10, 20), description="Cutoffs")
    columns: dict[str, str] = Field({}, description="Column of each role")


@pytest.fixture
def seen() -> list[tuple[Call, Sample, bool]]:
    return []


@pytest.fixture
def app(seen: list, tmp_path: Path) -> typer.Typer:
    typer_app = typer.Typer(name="rayrec", rich_markup_mode=None)

    @typer_app.callback()
    def root(ctx: typer.Context) -> None:
        ctx.obj = Globals(workspace=str(tmp_path / "default"), as_json=False)

    @command(typer_app, "go", config=Sample, example="go there", arguments={"where": WHERE})
    def go(call: Call, config: Sample, *, twice: bool = False) -> CommandOutput:
        """Go."""
        print("a library says something")
        seen.append((call, config, twice))
        return CommandOutput({"size": config.size}, ["gone"])

    return typer_app


def invoke(app: typer.Typer, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["go", *arguments])


def test_every_kind_of_setting_has_a_flag(app: typer.Typer, seen: list) -> None:
    flags = "--size 3 --rate 0.5 --no-quick --way down --cuts 1,2,3 --columns a=b,c= --twice"
    result = invoke(app, "there", *flags.split())
    assert result.exit_code == 0, result.output
    [(_, config, twice)] = seen
    assert config == Sample(
        where="there", size=3, rate=0.5, quick=False, way="down", cuts=(1, 2, 3), columns={"a": "b", "c": ""}
    )
    assert twice


def test_settings_without_a_flag_have_their_defaults(app: typer.Typer, seen: list) -> None:
    assert invoke(app, "there").exit_code == 0
    assert seen[0][1] == Sample(where="there")


@pytest.mark.parametrize("content", ['[go]\nsize = 5\nway = "down"', 'size = 5\nway = "down"'])
def test_flags_override_the_config_file(app: typer.Typer, seen: list, tmp_path: Path, content: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(content)
    result = invoke(app, "there", "--config", str(file), "--size", "7")
    assert result.exit_code == 0, result.output
    assert (seen[0][1].size, seen[0][1].way) == (7, "down")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["there", "--way", "left"], "way is 'left'; expected one of up, down"),
        (["there", "--size", "0"], "size is 0; expected an integer of at least 1"),
        (["there", "--cuts", "1,x"], "--cuts is '1,x'; expected a list of integers, each above 0, separated by commas"),
        (["there", "--columns", "a"], "--columns is 'a'; expected name = value pairs, separated by commas"),
        (["there", "--config", "none.toml"], "none.toml cannot be read"),
        ([], "Missing argument WHERE; see rayrec go --help"),
    ],
)
def test_a_bad_value_is_an_error_with_what_was_expected(app: typer.Typer, arguments: list[str], message: str) -> None:
    result = invoke(app, *arguments)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_an_unknown_key_of_a_config_file_is_an_error(app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("speed = 5")
    error = invoke(app, "there", "--config", str(file)).exception
    assert isinstance(error, InputError)
    assert "unknown setting 'speed'" in str(error)


@pytest.fixture
def many(seen: list) -> typer.Typer:
    """Two commands with settings, one without, and a group."""
    typer_app, group = typer.Typer(name="rayrec", rich_markup_mode=None), typer.Typer()

    @typer_app.callback()
    def root(ctx: typer.Context) -> None:
        ctx.obj = Globals(workspace="", as_json=False)

    class Other(Settings):
        """Settings, one of them named like a command and one like a group."""

        go: bool = Field(False, description="Go there first")
        group: Sample | None = Field(None, description="A section")

    def body(call: Call, config: Any) -> CommandOutput:
        """Do it."""
        seen.append(config)
        return CommandOutput({})

    command(typer_app, "go", config=Sample, example="go there", arguments={"where": WHERE})(body)
    command(typer_app, "other", config=Other, example="other")(body)
    command(group, "within", config=Sample, example="within")(body)
    command(typer_app, "size", example="size")(lambda call: CommandOutput({}))
    typer_app.add_typer(group, name="group")
    return typer_app


@pytest.mark.parametrize(
    ("words", "content", "expected"),
    [
        ("go there", "[go]\nsize = 5\n[other]\ngo = true\n[group.within]\nsize = 6", {"size": 5}),
        ("group within", "[go]\nsize = 5\n[group.within]\nwhere = 'x'\nsize = 6", {"size": 6}),
        ("go there", "size = 5", {"size": 5}),  # a command without settings has no section
        ("other", "go = true", {"go": True}),
        ("other", "[go]\nsize = 5", {"go": False}),
        ("other", "[other]\n[group.within]\nsize = 5", {"group": None}),
        ("other", "[group]\nwhere = 'x'", {"group": Sample(where="x")}),
        ("group within --where x", "[go]\nsize = 5\n[group]\nwithin = false", {"size": 64}),  # a setting, no section
    ],
)
def test_a_config_file_may_have_a_section_for_every_command_with_settings(
    many: typer.Typer, seen: list, tmp_path: Path, words: str, content: str, expected: dict[str, Any]
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(content)
    result = CliRunner().invoke(many, [*words.split(), "--config", str(file)])
    assert result.exit_code == 0, (result.output, result.exception)
    assert {name: getattr(seen[0], name) for name in expected} == expected


def test_json_is_one_object_alone_on_stdout(app: typer.Typer) -> None:
    assert invoke(app, "there", "--json").stdout == '{"size": 64}\n'
    assert invoke(app, "there").stdout == "gone\n"


def test_the_workspace_may_follow_the_command(app: typer.Typer, seen: list, tmp_path: Path) -> None:
    invoke(app, "there", "--workspace", str(tmp_path / "other"))
    invoke(app, "there")
    assert [Path(call.workspace.uri).name for call, *_ in seen] == ["other", "default"]


def test_help_names_defaults_choices_and_an_example(app: typer.Typer) -> None:
    text = " ".join(invoke(app, "--help").stdout.split())
    for part in (
        "Size in songs. [default: 64]",
        "Learning rate. ",
        "--way up|down",
        "Use the quick way. [default: yes]",
        "--cuts A,B,...",
        "[default: 10,20]",
        "go there",
    ):
        assert part in text


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
def test_numbers_are_formatted_for_people(value: object, read: str) -> None:
    assert number(value) == read


def test_sizes_and_dates_are_formatted_for_people() -> None:
    assert [size(n) for n in (0, 999, 1500, 2_000_000, 3 * 10**12)] == ["0 B", "999 B", "1.5 kB", "2.0 MB", "3.0 TB"]
    assert day("2015-01-20T18:30:12+00:00") == "2015-01-20 18:30"


def test_numbers_are_right_aligned_and_never_cut() -> None:
    long_text = "a title that is far too long for a terminal of eighty columns, whatever one does about it"
    rows = lines(table("", ["song", "plays", "also"], [[long_text, 1, long_text], ["b", 1234567, "c"]], left=["also"]))
    assert all(len(line) <= 80 for line in rows)
    assert "…" in rows[2]
    assert rows[3].index("1,234,567") + len("1,234,567") == rows[2].index(" 1 ") + len(" 1")


def test_a_table_of_numbers_that_is_wider_than_the_terminal_is_printed_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    varied_settings = ["train.hidden_dim", "train.learning_rate", "train.negatives", "embed.dim"]
    headers = ["trial", *varied_settings, "ndcg@20", "epochs", "seconds"]
    rows = [[11, "512", "0.00125", "4096", "256", 0.12345, 37, 54321.0], [2, "64", "0.01", "8", "32", 0.1, 5, 9.5]]
    show(CommandOutput({}, [table("Trials, best first", headers, rows)]), as_json=False)
    _, header_line, _, *row_lines = capsys.readouterr().out.splitlines()
    assert header_line.split() == headers
    assert [line.split() for line in row_lines] == [
        ["11", "512", "0.00125", "4096", "256", "0.123", "37", "54,321"],
        ["2", "64", "0.01", "8", "32", "0.100", "5", "9.500"],
    ]
    texts = [["a long text", *"abcdefg"]]
    show(CommandOutput({}, [table("", headers, texts, left=["train.negatives"])]), as_json=False)
    assert capsys.readouterr().out.splitlines()[0].split() == headers


def test_brackets_in_titles_are_no_markup() -> None:
    assert "Song [red]" in lines(table("", ["song"], [["Song [red]"]]))[2]


def test_a_table_of_values_omits_lists_and_missing_values() -> None:
    output = "\n".join(
        lines(values_view("Index", {"seconds": 1.5, "songs_with_vector": 9999, "none": None, "list": [1]}))
    )
    assert "songs with vector  9,999" in output
    assert "none" not in output
    assert "list" not in output


def test_a_long_value_is_wrapped_and_no_label_is_cut() -> None:
    folder = "s3://music/" + "recommendations/" * 8
    rows = lines(values_view("", {"folder_of_the_answers": folder, "users": 1234}))
    assert all(len(line) <= 80 for line in rows)
    assert rows[0].startswith("  folder of the answers")
    assert "".join(line.removeprefix("  folder of the answers").strip() for line in rows[:-1]) == folder
    assert rows[-1].split() == ["users", "1,234"]


def test_a_text_of_any_length_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    command_line = "rayrec import csv " + "folder/" * 20 + "plays.csv --columns user=user_id,song=song_id"
    show(CommandOutput({}, [command_line]), as_json=False)
    assert capsys.readouterr().out == f"{command_line}\n"


def test_a_note_of_any_length_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = "the job keeps running; follow it with: rayrec submit --attach " + "raysubmit_[x]" * 20
    note(text)
    assert capsys.readouterr().err == f"{text}\n"


def test_the_stages_of_an_answer_fit_in_80_columns_for_three_catalogs() -> None:
    stage_metrics = {"cpu_ms": 123.4, "bytes": 12_345_678}
    catalogs = [
        {"songs": songs, "stages": {"network": stage_metrics, "features of candidates": stage_metrics}}
        for songs in (10_000, 1_000_000, 10_000_000)
    ]
    [view] = answer_stages({"catalogs": catalogs})
    rows = lines(view)
    assert all(len(line) <= 80 for line in rows)
    text = "\n".join(rows)
    assert all(part in text for part in ("network", "features of candidates", "10 k", "1 M", "10 M"))
    assert [short(count) for count in (500, 1500, 2_000, 1_500_000)] == ["500", "1,500", "2 k", "1,500 k"]


def test_the_values_of_a_benchmark_include_nested_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    result = {
        "users": [100, 400],
        "speedups": {"train": 1.42, "taste": None},
        "memory": {"peaks_mb": [{"driver": 310.5}, {"driver": 312.0}]},
        "check": {"stages": ["import", "taste"], "measured_seconds": 30.5, "ratio": 0.912},
    }
    monkeypatch.setattr("rayrec.bench.suite.bench", lambda *arguments, **options: result)
    output = CliRunner().invoke(commands, ["bench", "scale"]).output.splitlines()
    assert [" ".join(line.split()) for line in output] == [
        "bench scale",
        "users 100, 400",
        "speedups train 1.420",
        "memory peaks mb 1 driver 310.5",
        "memory peaks mb 2 driver 312.0",
        "check stages import, taste",
        "check measured seconds 30.5",
        "check ratio 0.912",
    ]


def results(*targets: str) -> dict:
    """Return results whose models have one order by the target `next` and the opposite order by all other targets."""
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


def test_the_results_fit_in_80_columns_with_the_best_served_model_first() -> None:
    rows = lines(results_table(results("next", "next_repeat", "served", "offsets25_50", "served25_50")))
    assert all(len(line) <= 80 for line in rows)
    day_rows = lines(
        results_table(results("served", "next", "next_repeat", "offsets25_50", "days0_28", "served_days0_28"))
    )
    assert all(len(line) <= 80 for line in day_rows)
    assert day_rows[1].split()[-2:] == ["0-28", "d"]
    assert rows[1].split()[:4] == ["model", "served", "95", "%"]
    assert [line.split()[0] for line in rows[3:]] == ["average-0.25", "sequential-rules", "taste"]
    next_rows = lines(results_table(results("next")))
    assert [line.split()[0] for line in next_rows[3:]] == ["taste", "sequential-rules", "average-0.25"]
    assert "0.390–0.410" in next_rows[3]


def test_a_result_without_an_interval_has_a_dash_in_its_place() -> None:
    data = results("next")
    for row in data["results"]:
        row["low"] = row["high"] = None
    assert lines(results_table(data))[3].split()[-3:-1] == ["0.400", "–"]


def test_the_results_are_headed_by_the_confidence_of_their_intervals_and_have_no_column_without_any() -> None:
    data = results("served", "next")
    headers = [
        lines(results_table(data, config))[1].split()
        for config in (EvaluateConfig(confidence=0.9), EvaluateConfig(bootstrap_samples=0))
    ]
    assert headers == [["model", "served", "90", "%", "MRR", "all", "MRR"], ["model", "served", "MRR", "all", "MRR"]]


def test_settings_of_each_baseline_and_the_calibration_error_of_the_default_fit_in_80_columns() -> None:
    vstan = {"days_decay": 1825.0, "plays_decay": 4.0, "distance_decay": 20.0, "neighbors": 500, "just_played": 0.25}
    error = {"model": "two-step", "value": 0.00312, "mean_probability": 0.04, "right": 0.041, "songs": 900}
    data = {
        "default": "two-step",
        "settings": [{"model": "vstan", **vstan}, {"model": "sequential-rules", "decay": 0.5}],
        "calibration": [
            {**error, "target": "served"},
            {**error, "target": "next", "value": 0.0021},
            {**error, "target": "next", "model": "without sessions"},
        ],
    }
    errors, settings = score_notes(data)
    assert errors == "Expected calibration error of two-step: served 0.003, all 0.002"
    rows = settings.splitlines()
    assert all(len(line) <= 80 for line in rows)
    assert " ".join(settings.split()) == (
        "Settings of the baselines vstan: days decay: 1825; plays decay: 4; distance decay: 20; neighbors: 500; "
        "just played: 0.25 sequential-rules: decay: 0.5"
    )
    assert rows[-1] == "  sequential-rules: decay: 0.5"
    assert score_notes({"default": "two-step", "settings": []}) == []


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    show(CommandOutput({"titles": ["Ä – é"], "n": 1}, ["for people"]), as_json=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"titles": ["Ä – é"], "n": 1}
    assert captured.out.count("\n") == 1
    assert captured.err == ""


def test_json_has_null_where_a_number_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    show(CommandOutput({"loss": float("nan"), "rows": [{"low": -float("inf"), "high": 1.5}]}), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [{"low": None, "high": 1.5}]}


def test_the_demo_ends_with_the_address_of_its_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    evaluation = {"default": "a", "results": results("served", "next")["results"]}
    answer = Answer(release="r", at=0, source="taste", path="exact", plays=0, songs=[], last_plays=[])
    demo = Demo(outcomes=[], evaluation=evaluation, report="report.html", user="ann", answer=answer)
    monkeypatch.setattr("rayrec.jobs.pipeline.demo", lambda *args, **options: demo)
    workspace = str(tmp_path / "my demo")
    words = CliRunner().invoke(commands, ["--workspace", workspace, "demo"]).output.split()
    expected = f"Page: run `rayrec --workspace '{workspace}' serve` and open http://127.0.0.1:8000/"
    assert " ".join(words).endswith(expected)
