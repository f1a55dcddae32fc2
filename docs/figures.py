"""Measure the marked tables of README.md and docs/evaluation.md again: python docs/figures.py; `make figures` runs it.

RAYREC_REAL_DATA names the folder that holds the data sets. A table without its data stays unchanged; that of the demo
needs none. The workspaces are in build/figures, a folder per state of the code: a second run of the same code computes
nothing again.
"""

import difflib
import hashlib
import json
import os
import re
import shlex
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


MODELS = ("two-step", "vstan", "taste", "sequential-rules", "user-top")
FIT = ("embed --seed {seed}", "train --seed {seed}", "retrieval", "rank --seed {seed}")
LONG_HISTORIES = (
    "import sequences {data} --user-separator , --song-separator :",
    "split --last-fraction 0.2 --validation-fraction 0.2",
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A table, and the commands that compute its figures, without `rayrec --workspace FOLDER` in front."""

    name: str  # name of the table in the mark of the page
    data: str  # path in the folder RAYREC_REAL_DATA; empty: the commands generate the data
    commands: tuple[str, ...]  # the last one prints the figures; {data} is the path of the data, {folder} its folder
    seeds: tuple[int, ...] = (0, 1, 2)  # all commands run once per {seed}, in separate workspaces


TABLES = (
    Figures(name="demo", data="", commands=("demo",), seeds=(0,)),  # the demo has a fixed seed
    Figures(
        name="30music",
        data="30music-sample10/sessions_sample_10.csv",
        commands=(
            "import csv {data} --columns user=user_id,song=song_id,played_at=ts",
            "split --test-days 30 --validation-days 28",
            *FIT,
            f"evaluate --models {','.join(MODELS)}",
        ),
    ),
    Figures(
        name="30music-long",
        data="30music-long/histories.lst",
        commands=(
            *LONG_HISTORIES,
            "describe {folder}/item_artist_album.csv --columns song=item",
            *FIT,
            f"evaluate --queries 16000 --models {','.join(MODELS)}",
        ),
    ),
    Figures(
        name="30music-long-plain",
        data="30music-long/histories.lst",
        commands=(*LONG_HISTORIES, *FIT, f"evaluate --queries 16000 --models {','.join(MODELS)}"),
    ),
    Figures(
        name="nowplaying",
        data="nowplaying/all_train_seq.plain.txt",
        commands=(
            "import sequences {data} --song-separator ' '",
            "split --last-fraction 0.001 --validation-fraction 0.1",
            *FIT,
            f"evaluate --prefixes {{folder}}/test.plain.txt --models {','.join(MODELS)}",
        ),
    ),
)
# Title, target and metric of each column; a table omits columns without figures.
COLUMNS = (
    ("served recall@20", "served", "recall"),
    ("MRR@20", "served", "mrr"),
    ("all recall@20", "next", "recall"),
    ("MRR@20", "next", "mrr"),
    ("repeats recall@20", "next_repeat", "recall"),
    ("offsets 25 to 50 recall@20", "offsets25_50", "recall"),
)


def skip_reason(table: Figures, data_folder: str) -> str:
    """Return why `table` cannot be measured with the data sets in `data_folder`; "" if it can."""
    if not table.data or (data_folder and (Path(data_folder) / table.data).is_file()):
        return ""
    missing_data = f"there is no {Path(data_folder) / table.data}" if data_folder else "RAYREC_REAL_DATA is not set"
    return f"{table.name}: {missing_data}; the table stays as it is"


NEW_FILES = ("ls-files", "-z", "--others", "--exclude-standard")  # files that git does not track


def code_state(repository: Path = ROOT) -> str:
    """Return the last commit that changed the code, and a hash of changes since: artifacts do not know it."""
    commit, changes, new_files = (
        subprocess.run(
            ["git", *words, "--", "rayrec", "cli"], cwd=repository, check=True, stdout=subprocess.PIPE
        ).stdout
        for words in (("log", "-1", "--format=%h"), ("diff", "HEAD"), NEW_FILES)
    )
    for name in new_files.decode().split("\0")[:-1]:
        changes += name.encode() + (repository / name).read_bytes()
    return commit.decode().strip() + (f"-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")


def measure(table: Figures, data_path: Path, seed: int) -> list[dict[str, Any]]:
    """Run the commands; return the results of the evaluation."""
    workspace = ROOT / "build" / "figures" / code_state() / f"{table.name}-{seed}"
    output = ""
    for command in table.commands:
        arguments = [word.format(data=data_path, folder=data_path.parent, seed=seed) for word in shlex.split(command)]
        print("rayrec", *arguments, file=sys.stderr)
        command_line = [sys.executable, "-m", "rayrec_cli.main", "--workspace", str(workspace), "--json", *arguments]
        output = subprocess.run(command_line, check=True, stdout=subprocess.PIPE, text=True).stdout
    results: list[dict[str, Any]] = json.loads(output)["results"]
    return results


def markdown_table(runs: Sequence[Sequence[dict[str, Any]]], models: Sequence[str] = MODELS) -> str:
    """Return a table with one row per model, over all users, k = 20: mean over runs, and the range if they differ."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in (row for results in runs for row in results if row["users"] == "all" and row["k"] == K):
        values[row["model"], row["target"], row["metric"]].append(row["value"])
    columns = [column for column in COLUMNS if values[models[0], column[1], column[2]]]
    rows = [["model", *(title for title, _, _ in columns)], ["---"] * (1 + len(columns))]
    rows += [[name, *(_cell(values[name, target, metric]) for _, target, metric in columns)] for name in models]
    return "\n".join(f"| {' | '.join(row)} |" if row[0] != "---" else f"|{'|'.join(row)}|" for row in rows)


def _cell(values: Sequence[float]) -> str:
    low, high = (f"{extreme(values):.3f}" for extreme in (min, max))
    return f"{fmean(values):.3f}" if low == high else f"{fmean(values):.3f} ({low}–{high})"


def mark(name: str) -> str:
    """Return the line of a page that precedes the table `name`."""
    return f"<!-- figures: {name} -->"


def replaced(text: str, name: str, table: str) -> str:
    """Return the page with `table` between the marks of `name`. Raises `ValueError` unless it has them exactly once."""
    pattern = rf"({re.escape(mark(name))}\n).*?(\n<!-- end -->)"
    new_text, count = re.subn(pattern, lambda match: match[1] + table + match[2], text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{count} tables are marked {name!r}; expected 1")
    return new_text


def main() -> None:
    """Measure all tables with data, write them into the pages, and print the changes."""
    data_folder = os.environ.get("RAYREC_REAL_DATA", "")
    for table in TABLES:
        if reason := skip_reason(table, data_folder):
            print(reason, file=sys.stderr)
            continue
        runs = [measure(table, Path(data_folder) / table.data, seed) for seed in table.seeds]
        markdown = markdown_table(runs)
        for page in PAGES:
            old_text = page.read_text(encoding="utf-8")
            if mark(table.name) not in old_text:
                continue
            new_text = replaced(old_text, table.name, markdown)
            page.write_text(new_text, encoding="utf-8")
            diff_lines = difflib.unified_diff(
                old_text.splitlines(), new_text.splitlines(), page.name, page.name, lineterm=""
            )
            print("\n".join(diff_lines))


if __name__ == "__main__":
    main()
