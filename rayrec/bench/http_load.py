"""Load over HTTP: a number of clients, each sending its next request when the last is answered.

wrk makes it where it is installed, since a client in Python would be slower than what it measures; else httpx.
"""

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from rayrec.errors import RayrecError

THREADS = 2  # of wrk, where that many clients are there to share
GRACE_SECONDS = 60.0  # before a load generator that does not end is ended

SCRIPT = """
local bodies, place = {}, 0
function init(arguments)
  for line in io.lines(arguments[1]) do bodies[#bodies + 1] = line end
  place = math.random(0, #bodies)
  wrk.headers["Content-Type"] = "application/json"
end
function request()
  if #bodies == 0 then return wrk.format("GET") end
  place = place % #bodies + 1
  return wrk.format("POST", nil, nil, bodies[place])
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\n{"answered":%d,"seconds":%.6f,"p50_ms":%.4f,"p99_ms":%.4f,"errors":%d}\\n', summary.requests,
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a load found."""

    answered: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int  # connections that failed, timeouts, and answers of 400 and more

    @property
    def per_second(self) -> float:
        """Requests answered a second, errors among them left out."""
        return max(0, self.answered - self.errors) / max(self.seconds, 1e-9)


def generator() -> str:
    """The name of the load generator that is used."""
    return "wrk" if shutil.which("wrk") else "httpx"


def put_under_load(url: str, bodies: Sequence[dict[str, Any]], clients: int, seconds: float) -> Load:
    """POST the bodies in turn, or GET where there are none, from `clients` connections for some seconds."""
    if generator() == "wrk":
        return _wrk(url, bodies, clients, seconds)
    return asyncio.run(_httpx(url, bodies, clients, seconds))


def _wrk(url: str, bodies: Sequence[dict[str, Any]], clients: int, seconds: float) -> Load:
    with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        script, lines = Path(folder) / "load.lua", Path(folder) / "bodies"
        script.write_text(SCRIPT)
        lines.write_text("".join(json.dumps(body) + "\n" for body in bodies))
        command = ["wrk", "--threads", str(min(THREADS, clients)), "--connections", str(clients), "--timeout", "30s"]
        command += ["--duration", f"{max(1, round(seconds))}s", "--script", str(script), url, "--", str(lines)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds + GRACE_SECONDS, check=False)
    if ended.returncode:
        raise RayrecError(f"wrk failed on {url}: {(ended.stderr or ended.stdout).strip()[:300]}")
    return Load(**json.loads(ended.stdout.strip().splitlines()[-1]))


async def _httpx(url: str, bodies: Sequence[dict[str, Any]], clients: int, seconds: float) -> Load:
    import httpx

    contents, turn = [json.dumps(body).encode() for body in bodies], count()
    took: list[float] = []
    errors, begin = 0, time.perf_counter()

    async def client(connection: httpx.AsyncClient) -> None:
        nonlocal errors
        while (began := time.perf_counter()) < begin + seconds:
            content = contents[next(turn) % len(contents)] if contents else None
            try:
                response = await connection.request(
                    "POST" if contents else "GET", url, content=content, headers={"Content-Type": "application/json"}
                )
                errors += response.status_code >= 400
            except httpx.HTTPError:
                errors += 1
            took.append(time.perf_counter() - began)

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(limits=limits, timeout=30, trust_env=False) as connection:
        await asyncio.gather(*(client(connection) for _ in range(clients)))
    p50, p99 = np.percentile(took, [50, 99]) * 1e3
    seconds = time.perf_counter() - begin
    return Load(answered=len(took), seconds=seconds, p50_ms=float(p50), p99_ms=float(p99), errors=errors)
