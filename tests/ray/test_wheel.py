"""`pip install rayrec` without a clone of the repository: the demo runs, and its release can be served."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
KEY = "reader-0123456789"


@contextmanager
def serving(rayrec: Path, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run `rayrec serve` over the workspace `demo` until the block ends; yield its URL."""
    command = [rayrec, "--workspace", "demo", "serve", "--port", "0"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if address := re.search(r"Serving at (http://127\.0\.0\.1:\d+)", line):
                yield address[1]
                break
        else:
            raise AssertionError("".join(said))
    finally:
        process.terminate()  # not SIGINT, which background processes of a script ignore
        assert process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_alone_runs_the_demo_and_serves_it(tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["RAYREC_API_KEYS"] = f"read:{KEY}"
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", ROOT)
    (wheel,) = (tmp_path / "dist").iterdir()
    run(sys.executable, "-m", "venv", "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    installed = run(python, "-m", "pip", "list", "--format", "freeze")
    assert "pytest" not in installed
    rayrec = python.parent / "rayrec"
    assert "two-step" in run(rayrec, "--workspace", "demo", "demo")
    with serving(rayrec, tmp_path, environment) as url:
        body = {"history": ["song-3", "song-50"], "k": 5}
        answer = httpx.post(f"{url}/v1/recommendations", json=body, headers={"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["songs"]) == 5
