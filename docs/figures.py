"""Measure the tables of README.md and docs/evaluation.md again: python docs/figures.py; `make figures` runs it.

RAYREC_REAL_DATA names the folder that holds the data sets. A table whose data are not there stays as it is. The
workspaces are in build/figures, so a second run repeats only what changed.
"""

import difflib
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "evaluation.md")
K = 20


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A table and the commands that its figures come from, each after `rayrec --workspace FOLDER`."""

    name: str  # as the mark in the page spells it
    data: str  # in the folder RAYREC_REAL_DATA
    models: tuple[str, ...]
    commands: tuple[str, ...]  # the last one prints the figures; {data} stands for the path of the data
    seeds: tuple[int, ...] = (0, 1, 2)  # all commands run for each, in a workspace of its own; {seed} stands for it


TABLES = (
    Figures(
        name="30music",
        data="30music-sample10/sessions_sample_10.csv",
        models=("two-step", "vstan", "taste", "sequential-rules"),
        commands=(
            "import csv {data} --columns user=user_id,song=song_id,played_at=ts",
            "split --test-days 30 --validation-days 28",
            *("embed --seed {seed}", "train --seed {seed}", "retrieval", "rank --seed {seed}"),
            "evaluate --models two-step,vstan,taste,sequential-rules",
        ),
    ),
)
# Title, target and metric of each column.
COLUMNS = (
    ("served recall@20", "served", "recall"),
    ("MRR@20", "served", "mrr"),
    ("all recall@20", "next", "recall"),
    ("MRR@20", "next", "mrr"),
    ("repeats recall@20", "next_repeat", "recall"),
)


def measure(figures: Figures, data: Path, seed: int) -> list[dict[str, Any]]:
    """Run the commands; the results of the evaluation."""
    workspace = ROOT / "build" / "figures" / f"{figures.name}-{seed}"
    printed = ""
    for command in figures.commands:
        words = [word.format(data=data, seed=seed) for word in command.split()]
        print("rayrec", *words, file=sys.stderr)
        call = [sys.executable, "-m", "rayrec_cli.main", "--workspace", str(workspace), "--json", *words]
        printed = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
    results: list[dict[str, Any]] = json.loads(printed)["results"]
    return results


def markdown_table(runs: Sequence[Sequence[dict[str, Any]]], models: Sequence[str]) -> str:
    """One row per model, over all users, at 20: means over the runs, with lowest and highest where these differ."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in (row for results in runs for row in results if row["users"] == "all" and row["k"] == K):
        values[row["model"], row["target"], row["metric"]].append(row["value"])
    rows = [["model", *(title for title, _, _ in COLUMNS)], ["---"] * (1 + len(COLUMNS))]
    rows += [[name, *(_cell(values[name, target, metric]) for _, target, metric in COLUMNS)] for name in models]
    return "\n".join(f"| {' | '.join(row)} |" if row[0] != "---" else f"|{'|'.join(row)}|" for row in rows)


def _cell(values: Sequence[float]) -> str:
    low, high = (f"{bound(values):.3f}" for bound in (min, max))
    return f"{fmean(values):.3f}" if low == high else f"{fmean(values):.3f} ({low}–{high})"


def replaced(text: str, name: str, table: str) -> str:
    """The page with another table between the marks of that name. Raises `ValueError` where it has no such marks."""
    pattern = rf"(<!-- figures: {re.escape(name)} -->\n).*?(\n<!-- end -->)"
    found, count = re.subn(pattern, lambda marks: marks[1] + table + marks[2], text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{count} tables are marked {name!r}; expected 1")
    return found


def main() -> None:
    """Measure all tables whose data are here and show what changed."""
    folder = Path(os.environ.get("RAYREC_REAL_DATA", ""))
    for figures in TABLES:
        if not (folder / figures.data).is_file():
            print(f"{figures.name}: no {figures.data} in RAYREC_REAL_DATA; its table stays", file=sys.stderr)
            continue
        runs = [measure(figures, folder / figures.data, seed) for seed in figures.seeds]
        table = markdown_table(runs, figures.models)
        for page in PAGES:
            before = page.read_text(encoding="utf-8")
            after = replaced(before, figures.name, table)
            page.write_text(after, encoding="utf-8")
            changes = difflib.unified_diff(before.splitlines(), after.splitlines(), page.name, page.name, lineterm="")
            print("\n".join(changes))


if __name__ == "__main__":
    main()
