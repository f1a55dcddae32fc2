"""The report of an evaluation: results.json for programs, report.html and a plot for people."""

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from rayrec.evaluation.figure import cosine_figure
from rayrec.workspace import Workspace

RESULTS = "results.json"
FIGURE = "cosine_by_offset.png"
PAGE = "report.html"

GROUP_TITLES = {
    "all": "All users",
    "seen": "Users with plays before the cut",
    "new": "New users: no play before the cut",
    "held_out": "Users held out of every fit",
}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto;
       max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 45rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th { font-weight: 600; }
th:first-child { text-align: left; }
tbody th { font-weight: normal; overflow-wrap: anywhere; }
tr.default th, tr.default td { font-weight: 600; background: #fdf1e7; }
small { display: block; color: #595959; font-size: .75rem; font-weight: normal; }
td small { white-space: nowrap; }
img { width: 100%; min-width: 38rem; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .875rem; }
dt { color: #595959; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { font-size: 15px; padding: .75rem; } th, td { padding: .35rem .3rem; }
  th, td { font-size: .8125rem; } small { font-size: .6875rem; } }
"""


def write_report(
    workspace: Workspace,
    folder: str,
    results: Sequence[dict[str, Any]],
    curves: Sequence[dict[str, Any]],
    *,
    default: str,
    about: dict[str, str],
) -> list[str]:
    """Write the report's files to a folder of the workspace and return their names.

    `default` names the model that `recommend` uses; `about` says what was judged, name by name, for
    the head of the page. The figure is left out where there are no curves.
    """
    names = [RESULTS, PAGE]
    workspace.write_json(
        f"{folder}/{RESULTS}",
        {"default": default, "results": list(results), "cosine_by_offset": list(curves), "about": about},
    )
    figure = cosine_figure(curves) if curves else None
    if figure is not None:
        workspace.write_bytes(f"{folder}/{FIGURE}", figure)
        names.append(FIGURE)
    page = html_page(results, figure, default=default, about=about)
    workspace.write_bytes(f"{folder}/{PAGE}", page.encode())
    return names


def html_page(results: Sequence[dict[str, Any]], figure: bytes | None, *, default: str, about: dict[str, str]) -> str:
    """The report as one HTML page that needs no other file."""
    ks = sorted({entry["k"] for entry in results}, reverse=True)
    groups = [group for group in GROUP_TITLES if any(entry["users"] == group for entry in results)]
    shown = groups if len(groups) > 2 else groups[:1]  # one group alone is the same users as all
    parts = [section(results, group, ks[0], default) for group in shown]
    if figure is not None:
        parts.insert(1, _figure(figure))
    if groups:
        parts += [section(results, groups[0], k, default) for k in ks[1:]]
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in about.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Next-song evaluation</title><style>{STYLE}</style></head><body>"
        "<h1>How often the next song is found</h1>"
        "<p>Every play of the test range that has an earlier play by the same user is predicted from the plays "
        "before it. All songs of the catalog are candidates, repeats too; ties count against a model, and a song "
        "that no fit has seen is a miss. Figures are means over plays, with bootstrap intervals over users.</p>"
        f"<dl>{facts}</dl>{''.join(parts)}</body></html>\n"
    )


def section(results: Sequence[dict[str, Any]], group: str, k: int, default: str) -> str:
    """A heading and a table of one group of users at one cut-off, the best recall first."""
    entries = [entry for entry in results if entry["users"] == group and entry["k"] == k]
    metrics = list(dict.fromkeys(entry["metric"] for entry in entries))
    by_model: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in entries:
        by_model.setdefault(entry["model"], {})[entry["metric"]] = entry
    ranked = sorted(by_model, key=lambda model: -by_model[model][metrics[0]]["value"])
    head = "".join(f"<th scope=col>{_metric_title(metric)}@{k}</th>" for metric in metrics)
    rows = "".join(_row(model, [by_model[model][metric] for metric in metrics], default) for model in ranked)
    plays, users = entries[0]["plays"], entries[0]["users_count"]
    return (
        f"<h2>{escape(GROUP_TITLES[group])}, first {k}</h2><p>{plays:,} plays of {users:,} users.</p>"
        f"<div class=scroll><table><thead><tr><th scope=col>model</th>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(model: str, entries: Sequence[dict[str, Any]], default: str) -> str:
    cells = "".join(
        f"<td>{entry['value']:.4f}<small>{entry['low']:.4f}–{entry['high']:.4f}</small></td>" for entry in entries
    )
    mark = "<small>what recommend uses</small>" if model == default else ""
    style = " class=default" if model == default else ""
    return f"<tr{style}><th scope=row>{escape(model)}{mark}</th>{cells}</tr>"


def _metric_title(metric: str) -> str:
    return metric if metric == "recall" else metric.upper()


def _figure(figure: bytes) -> str:
    data = base64.b64encode(figure).decode()
    return (
        "<h2>How near the taste vector is to songs played later</h2>"
        "<p>Mean cosine of the taste vector with the song so many plays ahead, each model in its own space of songs. "
        "The bars are bootstrap intervals over users.</p>"
        '<div class=scroll><img alt="Mean cosine by offset, one line per model" '
        f'src="data:image/png;base64,{data}"></div>'
    )
