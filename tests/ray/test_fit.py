"""From plays to recommendations on Ray: the commands as people type them, and the block of the README."""

import json
import re
import subprocess
import sys
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

    def result(*words: str) -> Any:
        assert main([*workspace, "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    plays = write_rows(tmp_path / "plays.csv", ring_plays(range(60)))
    fitted = result("fit", plays, "--epochs", "2", "--settings", str(settings))
    figures = {(row["model"], row["target"], row["metric"]): row["value"] for row in fitted["validation"]["results"]}
    assert figures["two-step", "next", "mrr"] > 0.5
    assert main([*workspace, "fit", plays, "--epochs", "2", "--settings", str(settings)]) == 0
    shown = capsys.readouterr().out
    for text in ("skipped", "Validation: recall@20", "Recommended", "Next:", f"recommend --user {fitted['user']}"):
        assert text in shown
    day = write_rows(tmp_path / "day.csv", ring_plays(range(55, 70), plays=9, begin=20, days=1))
    updated = result("update", day)
    assert (updated["live"], updated["new_users"], updated["trained"]) == (True, 10, False)
    assert result("status")["active"] == updated["release"]
    assert len(result("recommend", "--user", "u69", "-k", "3")["songs"]) == 3


@pytest.mark.slow
def test_the_block_of_the_readme_runs_in_an_empty_folder(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["user_id", "rank", "song_id", "title", "artist", "score"]
    assert len(lines) == 6
    assert (tmp_path / "music-model").is_dir()
    assert "ray" not in done.stderr.lower().replace("rayrec", "")
