"""The tables of the report, one model a line.

A cell shows a figure and, small below it, its interval.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from rayrec.embeddings.health import COLLAPSED
from rayrec.evaluation.protocol import usual_k

Entry = dict[str, Any]

GROUP_TITLES = {
    "all": "All users",
    "seen": "Users with plays before the cut",
    "new": "New users: no play before the cut",
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
}  # in the order of the columns; the first sorts the models
BY_TITLES = {
    "history": "By plays of the user before the question",
    "activity": "By plays of the user in the test range",
    "context": "By context of the play",
}
VECTOR_TITLES = {"songs": "as embedded", "models": "as the network answers with them"}
NEGATIVE_TITLES = {"uniform": "any song", "zipf": "popular songs"}


def section(results: Sequence[Entry], title: str, group: str, k: int, default: str) -> str:
    """One group of users at one cut-off, the best recall first."""
    entries = [entry for entry in results if entry["users"] == group and entry["k"] == k]
    users = f" of {entries[0]['users_count']:,} users" if "users_count" in entries[0] else ""
    behind = f"{entries[0]['plays']:,} plays{users}."
    return _table(
        f"{title}, first {k}", behind, entries, lambda entry: f"{_metric_title(entry['metric'])}@{k}", default=default
    )


def targets(results: Sequence[Entry], k: int, default: str) -> str:
    """Recall of every target side by side, as served first."""
    entries = [entry for entry in results if (entry["users"], entry["metric"], entry["k"]) == ("all", "recall", k)]
    if len({entry["target"] for entry in entries}) < 2:
        return ""
    entries.sort(key=lambda entry: list(TARGET_TITLES).index(entry["target"]))
    note = (
        "As served: plays of songs new to the user, ranked among the songs that the user has not heard. Recall: of "
        "several target songs, the share that is found. Models with a long horizon answer with it for the songs 25 to "
        "50 plays ahead."
    )
    return _table(
        f"Recall in the first {k}, by target",
        note,
        entries,
        lambda entry: TARGET_TITLES[entry["target"]],
        default=default,
    )


def compared(comparisons: Sequence[Entry]) -> str:
    """The default model less each other one."""
    if not comparisons:
        return ""
    ours = escape(comparisons[0]["model"])
    note = (
        f"{ours} less the other model, on the same plays. Where the interval holds no 0, the difference is more than "
        "the luck of which users were there."
    )
    entries = [{**entry, "model": entry["other"], "value": entry["difference"]} for entry in comparisons]
    return _table(
        "How sure the differences are",
        note,
        entries,
        lambda entry: f"{_metric_title(entry['metric'])}@{entry['k']}, {TARGET_TITLES[entry['target']]}",
        order=lambda entry: entry["value"],
        form="{:+.4f}",
    )


def paired(pairwise: Sequence[Entry], default: str) -> str:
    """Pairwise accuracy by target and negatives; a model with two horizons answers each target with the one for it."""
    if not pairwise:
        return ""
    note = (
        "How often a song played later is nearer to the taste vector than a song drawn at random: of all songs alike, "
        "or by popularity (Zipf). 0.5 is chance. Drawn users."
    )
    return _table(
        "Played later, or drawn at random",
        note,
        pairwise,
        lambda entry: f"{TARGET_TITLES[entry['target']]}, against {NEGATIVE_TITLES[entry['negatives']]}",
        default=default,
    )


def recommended(figures: Sequence[Entry], default: str) -> str:
    """Coverage, popularity and repeats of what is recommended."""
    if not figures:
        return ""
    note = (
        f"The first 20 songs of {figures[0]['lists']:,} questions to drawn users. Coverage: the share of the catalog "
        "that is in any list. Popularity rank: 1 is the most played song. Repeats: songs that the user had heard."
    )
    head = ("coverage", "mean popularity rank", "repeats")
    rows = [
        (
            entry["model"],
            [
                f"{entry['coverage']:.3f}",
                _cell(entry["popularity_rank"], entry["popularity_rank_low"], entry["popularity_rank_high"], "{:,.0f}"),
                _cell(entry["repeats"], entry["repeats_low"], entry["repeats_high"], "{:.3f}"),
            ],
        )
        for entry in sorted(figures, key=lambda entry: -entry["coverage"])
    ]
    return _html("What is recommended", note, head, rows, default)


def breakdown(breakdowns: Sequence[Entry], by: str, default: str) -> str:
    """Recall of the next song in each slice."""
    entries = [entry for entry in breakdowns if entry["by"] == by and entry["metric"] == "recall"]
    if not entries:
        return ""
    k = usual_k([entry["k"] for entry in entries])
    plays = {entry["slice"]: entry["plays"] for entry in entries}
    note = "Plays behind them: " + ", ".join(f"{escape(name)}: {count:,}" for name, count in plays.items()) + "."
    return _table(f"{BY_TITLES[by]}, recall@{k}", note, entries, lambda entry: str(entry["slice"]), default=default)


def song_vectors(figures: Sequence[Entry]) -> str:
    """The health of each table of song vectors, and the neighbours of the most played songs in it."""
    if not figures:
        return ""
    note = (
        f"Mean cosine: of random pairs of songs; above {COLLAPSED:g} they point nearly the same way. Directions in "
        "use: all where the vectors spread alike along each, few where most directions tell no songs apart."
    )
    head = ("songs with a vector", "share of the catalog", "mean cosine", "directions in use")
    rows = [
        (
            VECTOR_TITLES[entry["vectors"]],
            [
                f"{entry['songs_with_vector']:,}",
                f"{entry['coverage']:.3f}",
                f"{entry['mean_cosine']:.3f}",
                f"{entry['directions']:.1f} of {entry['dim']}",
            ],
        )
        for entry in figures
    ]
    parts = [_html("The song vectors", note, head, rows, first="vectors")]
    for entry in figures:
        title = f"Neighbours of the most played songs, {VECTOR_TITLES[entry['vectors']]}"
        close = [(near["song"], [f"{near['plays']:,}", _titles(near)]) for near in entry["neighbours"]]
        note = "The nearest songs, with their cosines."
        parts.append(_html(title, note, ("plays", "neighbours"), close, first="song"))
    return "".join(parts)


def _titles(near: Mapping[str, Any]) -> str:
    pairs = zip(near["neighbours"], near["cosines"], strict=True)
    return f"<div>{'<br>'.join(f'{escape(title)} ({cosine:.2f})' for title, cosine in pairs)}</div>"


def _table(
    title: str,
    note: str,
    entries: Sequence[Entry],
    column: Callable[[Entry], str],
    *,
    default: str = "",
    order: Callable[[Entry], float] = lambda entry: -entry["value"],
    form: str = "{:.4f}",
) -> str:
    """Entries by model and by what `column` says, the lines in the order of their first column."""
    by_model: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        by_model.setdefault(entry["model"], {})[column(entry)] = entry
    head = list(dict.fromkeys(column(entry) for entry in entries))
    ranked = sorted(by_model, key=lambda model: order(by_model[model][head[0]]) if head[0] in by_model[model] else 0)
    rows = [(model, [_entry_cell(by_model[model].get(name), form) for name in head]) for model in ranked]
    return _html(title, note, head, rows, default)


def _entry_cell(entry: Mapping[str, Any] | None, form: str) -> str:
    return "–" if entry is None else _cell(entry["value"], entry["low"], entry["high"], form)


def _cell(value: float, low: float, high: float, form: str) -> str:
    return f"{form.format(value)}<small>{form.format(low)} to {form.format(high)}</small>"


def _html(
    title: str,
    note: str,
    head: Sequence[str],
    rows: Sequence[tuple[str, list[str]]],
    default: str = "",
    first: str = "model",
) -> str:
    titles = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    body = "".join(_row(model, cells, default) for model, cells in rows)
    return (
        f"<h2>{escape(title)}</h2><p>{note}</p><div class=scroll><table><thead><tr><th scope=col>{first}</th>{titles}"
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(model: str, cells: Sequence[str], default: str) -> str:
    mark = "<small>what recommend uses</small>" if model == default else ""
    style = " class=default" if model == default else ""
    return f"<tr{style}><th scope=row>{escape(model)}{mark}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _metric_title(metric: str) -> str:
    return metric if metric == "recall" else metric.upper()
