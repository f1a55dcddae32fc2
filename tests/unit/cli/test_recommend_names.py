"""`rayrec recommend` and the HTTP API use the same names for flags, fields of requests and fields of songs."""

import dataclasses

import pytest
import typer
from typer.testing import CliRunner

from rayrec.recommend.answer import ScoredSong
from rayrec.serving.schemas import RecommendationsRequest, RecommendedSong
from rayrec_cli.main import app

HTTP_ONLY = {"history", "cursor"}  # the command has --songs instead, and no further pages


def test_each_field_of_a_request_is_a_flag() -> None:
    command = typer.main.get_command(app).commands["recommend"]  # type: ignore[attr-defined]
    flags = {flag.split("/")[0].removeprefix("--") for parameter in command.params for flag in parameter.opts}
    expected = set(RecommendationsRequest.model_fields) - HTTP_ONLY - {"user_id"}
    assert {name.replace("_", "-") for name in expected} | {"user"} <= flags


def test_songs_have_the_same_fields() -> None:
    assert {field.name for field in dataclasses.fields(ScoredSong)} == set(RecommendedSong.model_fields)


@pytest.mark.parametrize("flags", [["--market", "SE"], ["--artists", "Abba"], ["--explain"], ["--user", "ann"]])
def test_filters_are_not_ignored_where_all_users_are_requested(flags: list[str]) -> None:
    result = CliRunner().invoke(app, ["recommend", "--all", *flags])
    assert result.exit_code != 0
    assert f"leave out {flags[0]}" in str(result.exception) + result.output
