"""Flags come from the settings' dataclass, a TOML file lies below them, and bad values are told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from rayrec.config import setting
from rayrec.errors import InputError
from rayrec_cli.options import Call, Globals, command
from rayrec_cli.output import Shown

WHERE = Annotated[str | None, typer.Argument(metavar="WHERE")]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One setting of each kind."""

    where: str = setting(help="required")
    size: int = setting(64, help="how large")
    rate: float | None = setting(None, help="how fast")
    quick: bool = setting(True, help="whether to hurry")
    way: Literal["up", "down"] = setting("up", help="where to")
    cuts: tuple[int, ...] = setting((10, 20), help="where to cut")
    columns: dict[str, str] = setting(None, help="which column is what")


@pytest.fixture
def seen() -> list[tuple[Call, Settings, bool]]:
    return []


@pytest.fixture
def app(seen: list, tmp_path: Path) -> typer.Typer:
    made = typer.Typer(rich_markup_mode=None)

    @made.callback()
    def root(ctx: typer.Context) -> None:
        ctx.obj = Globals(workspace=str(tmp_path / "default"), as_json=False)

    @command(made, "go", config=Settings, example="go there", arguments={"where": WHERE})
    def go(call: Call, config: Settings, *, twice: bool = False) -> Shown:
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
    assert config == Settings(
        where="there", size=3, rate=0.5, quick=False, way="down", cuts=(1, 2, 3), columns={"a": "b", "c": "d"}
    )
    assert twice


def test_what_is_not_given_is_the_default(app: typer.Typer, seen: list) -> None:
    assert invoke(app, "there").exit_code == 0
    assert seen[0][1] == Settings(where="there")


@pytest.mark.parametrize("content", ['[go]\nsize = 5\nway = "down"', 'size = 5\nway = "down"'])
def test_flags_lie_over_the_config_file(
    app: typer.Typer, seen: list, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrec_cli.options.SECTIONS", ("go", "import"))
    file = tmp_path / "settings.toml"
    file.write_text(content)
    result = invoke(app, "there", "--config", str(file), "--size", "7")
    assert result.exit_code == 0, result.output
    assert (seen[0][1].size, seen[0][1].way) == (7, "down")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["there", "--way", "left"], "expected one of up, down"),
        (["there", "--cuts", "1,x"], "--cuts has 'x'"),
        (["there", "--columns", "a"], "--columns has 'a'"),
        (["there", "--config", "none.toml"], "none.toml cannot be read"),
        ([], "where is missing"),
    ],
)
def test_bad_values_are_told(app: typer.Typer, arguments: list[str], said: str) -> None:
    result = invoke(app, *arguments)
    assert isinstance(result.exception, InputError)
    assert said in str(result.exception)


def test_an_unknown_key_of_a_config_file_is_told(app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("speed = 5")
    error = invoke(app, "there", "--config", str(file)).exception
    assert isinstance(error, InputError)
    assert "no setting 'speed'" in str(error)


def test_json_is_one_object_alone_on_stdout(app: typer.Typer) -> None:
    assert invoke(app, "there", "--json").stdout == '{"size": 64}\n'
    assert invoke(app, "there").stdout == "gone\n"


def test_the_workspace_may_follow_the_command(app: typer.Typer, seen: list, tmp_path: Path) -> None:
    invoke(app, "there", "--workspace", str(tmp_path / "other"))
    invoke(app, "there")
    assert [Path(call.workspace.uri).name for call, *_ in seen] == ["other", "default"]


def test_help_names_defaults_choices_and_an_example(app: typer.Typer) -> None:
    told = invoke(app, "--help").stdout
    for part in (
        "How large (64).",
        "--way up|down",
        "Whether to hurry (yes).",
        "--cuts A,B,...",
        "(10,20)",
        "go there",
    ):
        assert part in told
