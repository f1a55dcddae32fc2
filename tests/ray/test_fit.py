"""From plays to recommendations on Ray: `rayrec fit` and `rayrec update`, and the Python block of the README."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rings import ring_plays, write_rows

from rayrec_cli.main import main

README = Path(__file__).parents[2] / "README.md"


def test_a_file_is_fitted_and_updated_by_two_commands(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(
        "[import]\nbuckets = 2\n[embed]\ndim = 8\nepochs = 2\n[train]\nhidden_dim = 8\nnegatives = 16\n"
    )
    workspace = ["--workspace", str(tmp_path / "workspace")]

    def run_command(*arguments: str) -> Any:
        assert main([*workspace, "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    plays = write_rows(tmp_path / "plays.csv", ring_plays(range(60)))
    report = run_command("fit", plays, "--epochs", "2", "--settings", str(settings))
    metrics = {(row["model"], row["target"], row["metric"]): row["value"] for row in report["validation"]["results"]}
    assert metrics["two-step", "next", "mrr"] > 0.5
    assert main([*workspace, "fit", plays, "--epochs", "2", "--settings", str(settings)]) == 0
    output = capsys.readouterr().out
    for text in ("skipped", "Validation: recall@20", "Recommended", "Next:", f"recommend --user {report['user']}"):
        assert text in output
    day = write_rows(tmp_path / "day.csv", ring_plays(range(55, 70), plays=9, begin=20, days=1))
    update_report = run_command("update", day)
    assert (update_report["live"], update_report["new_users"], update_report["trained"]) == (True, 10, False)
    assert run_command("status")["active"] == update_report["release"]
    assert len(run_command("recommend", "--user", "u69", "-k", "3")["songs"]) == 3


# Runs `rayrec` with the arguments of the script, and prints how often it starts Ray.
COUNTING_SCRIPT = """
import sys

import ray

from rayrec_cli.main import main

start, starts = ray.init, []


def counted(*arguments, **options):
    starts.append(1)
    return start(*arguments, **options)


ray.init = counted
code = main(sys.argv[1:])
print(f"Ray was started {len(starts)} times", file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_three_thousand_plays_are_fitted_by_one_command_on_one_ray(tmp_path: Path) -> None:
    plays = write_rows(tmp_path / "plays.csv", ring_plays(range(60), plays=50))
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", COUNTING_SCRIPT, "--workspace", str(tmp_path / "workspace"), "--json", "fit", plays],
        capture_output=True,
        text=True,
        timeout=180,
    )
    print(f"rayrec fit of 3,000 plays of 60 users: {time.monotonic() - started:.1f} seconds")
    assert process.returncode == 0, process.stderr
    assert process.stderr.splitlines()[-1] == "Ray was started 1 times"
    report = json.loads(process.stdout)
    assert {stage["status"] for stage in report["stages"]} == {"done"}
    metrics = {(row["model"], row["target"], row["metric"]): row["value"] for row in report["validation"]["results"]}
    assert metrics["two-step", "next", "mrr"] > 0.5


@pytest.mark.slow
def test_the_block_of_the_readme_runs_in_an_empty_folder(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    process = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].split() == ["user_id", "rank", "song_id", "title", "artist", "score"]
    assert len(lines) == 6
    assert (tmp_path / "music-model").is_dir()
    assert "ray" not in process.stderr.lower().replace("rayrec", "")
