"""The report of an evaluation: results.json for programs; report.html, its tables and its plots for people."""

from __future__ import annotations

import base64
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import jinja2

from rayrec.embeddings.vectors import COLLAPSE_COSINE
from rayrec.evaluation.plots import Plot
from rayrec.evaluation.protocol import DAYS, DEFAULT_CONFIG, TARGETS, EvaluateConfig, usual_k
from rayrec.evaluation.results import ABLATION
from rayrec.storage.artifacts import Manifest, noun, verify
from rayrec.storage.workspace import Workspace

Entry = dict[str, Any]

GROUP_TITLES = {
    "all": "All users",
    "seen": "Users with plays before the test range",
    "new": "New users: no play before the test range",
    "held_out": "Users held out of all training",
}
TARGET_TITLES = {
    "served": "as served",
    "next": "all next plays",
    "next_repeat": "repeats",
    "next_new": "new songs, ranked among all",
    "next10": "next 10 plays",
    "offsets25_50": "25 to 50 plays ahead",
    "served25_50": "25 to 50 plays ahead, as served",
    "cold_songs": "songs without earlier plays",
    "cold_among_cold": "songs without earlier plays, ranked only against each other",
}  # in the order of the columns; the first sorts the models
SUMMARY = ("served", "next", "next_repeat", "offsets25_50")
BY_TITLES = {
    "history": "By number of plays of the user before the query",
    "activity": "By number of plays of the user in the test range",
    "known": "By number of known plays of the user; with 0, all users get the same list",
    "gap": "By length of the pause before the session",
    "drift": "By cosine between the session and the long-term taste before it",
    "context": "By playback context",
}
VECTOR_TITLES = {"songs": "from the embed stage", "models": "from the network"}
NEGATIVE_TITLES = {"uniform": "random songs", "zipf": "popular songs"}
AS_SERVED = "As served: plays of songs new to the user, ranked among the songs that the user has not heard."


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure with its interval below it, and optional lines of text."""

    text: str
    interval: str = ""
    lines: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table."""

    name: str
    cells: Sequence[Cell]
    default: bool = False  # the model that recommend uses


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with its title and a note on its content."""

    id: str
    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Row]
    first: str = "model"  # title of the first column


def target_title(target: str) -> str:
    """Return the title of a target."""
    if target in TARGET_TITLES:
        return TARGET_TITLES[target]
    kind, _, days = target.rpartition(DAYS)
    first, last = days.split("_")
    return f"{first} to {last} days ahead{', as served' if kind else ''}"


def by_target(results: Sequence[Entry], metric: str, k: int, default: str, *, only: Sequence[str] = ()) -> Table:
    """Return a table of one metric by target, or by targets in `only`, sorted by the first column, as served."""
    entries = [entry for entry in results if (entry["users"], entry["metric"], entry["k"]) == ("all", metric, k)]
    entries = sorted(
        (entry for entry in entries if not only or entry["target"] in only),
        key=lambda entry: [*TARGET_TITLES, entry["target"]].index(entry["target"]),
    )
    return _table(
        f"targets-{metric}-{k}-{len(only or TARGET_TITLES)}",
        f"{metric_title(metric)}@{k} by target",
        f"{AS_SERVED} Models with a long horizon use it for targets 25 to 50 plays or some days ahead.",
        entries,
        lambda entry: target_title(entry["target"]),
        default=default,
    )


def by_metric(results: Sequence[Entry], target: str, group: str, k: int, default: str) -> Table | None:
    """Return a table of all metrics of one group of users at one cut-off, sorted by recall; None without entries."""
    entries = [entry for entry in results if (entry["target"], entry["users"], entry["k"]) == (target, group, k)]
    if not entries:
        return None
    users = f" of {entries[0]['users_count']:,} users" if "users_count" in entries[0] else ""
    return _table(
        f"metrics-{target}-{group}-{k}",
        f"{GROUP_TITLES[group]}: {target_title(target)}, top {k}",
        f"{entries[0]['plays']:,} plays{users}.",
        entries,
        lambda entry: f"{metric_title(entry['metric'])}@{entry['k']}",
        default=default,
    )


def differences(comparisons: Sequence[Entry], metric: str, drawn: str) -> Table | None:
    """Return a table of the default model minus each other one; `drawn` names what the bootstrap draws."""
    entries = [entry for entry in comparisons if entry["metric"] == metric]
    if not entries:
        return None
    note = f"{entries[0]['model']} minus the other model, on the same queries."
    if "low" in entries[0]:
        note += f" If the interval excludes 0, the difference is statistically significant (bootstrap over {drawn})."
    return _table(
        f"differences-{metric}",
        f"Differences in {metric_title(metric)}@{entries[0]['k']}",
        note,
        [{**entry, "model": entry["other"], "value": entry["difference"]} for entry in entries],
        lambda entry: target_title(entry["target"]),
        sort_key=lambda entry: entry["value"],
        number_format="{:+.4f}",
    )


def retrievers(retrieval: Sequence[Entry]) -> list[Table]:
    """Return a table per model: recall of each retriever, and of all together, the upper limit for the ranker."""
    tables = []
    for model in dict.fromkeys(entry["model"] for entry in retrieval):
        entries = [
            {**entry, "model": "all together" if entry["retriever"] == "all" else entry["retriever"]}
            for entry in retrieval
            if entry["model"] == model
        ]
        recalls = _table(
            f"retrievers-{model}",
            f"Recall of the retrievers of {model}",
            "Share of the target songs that are among the candidates of a retriever, or of all retrievers together, "
            "which is the upper limit for a ranker. Candidates: mean number per query.",
            entries,
            lambda entry: target_title(entry["target"]),
        )
        counts = {entry["model"]: entry["candidates"] for entry in entries}
        rows = [Row(name=row.name, cells=[Cell(text=f"{counts[row.name]:,.1f}"), *row.cells]) for row in recalls.rows]
        tables.append(
            Table(
                id=recalls.id,
                title=recalls.title,
                note=recalls.note,
                head=["candidates", *recalls.head],
                rows=rows,
                first="retriever",
            )
        )
    return tables


def pairwise(entries: Sequence[Entry], default: str) -> Table | None:
    """Return a table of pairwise accuracy by target and negatives; of two horizons, the one for the target is used."""
    if not entries:
        return None
    return _table(
        "pairwise",
        "Pairwise accuracy",
        "How often a song played later is closer to the taste vector than a random song, drawn uniformly or by "
        "popularity (Zipf). 0.5 is chance. Computed for a sample of users.",
        entries,
        lambda entry: f"{target_title(entry['target'])}, against {NEGATIVE_TITLES[entry['negatives']]}",
        default=default,
    )


def recommended(entries: Sequence[Entry], default: str) -> Table | None:
    """Return a table of coverage, popularity and repeats of the recommended songs."""
    if not entries:
        return None
    rows = [
        Row(
            name=entry["model"],
            default=entry["model"] == default,
            cells=[
                Cell(text=f"{entry['coverage']:.3f}"),
                _cell(entry, "{:,.0f}", "popularity_rank", "popularity_rank_"),
                _cell(entry, "{:.3f}", "repeats", "repeats_"),
            ],
        )
        for entry in sorted(entries, key=lambda entry: -entry["coverage"])
    ]
    return Table(
        id="recommended",
        title="Coverage, popularity and repeats",
        note=f"The top 20 of all songs for {entries[0]['lists']:,} queries of a sample of users. Coverage: share of "
        "the catalog that is in at least one list. Popularity rank: 1 is the most played song. Repeats: share of songs "
        "that the user had heard.",
        head=("coverage", "mean popularity rank", "repeats"),
        rows=rows,
    )


def breakdown(breakdowns: Sequence[Entry], by: str, default: str) -> Table | None:
    """Return a table of the recall of next plays in each slice of the criterion `by`."""
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


def song_embeddings(entries: Sequence[Entry]) -> list[Table]:
    """Return tables of the health of the song embeddings and of the nearest neighbors of the most played songs."""
    if not entries:
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
        for entry in entries
    ]
    tables = [
        Table(
            id="embeddings",
            title="Song embeddings",
            note=f"Mean cosine: mean over random pairs of songs; above {COLLAPSE_COSINE:g}, all point nearly the same "
            "way. Directions in use: effective number of dimensions; all if the vectors vary equally in every "
            "dimension, few if most dimensions do not separate songs.",
            head=("songs with a vector", "share of the catalog", "mean cosine", "directions in use"),
            rows=rows,
            first="embeddings",
        )
    ]
    for entry in entries:
        neighbor_rows = [
            Row(
                name=song["song"],
                cells=[
                    Cell(text=f"{song['plays']:,}"),
                    Cell(
                        text="",
                        lines=[
                            f"{title} ({cosine:.2f})"
                            for title, cosine in zip(song["neighbors"], song["cosines"], strict=True)
                        ],
                    ),
                ],
            )
            for song in entry["neighbors"]
        ]
        tables.append(
            Table(
                id=f"neighbors-{entry['vectors']}",
                title=f"Neighbors of the most played songs, {VECTOR_TITLES[entry['vectors']]}",
                note="The nearest songs, with their cosines.",
                head=("plays", "neighbors"),
                rows=neighbor_rows,
                first="song",
            )
        )
    return tables


def metric_title(metric: str) -> str:
    """Return the usual spelling of a metric."""
    return "Recall" if metric == "recall" else metric.upper()


def _table(
    identifier: str,
    title: str,
    note: str,
    entries: Sequence[Entry],
    column_of: Callable[[Entry], str],
    *,
    default: str = "",
    sort_key: Callable[[Entry], float] = lambda entry: -entry["value"],
    number_format: str = "{:.4f}",
) -> Table:
    """Return a table with one row per model and one column per result of `column_of`, sorted by the first column."""
    by_model: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        by_model.setdefault(entry["model"], {})[column_of(entry)] = entry
    head = list(dict.fromkeys(column_of(entry) for entry in entries))
    sorted_models = sorted(
        by_model, key=lambda model: sort_key(by_model[model][head[0]]) if head[0] in by_model[model] else 0
    )
    rows = [
        Row(
            name=model,
            default=model == default,
            cells=[
                _cell(by_model[model][name], number_format) if name in by_model[model] else Cell(text="–")
                for name in head
            ],
        )
        for model in sorted_models
    ]
    return Table(id=identifier, title=title, note=note, head=head, rows=rows)


def _cell(entry: Entry, number_format: str, name: str = "value", prefix: str = "") -> Cell:
    """Return a figure of an entry, and its interval if it has one: the fields `prefix` + low and `prefix` + high."""
    ends = [number_format.format(entry[prefix + end]) for end in ("low", "high") if prefix + end in entry]
    return Cell(text=number_format.format(entry[name]), interval=" to ".join(ends))


def _drop_empty_intervals(
    statistics: Mapping[str, Sequence[Entry]], config: EvaluateConfig
) -> Mapping[str, Sequence[Entry]]:
    """Return the figures; if no intervals were computed, without low and high, which then equal the figure."""
    if config.bootstrap_samples:
        return statistics
    return {
        kind: [{name: entry[name] for name in entry if not name.endswith(("low", "high"))} for entry in entries]
        for kind, entries in statistics.items()
    }


RESULTS = "results.json"
PAGE = "report.html"
CURVES = "cosine_by_offset"
SONG_EMBEDDINGS = "song_vectors"  # the health of the song embeddings of the models, one entry per table
LIBRARIES = ("torch", "numpy", "lightgbm")
SHOWN_MODELS = 5  # in the chart and the first table

EVERY_PLAY = (
    "Every play of the test range that has an earlier play by the same user is predicted from the plays before it."
)


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """Tables and plots in one section of the page that can be folded."""

    id: str
    title: str
    tables: Sequence[Table] = ()
    plots: Sequence[Mapping[str, str]] = field(default_factory=list)


def write_report(
    workspace: Workspace,
    folder: str,
    statistics: Mapping[str, Sequence[Entry]],
    *,
    default: str,
    about: dict[str, str],
    described: str = EVERY_PLAY,
    plots: Sequence[Plot] = (),
    config: EvaluateConfig = DEFAULT_CONFIG,
    drawn: str = "users",
) -> list[str]:
    """Write the report's files to a folder of the workspace and return their names.

    `statistics` are those of `statistics_of`, or some of them, and the health of the song embeddings. `default` is the
    name of the model that `recommend` uses. `about` holds facts about the evaluation by name. `described` is a sentence
    for the head of the page: which plays were predicted, and from which plays. `config` holds the settings of the
    evaluation; `drawn` names what its bootstrap drew, users or pairs.
    """
    file_names, about = [RESULTS, PAGE], {**about, "versions": versions()}
    workspace.write_json(f"{folder}/{RESULTS}", {"default": default, "about": about, **statistics})
    for plot in plots:
        workspace.write_bytes(f"{folder}/{plot.file}", plot.png)
        file_names.append(plot.file)
    page = html_page(
        statistics, default=default, about=about, described=described, plots=plots, config=config, drawn=drawn
    )
    workspace.write_bytes(f"{folder}/{PAGE}", page.encode())
    return file_names


def read_results(workspace: Workspace, report: Manifest) -> dict[str, Any]:
    """Return the result of an evaluation as `rayrec --json evaluate` prints it.

    It holds the metrics of the manifest and the figures of results.json, except the curves. Raises
    `DamagedArtifactError` if a file is missing or has changed since it was written.
    """
    verify(workspace, report)
    results = workspace.read_json(report.path(RESULTS))
    return {**report.metrics, **{name: results[name] for name in results if name not in ("about", CURVES)}}


def headline(statistics: Mapping[str, Sequence[Entry]], default: str) -> dict[str, float]:
    """Return recall@k and mrr@k of the model that `recommend` uses: served_recall@k and served_mrr@k, then all plays.

    Empty if the model was not evaluated.
    """
    k = usual_k([entry["k"] for entry in statistics["results"]])
    values = _entries_by_model(statistics["results"], k)
    return {
        f"{prefix}{metric}@{k}": values[default, target, metric]["value"]
        for target, prefix in (("served", "served_"), ("next", ""))
        for metric in ("recall", "mrr")
        if (default, target, metric) in values
    }


def summary(
    statistics: Mapping[str, Sequence[Entry]], default: str, config: EvaluateConfig = DEFAULT_CONFIG
) -> dict[str, Any]:
    """Return the figures that a report's manifest holds: the verdict, the headline, and the headline of each model.

    `by_model` holds one row per model, best first, with the interval of its first figure, low and high; both are None
    if `config` computes no intervals.
    """
    statistics = _drop_empty_intervals(statistics, config)
    k = usual_k([entry["k"] for entry in statistics["results"]])
    values = _entries_by_model(statistics["results"], k)
    target = "served" if any(name == "served" for _, name, _ in values) else "next"
    recalls = {model: row for (model, name, metric), row in values.items() if (name, metric) == (target, "recall")}
    sorted_models = sorted(recalls, key=lambda model: -recalls[model]["value"])
    rows = [
        {
            "model": model,
            **headline(statistics, model),
            "low": recalls[model].get("low"),
            "high": recalls[model].get("high"),
        }
        for model in sorted_models
    ]
    return {"verdict": verdict(statistics, default), **headline(statistics, default), "by_model": rows}


def html_page(
    statistics: Mapping[str, Sequence[Entry]],
    *,
    default: str,
    about: dict[str, str],
    described: str = EVERY_PLAY,
    plots: Sequence[Plot] = (),
    config: EvaluateConfig = DEFAULT_CONFIG,
    drawn: str = "users",
) -> str:
    """Return the report as one HTML page without other files: the verdict and a chart first, all figures folded.

    The arguments are those of `write_report`.
    """
    statistics = _drop_empty_intervals(statistics, config)
    results = [entry for entry in statistics["results"] if entry["kind"] != ABLATION]
    k = usual_k([entry["k"] for entry in results])
    first_target = next(target for target in TARGETS if any(entry["target"] == target for entry in results))
    values = _entries_by_model(results, k)
    models = list(dict.fromkeys(entry["model"] for entry in results))
    sorted_models = sorted(models, key=lambda model: -values[model, first_target, "recall"]["value"])
    shown_models = sorted_models[:SHOWN_MODELS]
    day_targets = dict.fromkeys(entry["target"] for entry in results if entry["target"].startswith(DAYS))
    if default in sorted_models and default not in shown_models:
        shown_models = [*shown_models[:-1], default]
    facts = {noun(name): value for name, value in about.items() if name not in ("warning", "versions")}
    for entry in statistics.get("settings", []):
        settings = {name: value for name, value in entry.items() if name != "model"}
        facts[f"settings of {entry['model']}"] = settings_text(settings)
    errors = [entry for entry in statistics.get("calibration", []) if entry["model"] == default]
    if errors:
        texts = [f"{target_title(entry['target'])}: {entry['value']:.4f}" for entry in errors]
        facts[f"expected calibration error of {default}"] = "; ".join(texts)
    if "versions" in about:
        facts["versions"] = about["versions"]
    environment = jinja2.Environment(loader=jinja2.PackageLoader("rayrec.evaluation"), autoescape=True)
    return environment.get_template("report.html.j2").render(
        title=about.get("test range") or about.get("file") or "the test range",
        verdict=verdict(statistics, default),
        warning=about.get("warning"),
        described=described,
        intervals=f", with {config.interval_title} bootstrap intervals over {drawn}" if config.interval_title else "",
        chart=_chart(shown_models, values, first_target, k, default, sorted_models),
        summary=by_target(
            [entry for entry in results if entry["model"] in shown_models],
            "recall",
            k,
            default,
            only=(*SUMMARY, *day_targets),
        ),
        examples=statistics.get("examples", []),
        facts=facts.items(),
        chapters=_chapters(
            {**statistics, **_entries_of_models(statistics, models), "results": results}, default, k, plots, drawn
        ),
    )


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings and their values in one line, or "defaults" if there are none."""
    return (
        "; ".join(f"{name.replace('_', ' ')}: {_value_text(value)}" for name, value in settings.items()) or "defaults"
    )


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_value_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def versions() -> str:
    """Return the versions of rayrec, Python and the libraries on which figures depend."""
    packages = [f"{name} {version(name)}" for name in ("rayrec", *LIBRARIES)]
    return ", ".join([packages[0], f"Python {platform.python_version()}", *packages[1:]])


def _entries_of_models(statistics: Mapping[str, Sequence[Entry]], models: Sequence[str]) -> dict[str, list[Entry]]:
    """Return the figures apart from the results, only of the models compared; an ablation has its own chapter."""
    kinds = ("retrieval", "breakdowns", "recommended", "leave_one_out")
    return {name: [entry for entry in statistics.get(name, []) if entry["model"] in models] for name in kinds}


def verdict(statistics: Mapping[str, Sequence[Entry]], default: str) -> str:
    """Return one sentence: how much the default model finds, and its difference from the best baseline."""
    k = usual_k([entry["k"] for entry in statistics["results"]])
    values = _entries_by_model(statistics["results"], k)
    target = "served" if any(name == "served" for _, name, _ in values) else "next"
    song_kind = "next new songs" if target == "served" else "next songs"
    recalls = {model: row for (model, name, metric), row in values.items() if (name, metric) == (target, "recall")}
    baselines = [model for model, row in recalls.items() if row["kind"] == "baseline" and model != default]
    best_model = max(baselines, key=lambda model: recalls[model]["value"], default=None)
    if default not in recalls:
        best_model = max(recalls, key=lambda model: recalls[model]["value"])
        return f"{best_model} finds {100 * recalls[best_model]['value']:.0f} of 100 {song_kind} in its first {k}."
    recall_text = f"{default} finds {100 * recalls[default]['value']:.0f} of 100 {song_kind} in its first {k}"
    if best_model is None:
        return f"{recall_text}."
    expected_fields = {"other": best_model, "target": target, "metric": "recall", "k": k}
    for entry in statistics.get("comparisons", []):
        if expected_fields.items() <= entry.items():
            difference = 100 * entry["difference"]
            text = (
                f"{recall_text}: {abs(difference):.1f} {'more' if difference >= 0 else 'fewer'} than the best "
                f"baseline, {best_model}"
            )
            if "low" not in entry:
                return f"{text}."
            low, high = 100 * entry["low"], 100 * entry["high"]
            if low <= 0 <= high:
                interval_text = f"{low:+.1f} to {high:+.1f}"
                return (
                    f"{recall_text}: no significant difference from the best baseline, {best_model} ({interval_text})."
                )
            interval_text = f"{min(abs(low), abs(high)):.1f} to {max(abs(low), abs(high)):.1f}"
            return f"{text} (interval {interval_text})."
    return f"{recall_text}; the best baseline, {best_model}, finds {100 * recalls[best_model]['value']:.0f}."


def _entries_by_model(results: Sequence[Entry], k: int) -> dict[tuple[str, str, str], Entry]:
    """Return the entries of all users at a cut-off, by model, target and metric."""
    selected_results = [entry for entry in results if (entry["users"], entry["k"]) == ("all", k)]
    return {(entry["model"], entry["target"], entry["metric"]): entry for entry in selected_results}


def _chart(
    models: Sequence[str],
    values: Mapping[tuple[str, str, str], Entry],
    target: str,
    k: int,
    default: str,
    sorted_models: Sequence[str],
) -> dict[str, Any]:
    """Return the bars of recall with their intervals, in percent of the longest bar.

    `left` and `span` of an interval are None if there is none. `sorted_models` are all models, best first. `models` are
    the first of them; if the default model is not among these, it replaces the last one.
    """
    rows = [values[model, target, "recall"] for model in models]
    max_value = max([max(entry["value"], entry.get("high", 0.0)) for entry in rows] + [1e-9])
    bars = [
        {
            "name": entry["model"],
            "default": entry["model"] == default,
            "width": round(100 * entry["value"] / max_value, 2),
            "left": round(100 * entry["low"] / max_value, 2) if "low" in entry else None,
            "span": round(100 * (entry["high"] - entry["low"]) / max_value, 2) if "low" in entry else None,
            "text": f"{entry['value']:.3f}",
        }
        for entry in rows
    ]
    num_best = len(models) if models[-1] in sorted_models[: len(models)] else len(models) - 1
    default_text = f" and {default} (used by recommend)" if num_best < len(models) else ""
    note = f"The {num_best} best of {len(sorted_models)} models{default_text}; the tables below list all."
    return {
        "title": f"Recall@{k}, {target_title(target)}",
        "bars": bars,
        "note": note if len(sorted_models) > len(models) else "",
    }


def _chapters(
    statistics: Mapping[str, Sequence[Entry]], default: str, k: int, plots: Sequence[Plot], drawn: str
) -> list[Chapter]:
    """Return the chapters below the first page; a chapter without a table or a plot is left out."""
    results = statistics["results"]
    other_ks = sorted({entry["k"] for entry in results} - {k})
    groups = [group for group in GROUP_TITLES if any(entry["users"] == group for entry in results)]
    groups = groups if len(groups) > 2 else groups[:1]  # a single group holds the same users as all
    targets = [target for target in ("served", "next") if any(entry["target"] == target for entry in results)]
    comparisons = statistics.get("comparisons", [])
    ablated_models = {entry["other"] for entry in comparisons} - {entry["model"] for entry in results}
    chapters = [
        Chapter(
            id="all-models",
            title="All models by target",
            tables=[by_target(results, metric, k, default) for metric in ("recall", "mrr")],
        ),
        Chapter(
            id="differences",
            title="Differences from the other models",
            tables=_drop_missing(
                differences([entry for entry in comparisons if entry["other"] not in ablated_models], metric, drawn)
                for metric in ("recall", "mrr")
            ),
        ),
        Chapter(
            id="ablation",
            title="Ablation: without one part at a time",
            tables=_drop_missing(
                differences([entry for entry in comparisons if entry["other"] in ablated_models], metric, drawn)
                for metric in ("recall", "mrr")
            ),
        ),
        Chapter(
            id="retrieval",
            title="Recall of the retrievers",
            tables=retrievers(statistics.get("retrieval", [])),
        ),
        Chapter(
            id="users",
            title="By user group and cutoff",
            tables=_drop_missing(
                [
                    *(by_metric(results, target, group, k, default) for target in targets for group in groups),
                    *(
                        by_metric(results, target, "all", other_k, default)
                        for target in targets
                        for other_k in other_ks
                    ),
                ]
            ),
        ),
        Chapter(
            id="slices",
            title="By history, activity and context",
            tables=_drop_missing(breakdown(statistics.get("breakdowns", []), by, default) for by in BY_TITLES),
        ),
        Chapter(
            id="lists",
            title="What is recommended: coverage, popularity, repeats",
            tables=_drop_missing([recommended(statistics.get("recommended", []), default)]),
        ),
        Chapter(
            id="last-plays",
            title="Leave one out: only the last play of each user",
            tables=_drop_missing([by_metric(statistics.get("leave_one_out", []), "next", "all", k, default)]),
        ),
        Chapter(
            id="vectors",
            title="Taste vectors and song embeddings",
            tables=[
                *_drop_missing([pairwise(statistics.get("pairwise", []), default)]),
                *song_embeddings(statistics.get(SONG_EMBEDDINGS, [])),
            ],
        ),
        Chapter(
            id="plots",
            title="Plots",
            plots=[
                {
                    "id": plot.file.partition(".")[0],
                    "title": plot.title,
                    "note": plot.note,
                    "alt": plot.alt,
                    "data": base64.b64encode(plot.png).decode(),
                }
                for plot in plots
            ],
        ),
    ]
    return [chapter for chapter in chapters if chapter.tables or chapter.plots]


def _drop_missing(tables: Any) -> list[Table]:
    return [table for table in tables if table is not None]
