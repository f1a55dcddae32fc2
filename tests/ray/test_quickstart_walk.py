"""The commands of the quickstart work unchanged on real plays."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"


def stage_commands() -> list[str]:
    """Return the commands of the block that runs each stage with its own command."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if "rayrec import csv plays.csv" in block)
    return re.findall(r"^\$ (.*)$", block.replace("\\\n", " "), flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quickstart_takes_real_plays_to_a_release(real_data: Path, tmp_path: Path) -> None:
    commands = stage_commands()
    assert len(commands) >= 10
    (tmp_path / "plays.csv").symlink_to(real_data / "30music-sample10" / "sessions_sample_10.csv")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.run(
        ["bash", "-ec", "\n".join(commands)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    for number in ("343,183", "14,262", "9,999"):
        assert number in process.stdout
    assert process.stderr == ""
