"""The tables of the report, one model a line, as plain values that the template lays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rayrec.embeddings.vectors import COLLAPSED
from rayrec.evaluation.protocol import DAYS

Entry = dict[str, Any]

GROUP_TITLES = {
    "all": "All users",
    "seen": "Users with plays before the test range",
    "new": "New users: no play before the test range",
    "held_out": "Users held out of every fit",
}
TARGET_TITLES = {
    "served": "as served",
    "next": "all next plays",
    "next_repeat": "repeats",
    "next_new": "new songs, among all",
    "next10": "the next 10",
    "offsets25_50": "25 to 50 plays ahead",
    "served25_50": "25 to 50 ahead, as served",
    "cold_songs": "songs without a play before",
    "cold_among_cold": "these among themselves",
}  # in the order of the columns; the first sorts the models
SUMMARY = ("served", "next", "next_repeat", "offsets25_50")
BY_TITLES = {
    "history": "By plays of the user before the query",
    "activity": "By plays of the user in the test range",
    "known": "Where so many plays of a user are known; 0: the same songs for everybody",
    "gap": "By the pause before the session",
    "drift": "By the cosine of the session with the long-term taste before it",
    "context": "By context of the play",
}
VECTOR_TITLES = {"songs": "as embedded", "models": "as the network scores them"}
NEGATIVE_TITLES = {"uniform": "any song", "zipf": "popular songs"}
AS_SERVED = "As served: plays of songs new to the user, ranked among the songs that the user has not heard."


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure, its interval below it, and perhaps lines of text."""

    text: str
    interval: str = ""
    lines: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table."""

    name: str
    cells: Sequence[Cell]
    default: bool = False  # the model that recommend uses


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with its title and what it shows."""

    id: str
    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Row]
    first: str = "model"  # title of the first column


def target_title(target: str) -> str:
    """A target in words."""
    if target in TARGET_TITLES:
        return TARGET_TITLES[target]
    kind, _, days = target.rpartition(DAYS)
    first, last = days.split("_")
    return f"{first} to {last} days ahead{', as served' if kind else ''}"


def by_target(results: Sequence[Entry], metric: str, k: int, default: str, *, only: Sequence[str] = ()) -> Table:
    """One metric of every target, or of some, side by side, as served first, which sorts the models."""
    entries = [entry for entry in results if (entry["users"], entry["metric"], entry["k"]) == ("all", metric, k)]
    entries = sorted(
        (entry for entry in entries if not only or entry["target"] in only),
        key=lambda entry: [*TARGET_TITLES, entry["target"]].index(entry["target"]),
    )
    return _table(
        f"targets-{metric}-{k}-{len(only or TARGET_TITLES)}",
        f"{metric_title(metric)}@{k} by target",
        f"{AS_SERVED} Models with a long horizon use it for the songs 25 to 50 plays or some days ahead.",
        entries,
        lambda entry: target_title(entry["target"]),
        default=default,
    )


def by_metric(results: Sequence[Entry], target: str, group: str, k: int, default: str) -> Table | None:
    """All metrics of one group of users at one cut-off, the best recall first."""
    entries = [entry for entry in results if (entry["target"], entry["users"], entry["k"]) == (target, group, k)]
    if not entries:
        return None
    users = f" of {entries[0]['users_count']:,} users" if "users_count" in entries[0] else ""
    return _table(
        f"metrics-{target}-{group}-{k}",
        f"{GROUP_TITLES[group]}: {target_title(target)}, first {k}",
        f"{entries[0]['plays']:,} plays{users}.",
        entries,
        lambda entry: f"{metric_title(entry['metric'])}@{entry['k']}",
        default=default,
    )


def differences(comparisons: Sequence[Entry], metric: str) -> Table | None:
    """The default model less each other one."""
    entries = [entry for entry in comparisons if entry["metric"] == metric]
    if not entries:
        return None
    return _table(
        f"differences-{metric}",
        f"Differences of {metric_title(metric)}@{entries[0]['k']}",
        f"{entries[0]['model']} minus the other model, on the same queries. Where the interval does not hold 0, the "
        "difference is not due to the users drawn.",
        [{**entry, "model": entry["other"], "value": entry["difference"]} for entry in entries],
        lambda entry: target_title(entry["target"]),
        order=lambda entry: entry["value"],
        form="{:+.4f}",
    )


def retrievers(retrieval: Sequence[Entry]) -> list[Table]:
    """The recall of each retriever and of all together: the ceiling of the ranker."""
    tables = []
    for model in dict.fromkeys(entry["model"] for entry in retrieval):
        entries = [
            {**entry, "model": "all together" if entry["retriever"] == "all" else entry["retriever"]}
            for entry in retrieval
            if entry["model"] == model
        ]
        made = _table(
            f"retrievers-{model}",
            f"Recall of the retrievers of {model}",
            "The share of the target songs that are among the candidates of a retriever, and of all together: no "
            "ranker can find more. Candidates: mean number for a query.",
            entries,
            lambda entry: target_title(entry["target"]),
        )
        counts = {entry["model"]: entry["candidates"] for entry in entries}
        rows = [Row(name=row.name, cells=[Cell(text=f"{counts[row.name]:,.1f}"), *row.cells]) for row in made.rows]
        tables.append(
            Table(
                id=made.id,
                title=made.title,
                note=made.note,
                head=["candidates", *made.head],
                rows=rows,
                first="retriever",
            )
        )
    return tables


def pairwise(entries: Sequence[Entry], default: str) -> Table | None:
    """Pairwise accuracy by target and negatives; a model with two horizons uses for each target the one for it."""
    if not entries:
        return None
    return _table(
        "pairwise",
        "Pairwise accuracy",
        "How often a song played later is nearer to the taste vector than a song drawn at random: of all songs alike, "
        "or by popularity (Zipf). 0.5 is chance. Drawn users.",
        entries,
        lambda entry: f"{target_title(entry['target'])}, against {NEGATIVE_TITLES[entry['negatives']]}",
        default=default,
    )


def recommended(figures: Sequence[Entry], default: str) -> Table | None:
    """Coverage, popularity and repeats of what is recommended."""
    if not figures:
        return None
    rows = [
        Row(
            name=entry["model"],
            default=entry["model"] == default,
            cells=[
                Cell(text=f"{entry['coverage']:.3f}"),
                _cell(entry["popularity_rank"], entry["popularity_rank_low"], entry["popularity_rank_high"], "{:,.0f}"),
                _cell(entry["repeats"], entry["repeats_low"], entry["repeats_high"], "{:.3f}"),
            ],
        )
        for entry in sorted(figures, key=lambda entry: -entry["coverage"])
    ]
    return Table(
        id="recommended",
        title="Coverage, popularity and repeats",
        note=f"The first 20 of all songs for {figures[0]['lists']:,} queries of drawn users. Coverage: the share of "
        "the catalog that is in any list. Popularity rank: 1 is the most played song. Repeats: songs that the user had "
        "heard.",
        head=("coverage", "mean popularity rank", "repeats"),
        rows=rows,
    )


def breakdown(breakdowns: Sequence[Entry], by: str, default: str) -> Table | None:
    """Recall of the next song in each slice."""
    entries = [entry for entry in breakdowns if entry["by"] == by and entry["metric"] == "recall"]
    if not entries:
        return None
    plays = {entry["slice"]: entry["plays"] for entry in entries}
    return _table(
        f"breakdown-{by}",
        f"{BY_TITLES[by]}: recall@{entries[0]['k']} of all next plays",
        "Plays: " + ", ".join(f"{name}: {count:,}" for name, count in plays.items()) + ".",
        entries,
        lambda entry: str(entry["slice"]),
        default=default,
    )


def song_embeddings(figures: Sequence[Entry]) -> list[Table]:
    """The health of the song embeddings, and the neighbours of the most played songs in them."""
    if not figures:
        return []
    rows = [
        Row(
            name=VECTOR_TITLES[entry["vectors"]],
            cells=[
                Cell(text=f"{entry['songs_with_vector']:,}"),
                Cell(text=f"{entry['coverage']:.3f}"),
                Cell(text=f"{entry['mean_cosine']:.3f}"),
                Cell(text=f"{entry['directions']:.1f} of {entry['dim']}"),
            ],
        )
        for entry in figures
    ]
    tables = [
        Table(
            id="embeddings",
            title="Song embeddings",
            note=f"Mean cosine: of random pairs of songs; above {COLLAPSED:g} they point nearly the same way. "
            "Directions in use: all where the vectors spread alike along each, few where most do not separate songs.",
            head=("songs with a vector", "share of the catalog", "mean cosine", "directions in use"),
            rows=rows,
            first="embeddings",
        )
    ]
    for entry in figures:
        near = [
            Row(
                name=song["song"],
                cells=[
                    Cell(text=f"{song['plays']:,}"),
                    Cell(
                        text="",
                        lines=[
                            f"{title} ({cosine:.2f})"
                            for title, cosine in zip(song["neighbours"], song["cosines"], strict=True)
                        ],
                    ),
                ],
            )
            for song in entry["neighbours"]
        ]
        tables.append(
            Table(
                id=f"neighbours-{entry['vectors']}",
                title=f"Neighbours of the most played songs, {VECTOR_TITLES[entry['vectors']]}",
                note="The nearest songs, with their cosines.",
                head=("plays", "neighbours"),
                rows=near,
                first="song",
            )
        )
    return tables


def metric_title(metric: str) -> str:
    """A metric as people write it."""
    return "Recall" if metric == "recall" else metric.upper()


def _table(
    identifier: str,
    title: str,
    note: str,
    entries: Sequence[Entry],
    column: Callable[[Entry], str],
    *,
    default: str = "",
    order: Callable[[Entry], float] = lambda entry: -entry["value"],
    form: str = "{:.4f}",
) -> Table:
    """Entries by model and by what `column` says, the lines in the order of their first column."""
    by_model: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        by_model.setdefault(entry["model"], {})[column(entry)] = entry
    head = list(dict.fromkeys(column(entry) for entry in entries))
    ranked = sorted(by_model, key=lambda model: order(by_model[model][head[0]]) if head[0] in by_model[model] else 0)
    rows = [
        Row(
            name=model,
            default=model == default,
            cells=[_entry_cell(by_model[model].get(name), form) for name in head],
        )
        for model in ranked
    ]
    return Table(id=identifier, title=title, note=note, head=head, rows=rows)


def _entry_cell(entry: Entry | None, form: str) -> Cell:
    return Cell(text="–") if entry is None else _cell(entry["value"], entry["low"], entry["high"], form)


def _cell(value: float, low: float, high: float, form: str) -> Cell:
    return Cell(text=form.format(value), interval=f"{form.format(low)} to {form.format(high)}")
