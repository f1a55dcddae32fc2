"""Flags come from the fields of the settings and override a TOML file; a bad value is one clear error."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field, PositiveInt
from typer.testing import CliRunner

from rayrec.config import Settings
from rayrec.errors import InputError
from rayrec_cli.app import Call, Globals, command
from rayrec_cli.output import Shown

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
    made = typer.Typer(name="rayrec", rich_markup_mode=None)

    @made.callback()
    def root(ctx: typer.Context) -> None:
        ctx.obj = Globals(workspace=str(tmp_path / "default"), as_json=False)

    @command(made, "go", config=Sample, example="go there", arguments={"where": WHERE})
    def go(call: Call, config: Sample, *, twice: bool = False) -> Shown:
        """Go."""
        print("a library says something")
        seen.append((call, config, twice))
        return Shown({"size": config.size}, ["gone"])

    return made


def invoke(app: typer.Typer, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["go", *arguments])


def test_every_kind_of_setting_has_a_flag(app: typer.Typer, seen: list) -> None:
    flags = "--size 3 --rate 0.5 --no-quick --way down --cuts 1,2,3 --columns a=b,c=d --twice"
    result = invoke(app, "there", *flags.split())
    assert result.exit_code == 0, result.output
    [(_, config, twice)] = seen
    assert config == Sample(
        where="there", size=3, rate=0.5, quick=False, way="down", cuts=(1, 2, 3), columns={"a": "b", "c": "d"}
    )
    assert twice


def test_what_is_not_given_is_the_default(app: typer.Typer, seen: list) -> None:
    assert invoke(app, "there").exit_code == 0
    assert seen[0][1] == Sample(where="there")


@pytest.mark.parametrize("content", ['[go]\nsize = 5\nway = "down"', 'size = 5\nway = "down"'])
def test_flags_lie_over_the_config_file(
    app: typer.Typer, seen: list, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrec_cli.app.SECTIONS", ("go", "import"))
    file = tmp_path / "settings.toml"
    file.write_text(content)
    result = invoke(app, "there", "--config", str(file), "--size", "7")
    assert result.exit_code == 0, result.output
    assert (seen[0][1].size, seen[0][1].way) == (7, "down")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["there", "--way", "left"], "way is 'left'; expected one of up, down"),
        (["there", "--size", "0"], "size is 0; expected an integer of at least 1"),
        (["there", "--cuts", "1,x"], "--cuts is '1,x'; expected a list of integers, each above 0, separated by commas"),
        (["there", "--columns", "a"], "--columns is 'a'; expected name = value pairs, separated by commas"),
        (["there", "--config", "none.toml"], "none.toml cannot be read"),
        ([], "Missing argument WHERE; see rayrec go --help"),
    ],
)
def test_a_bad_value_is_an_error_with_what_was_expected(app: typer.Typer, arguments: list[str], said: str) -> None:
    result = invoke(app, *arguments)
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)


def test_an_unknown_key_of_a_config_file_is_an_error(app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("speed = 5")
    error = invoke(app, "there", "--config", str(file)).exception
    assert isinstance(error, InputError)
    assert "unknown setting 'speed'" in str(error)


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
