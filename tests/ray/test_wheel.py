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
def running_server(rayrec: Path, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run `rayrec serve` over the workspace `demo` until the block ends; yield its URL."""
    command = [rayrec, "--workspace", "demo", "serve", "--port", "0"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if address := re.search(r"Serving at (http://127\.0\.0\.1:\d+)", line):
                yield address[1]
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        process.terminate()  # not SIGINT, which background processes of a script ignore
        assert process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_alone_runs_the_demo_and_serves_it(tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["RAYREC_API_KEYS"] = f"read:{KEY}"
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", ROOT)
    (wheel,) = (tmp_path / "dist").iterdir()
    run(sys.executable, "-m", "venv", "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    packages = run(python, "-m", "pip", "list", "--format", "freeze")
    assert "pytest" not in packages
    rayrec = python.parent / "rayrec"
    assert "two-step" in run(rayrec, "--workspace", "demo", "demo")
    with running_server(rayrec, tmp_path, environment) as url:
        body = {"history": ["song-3", "song-50"], "k": 5}
        answer = httpx.post(
            f"{url}/v1/recommendations", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["songs"]) == 5
