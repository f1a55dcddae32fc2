"""The README's walk-through on real plays works as it is written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def walk() -> list[str]:
    """The commands of the walk-through, continuation lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if "$RAYREC_REAL_DATA" in block)
    return re.findall(r"^\$ (.*)$", block.replace("\\\n", " "), flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_walk_through_takes_real_plays_to_recommendations(real_data: Path, tmp_path: Path) -> None:
    commands = walk()
    assert len(commands) >= 8
    environment = os.environ | {
        "RAYREC_REAL_DATA": str(real_data),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAYREC_WORKSPACE", None)
    done = subprocess.run(
        ["bash", "-ec", "\n".join(commands)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for figure in ("343,183", "14,262", "9,999"):
        assert figure in done.stdout
    assert done.stderr == ""
