"""The report of an evaluation: results.json for programs, report.html and a plot for people."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rayrec.evaluation.figure import cosine_figure
from rayrec.evaluation.pictures import Picture
from rayrec.evaluation.protocol import usual_k
from rayrec.evaluation.tables import (
    GROUP_TITLES,
    Entry,
    breakdown,
    compared,
    paired,
    recommended,
    section,
    song_vectors,
    targets,
)
from rayrec.storage.artifacts import Manifest, verify
from rayrec.storage.workspace import Workspace

RESULTS = "results.json"
FIGURE = "cosine_by_offset.png"
PAGE = "report.html"
CURVES = "cosine_by_offset"
SONG_VECTORS = "song_vectors"  # the health of the vectors behind the models: an entry for each table of them

EVERY_PLAY = (
    "Every play of the test range that has an earlier play by the same user is predicted from the plays before it."
)
AHEAD = (
    "How near the taste vector is to songs played later",
    "Mean cosine of the taste vector with the song so many plays ahead, each model in its own space of songs. "
    "The bars are bootstrap intervals over users.",
    "Mean cosine by offset, one line per model",
)

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
tbody th { font-weight: normal; min-width: 6.5rem; overflow-wrap: break-word; }
tr.default th, tr.default td { font-weight: 600; background: #fdf1e7; }
small { display: block; color: #595959; font-size: .75rem; font-weight: normal; }
td small { white-space: nowrap; }
td div { text-align: left; min-width: 14rem; }
img { width: 100%; min-width: 38rem; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .875rem; }
dt { color: #595959; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { font-size: 15px; padding: .75rem; } th, td { padding: .35rem .2rem; }
  th, td { font-size: .8125rem; } small { font-size: .625rem; } tbody th { min-width: 4.8rem; } }
"""


def write_report(
    workspace: Workspace,
    folder: str,
    figures: Mapping[str, Sequence[Entry]],
    *,
    default: str,
    about: dict[str, str],
    asked: str = EVERY_PLAY,
    pictures: Sequence[Picture] = (),
) -> list[str]:
    """Write the report's files to a folder of the workspace and return their names.

    `figures` are those of `figures_of`, or some of them, and the health of the song vectors. `default`
    names the model that `recommend` uses; `about` says what was judged, name by name, and `asked` what was
    predicted from what, for the head of the page. The plot is left out where there are no curves;
    `pictures` come at the end.
    """
    names = [RESULTS, PAGE]
    workspace.write_json(f"{folder}/{RESULTS}", {"default": default, "about": about, **figures})
    curves = figures.get(CURVES, [])
    figure = cosine_figure(curves) if curves else None
    if figure is not None:
        workspace.write_bytes(f"{folder}/{FIGURE}", figure)
        names.append(FIGURE)
    for picture in pictures:
        workspace.write_bytes(f"{folder}/{picture.file}", picture.png)
        names.append(picture.file)
    page = html_page(figures, figure, default=default, about=about, asked=asked, pictures=pictures)
    workspace.write_bytes(f"{folder}/{PAGE}", page.encode())
    return names


def read_figures(workspace: Workspace, report: Manifest) -> dict[str, Any]:
    """What an evaluation found, as `rayrec --json evaluate` prints it: the manifest's metrics, all figures but curves.

    The figures are those of results.json; it holds them in reports whose manifest held them too. Raises
    `DamagedArtifactError` where a file is missing or is not the one that was written.
    """
    verify(workspace, report)
    stored = workspace.read_json(report.path(RESULTS))
    return {**report.metrics, **{name: stored[name] for name in stored if name not in ("about", CURVES)}}


def headline(figures: Mapping[str, Sequence[Entry]], default: str) -> dict[str, float]:
    """recall@k and mrr@k by the model that `recommend` uses: served_recall@k and so on as served, then of all plays.

    Nothing where the model was not evaluated.
    """
    usual = usual_k([entry["k"] for entry in figures["results"]])
    values = {
        (entry["target"], entry["metric"]): entry["value"]
        for entry in figures["results"]
        if (entry["model"], entry["users"], entry["k"]) == (default, "all", usual)
    }
    return {
        f"{prefix}{metric}@{usual}": values[target, metric]
        for target, prefix in (("served", "served_"), ("next", ""))
        for metric in ("recall", "mrr")
        if (target, metric) in values
    }


def html_page(
    figures: Mapping[str, Sequence[Entry]],
    figure: bytes | None,
    *,
    default: str,
    about: dict[str, str],
    asked: str = EVERY_PLAY,
    pictures: Sequence[Picture] = (),
) -> str:
    """The report as one HTML page that needs no other file: the headline first, what differs behind it."""
    results = figures["results"]
    ks = [entry["k"] for entry in results]
    usual = usual_k(ks)
    next_play = [entry for entry in results if entry["target"] == "next"]
    groups = [group for group in GROUP_TITLES if any(entry["users"] == group for entry in next_play)]
    parts = [targets(results, usual, default), compared(figures.get("comparisons", []))]
    parts += [section(next_play, GROUP_TITLES[group], group, usual, default) for group in groups[:1]]
    if figure is not None:
        parts.append(_image(figure, *AHEAD))
    parts += [paired(figures.get("pairwise", []), default), recommended(figures.get("recommended", []), default)]
    if len(groups) > 2:  # one group alone is the same users as all
        parts += [section(next_play, GROUP_TITLES[group], group, usual, default) for group in groups[1:]]
    parts += [breakdown(figures.get("breakdowns", []), by, default) for by in ("history", "activity", "context")]
    left_out = figures.get("leave_one_out", [])
    if left_out:
        parts.append(section(left_out, "Leave one out: the last play of each user alone", "all", usual, default))
    others = sorted(set(ks) - {usual}, reverse=True)
    parts += [section(next_play, GROUP_TITLES[group], group, k, default) for k in others for group in groups[:1]]
    parts.append(song_vectors(figures.get(SONG_VECTORS, [])))
    parts += [_image(picture.png, picture.title, picture.note, picture.alt) for picture in pictures]
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in about.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Next-song evaluation</title><style>{STYLE}</style></head><body>"
        "<h1>How often the next song is found</h1>"
        f"<p>{escape(asked)} All songs of the catalog are candidates, repeats too; ties count against a model, and a "
        "song that no fit has seen is a miss. Figures are means over plays, with bootstrap intervals over users.</p>"
        f"<dl>{facts}</dl>{''.join(parts)}</body></html>\n"
    )


def _image(png: bytes, title: str, note: str, alt: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        f"<h2>{escape(title)}</h2><p>{escape(note)}</p>"
        f'<div class=scroll><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></div>'
    )
