"""Measured rates of the stages in a file, for whoever plans how long a job takes.

The file is JSON: `rates` (name -> work a second on one CPU), `machine` (what they were measured on)
and `commit` (of the last measurement; null where rayrec is not a checkout). Each benchmark that is
saved to it brings its own rates and leaves the others.
"""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

import rayrec
from rayrec.errors import InputError

GIB = 1 << 30
CPU_NAMES = Path("/proc/cpuinfo")
# benchmark -> the rate that its `per_second` is, over the workers that it ran
RATE_OF = {
    "train": "train_plays_per_second_per_cpu",
    "taste": "taste_plays_per_second_per_cpu",
    "embed": "embed_tokens_per_second_per_cpu",
}


def rates_of(told: dict[str, Any]) -> dict[str, float]:
    """The rates in what a benchmark told: its own `rates`, or its work a second; empty for index and memory."""
    if "rates" in told:
        return dict(told["rates"])
    name = RATE_OF.get(told["name"])
    return {name: told["per_second"] / told.get("workers", 1)} if name else {}


def check_rates_file(path: str | Path) -> None:
    """Raise `InputError` for a file that `save_rates` would refuse: before hours of measuring."""
    _read(Path(path))


def save_rates(path: str | Path, told: dict[str, Any]) -> None:
    """Merge the rates of what a benchmark told into the file, which is made where there is none.

    Raises `InputError` for a file that is none of ours or holds rates of another machine.
    """
    target = Path(path)
    rates = {**_read(target), **rates_of(told)}
    content = {"rates": dict(sorted(rates.items())), "machine": machine(), "commit": commit()}
    written = target.with_name(f".{target.name}.{os.getpid()}")
    written.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    written.replace(target)


def machine() -> dict[str, Any]:
    """This machine: cpus, cpu (its name), memory_gib and system."""
    names = CPU_NAMES.read_text(encoding="utf-8").splitlines() if CPU_NAMES.exists() else []
    named = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]
    return {
        "cpus": os.cpu_count(),
        "cpu": named[0] if named else platform.processor(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """The short commit of the checkout that rayrec runs from; None where it is none, or git is not there."""
    words = ["git", "-C", str(Path(rayrec.__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(path: Path) -> dict[str, float]:
    """The rates that are there."""
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: folder {path.parent} does not exist")
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rates, where = dict(content["rates"]), dict(content["machine"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a rates file; pass another file to --save") from error
    if where != machine():
        raise InputError(f"{path} holds rates of another machine ({where}); pass another file to --save")
    return rates
