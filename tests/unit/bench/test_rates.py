"""Measured rates in a file: merged, of one machine, never half of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayrec.bench.rates import check_rates_file, commit, machine, rates_of, save_rates
from rayrec.errors import InputError

TRAIN = {"name": "train", "per_second": 80_000.0}
EMBED = {"name": "embed", "per_second": 1_000_000.0, "workers": 2}
SCALE = {"name": "scale", "per_second": 1.0, "rates": {"import_plays_per_second_per_cpu": 5.0}}


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        (TRAIN, {"train_plays_per_second_per_cpu": 80_000.0}),
        (EMBED, {"embed_tokens_per_second_per_cpu": 500_000.0}),
        ({"name": "taste", "per_second": 7.0}, {"taste_plays_per_second_per_cpu": 7.0}),
        (SCALE, {"import_plays_per_second_per_cpu": 5.0}),
        ({"name": "index", "per_second": 9.0}, {}),
    ],
)
def test_a_benchmark_tells_its_rates_for_one_cpu(told: dict[str, Any], wanted: dict[str, float]) -> None:
    assert rates_of(told) == wanted


def test_each_benchmark_brings_its_own_rates_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    for told in (TRAIN, EMBED, {**TRAIN, "per_second": 90_000.0}):
        save_rates(path, told)
    found = json.loads(path.read_text())
    assert found["rates"] == {
        "embed_tokens_per_second_per_cpu": 500_000.0,
        "train_plays_per_second_per_cpu": 90_000.0,
    }
    assert found["machine"] == machine()
    assert found["commit"] == commit()
    assert [file.name for file in tmp_path.iterdir()] == ["rates.json"]


def test_the_machine_is_described() -> None:
    found = machine()
    assert found["cpus"] >= 1
    assert found["memory_gib"] > 0
    assert found["cpu"]
    assert found["system"]


def test_rates_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    save_rates(path, TRAIN)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "machine": {"cpus": 96}}))
    for refused in (lambda: save_rates(path, EMBED), lambda: check_rates_file(path)):
        with pytest.raises(InputError, match=r"rates of another machine .*96.*pass another file"):
            refused()


@pytest.mark.parametrize("text", ["", "[]", '{"rates": 3, "machine": {}}', '{"plays": 1}'])
def test_a_file_of_something_else_is_never_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(InputError, match="is not a rates file"):
        save_rates(path, TRAIN)
    assert path.read_text() == text


def test_a_folder_that_is_not_there_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written: folder .*absent does not exist"):
        check_rates_file(tmp_path / "absent" / "rates.json")
