"""The report of an evaluation: results.json for programs, report.html and its plots for people."""

from __future__ import annotations

import base64
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import jinja2

from rayrec.evaluation import tables
from rayrec.evaluation.plots import Plot
from rayrec.evaluation.protocol import DAYS, TARGETS, usual_k
from rayrec.evaluation.results import ABLATION
from rayrec.evaluation.tables import GROUP_TITLES, SUMMARY, Entry, Table
from rayrec.storage.artifacts import Manifest, noun, verify
from rayrec.storage.workspace import Workspace

RESULTS = "results.json"
PAGE = "report.html"
CURVES = "cosine_by_offset"
SONG_EMBEDDINGS = "song_vectors"  # the health of the embeddings behind the models: an entry for each table of them
LIBRARIES = ("torch", "numpy", "lightgbm")
SHOWN_MODELS = 5  # in the chart and the first table

EVERY_PLAY = (
    "Every play of the test range that has an earlier play by the same user is predicted from the plays before it."
)


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """Tables and plots that are folded together."""

    id: str
    title: str
    tables: Sequence[Table] = ()
    plots: Sequence[Mapping[str, str]] = field(default_factory=list)


def write_report(
    workspace: Workspace,
    folder: str,
    figures: Mapping[str, Sequence[Entry]],
    *,
    default: str,
    about: dict[str, str],
    described: str = EVERY_PLAY,
    plots: Sequence[Plot] = (),
) -> list[str]:
    """Write the report's files to a folder of the workspace and return their names.

    `figures` are those of `figures_of`, or some of them, and the health of the song embeddings. `default` names the
    model that `recommend` uses; `about` says what was evaluated, name by name, and `described` what was predicted
    from what, for the head of the page.
    """
    names, about = [RESULTS, PAGE], {**about, "versions": versions()}
    workspace.write_json(f"{folder}/{RESULTS}", {"default": default, "about": about, **figures})
    for plot in plots:
        workspace.write_bytes(f"{folder}/{plot.file}", plot.png)
        names.append(plot.file)
    page = html_page(figures, default=default, about=about, described=described, plots=plots)
    workspace.write_bytes(f"{folder}/{PAGE}", page.encode())
    return names


def read_figures(workspace: Workspace, report: Manifest) -> dict[str, Any]:
    """The outcome of an evaluation, as `rayrec --json evaluate` prints it: the manifest's metrics, all but curves.

    The figures are those of results.json. Raises `DamagedArtifactError` where a file is missing or is not the one
    that was written.
    """
    verify(workspace, report)
    stored = workspace.read_json(report.path(RESULTS))
    return {**report.metrics, **{name: stored[name] for name in stored if name not in ("about", CURVES)}}


def headline(figures: Mapping[str, Sequence[Entry]], default: str) -> dict[str, float]:
    """recall@k and mrr@k by the model that `recommend` uses: served_recall@k and so on as served, then of all plays.

    Nothing where the model was not evaluated.
    """
    usual = usual_k([entry["k"] for entry in figures["results"]])
    values = _values(figures["results"], usual)
    return {
        f"{prefix}{metric}@{usual}": values[default, target, metric]["value"]
        for target, prefix in (("served", "served_"), ("next", ""))
        for metric in ("recall", "mrr")
        if (default, target, metric) in values
    }


def html_page(
    figures: Mapping[str, Sequence[Entry]],
    *,
    default: str,
    about: dict[str, str],
    described: str = EVERY_PLAY,
    plots: Sequence[Plot] = (),
) -> str:
    """The report as one HTML page that needs no other file: the verdict and a chart first, all figures folded."""
    compared = [entry for entry in figures["results"] if entry["kind"] != ABLATION]
    k = usual_k([entry["k"] for entry in compared])
    first = next(target for target in TARGETS if any(entry["target"] == target for entry in compared))
    values = _values(compared, k)
    models = list(dict.fromkeys(entry["model"] for entry in compared))
    ranked = sorted(models, key=lambda model: -values[model, first, "recall"]["value"])
    shown = ranked[:SHOWN_MODELS]
    in_days = dict.fromkeys(entry["target"] for entry in compared if entry["target"].startswith(DAYS))
    if default in ranked and default not in shown:
        shown = [*shown[:-1], default]
    facts = {noun(name): value for name, value in about.items() if name != "warning"}
    for entry in figures.get("settings", []):
        chosen = [f"{name.replace('_', ' ')} {value:g}" for name, value in entry.items() if name != "model"]
        facts[f"settings of {entry['model']}"] = ", ".join(chosen)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("rayrec.evaluation"), autoescape=True)
    return environment.get_template("report.html.j2").render(
        title=about.get("test range") or about.get("file") or "the test range",
        verdict=verdict(figures, default),
        warning=about.get("warning"),
        described=described,
        chart=_chart(shown, values, first, k, default, len(ranked)),
        summary=tables.by_target(
            [entry for entry in compared if entry["model"] in shown], "recall", k, default, only=(*SUMMARY, *in_days)
        ),
        examples=figures.get("examples", []),
        facts=facts.items(),
        chapters=_chapters({**figures, **_of_models(figures, models), "results": compared}, default, k, plots),
    )


def versions() -> str:
    """Of rayrec, Python and the libraries that figures depend on."""
    packages = [f"{name} {version(name)}" for name in ("rayrec", *LIBRARIES)]
    return ", ".join([packages[0], f"Python {platform.python_version()}", *packages[1:]])


def _of_models(figures: Mapping[str, Sequence[Entry]], models: Sequence[str]) -> dict[str, list[Entry]]:
    """The figures that stand beside the results, of the models compared alone: an ablation has a chapter of its own."""
    names = ("retrieval", "breakdowns", "recommended", "leave_one_out")
    return {name: [entry for entry in figures.get(name, []) if entry["model"] in models] for name in names}


def verdict(figures: Mapping[str, Sequence[Entry]], default: str) -> str:
    """In a sentence: how much the default model finds, and by how much it beats the best baseline, or does not."""
    k = usual_k([entry["k"] for entry in figures["results"]])
    values = _values(figures["results"], k)
    target = "served" if any(name == "served" for _, name, _ in values) else "next"
    what = "next new songs" if target == "served" else "next songs"
    recalls = {model: row for (model, name, metric), row in values.items() if (name, metric) == (target, "recall")}
    baselines = [model for model, row in recalls.items() if row["kind"] == "baseline" and model != default]
    best = max(baselines, key=lambda model: recalls[model]["value"], default=None)
    if default not in recalls:
        best = max(recalls, key=lambda model: recalls[model]["value"])
        return f"{best} finds {100 * recalls[best]['value']:.0f} of 100 {what} in its first {k}."
    recall_text = f"{default} finds {100 * recalls[default]['value']:.0f} of 100 {what} in its first {k}"
    if best is None:
        return f"{recall_text}."
    key = {"other": best, "target": target, "metric": "recall", "k": k}
    for entry in figures.get("comparisons", []):
        if key.items() <= entry.items():
            low, high, more = 100 * entry["low"], 100 * entry["high"], 100 * entry["difference"]
            if low <= 0 <= high:
                return f"{recall_text}: no clear difference from the best baseline, {best} ({low:+.1f} to {high:+.1f})."
            word = "more" if more > 0 else "fewer"
            span = f"{min(abs(low), abs(high)):.1f} to {max(abs(low), abs(high)):.1f}"
            return f"{recall_text}: {abs(more):.1f} {word} than the best baseline, {best} (surely {span})."
    return f"{recall_text}; the best baseline, {best}, finds {100 * recalls[best]['value']:.0f}."


def _values(results: Sequence[Entry], k: int) -> dict[tuple[str, str, str], Entry]:
    """The entries of all users at a cut-off, by model, target and metric."""
    some = [entry for entry in results if (entry["users"], entry["k"]) == ("all", k)]
    return {(entry["model"], entry["target"], entry["metric"]): entry for entry in some}


def _chart(
    models: Sequence[str],
    values: Mapping[tuple[str, str, str], Entry],
    target: str,
    k: int,
    default: str,
    count: int,
) -> dict[str, Any]:
    """The bars of recall with their intervals, in per cent of the longest."""
    rows = [values[model, target, "recall"] for model in models]
    longest = max([entry["high"] for entry in rows] + [1e-9])
    bars = [
        {
            "name": entry["model"],
            "default": entry["model"] == default,
            "width": round(100 * entry["value"] / longest, 2),
            "left": round(100 * entry["low"] / longest, 2),
            "span": round(100 * (entry["high"] - entry["low"]) / longest, 2),
            "text": f"{entry['value']:.3f}",
        }
        for entry in rows
    ]
    title = f"Recall@{k}, {tables.target_title(target)}"
    return {"title": title, "bars": bars, "more": count if count > len(models) else 0}


def _chapters(figures: Mapping[str, Sequence[Entry]], default: str, k: int, plots: Sequence[Plot]) -> list[Chapter]:
    """Everything below the first page; a chapter without a table or a plot is left out."""
    results = figures["results"]
    others = sorted({entry["k"] for entry in results} - {k})
    groups = [group for group in GROUP_TITLES if any(entry["users"] == group for entry in results)]
    groups = groups if len(groups) > 2 else groups[:1]  # one group alone is the same users as all
    targets = [target for target in ("served", "next") if any(entry["target"] == target for entry in results)]
    comparisons = figures.get("comparisons", [])
    ablated = {entry["other"] for entry in comparisons} - {entry["model"] for entry in results}
    chapters = [
        Chapter(
            id="all-models",
            title="All models by target",
            tables=[tables.by_target(results, metric, k, default) for metric in ("recall", "mrr")],
        ),
        Chapter(
            id="differences",
            title="Differences from the other models, with intervals",
            tables=_some(
                tables.differences([entry for entry in comparisons if entry["other"] not in ablated], metric)
                for metric in ("recall", "mrr")
            ),
        ),
        Chapter(
            id="ablation",
            title="Ablation: what each part is worth",
            tables=_some(
                tables.differences([entry for entry in comparisons if entry["other"] in ablated], metric)
                for metric in ("recall", "mrr")
            ),
        ),
        Chapter(
            id="retrieval",
            title="Recall of the retrievers",
            tables=tables.retrievers(figures.get("retrieval", [])),
        ),
        Chapter(
            id="users",
            title="By group of users and cut-off",
            tables=_some(
                [
                    *(tables.by_metric(results, target, group, k, default) for target in targets for group in groups),
                    *(tables.by_metric(results, target, "all", cut, default) for target in targets for cut in others),
                ]
            ),
        ),
        Chapter(
            id="slices",
            title="By history, activity and context",
            tables=_some(tables.breakdown(figures.get("breakdowns", []), by, default) for by in tables.BY_TITLES),
        ),
        Chapter(
            id="lists",
            title="What is recommended: coverage, popularity, repeats",
            tables=_some([tables.recommended(figures.get("recommended", []), default)]),
        ),
        Chapter(
            id="last-plays",
            title="Leave one out: the last play of each user alone",
            tables=_some([tables.by_metric(figures.get("leave_one_out", []), "next", "all", k, default)]),
        ),
        Chapter(
            id="vectors",
            title="Taste vectors and song embeddings",
            tables=[
                *_some([tables.pairwise(figures.get("pairwise", []), default)]),
                *tables.song_embeddings(figures.get(SONG_EMBEDDINGS, [])),
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


def _some(made: Any) -> list[Table]:
    return [table for table in made if table is not None]
