"""Plots of the report: mean cosine by offset, loss and recall of the training, and a map of the songs.

N songs, D dimensions.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrec.embeddings.vectors import principal_axes

# Colors of Okabe and Ito for the few main curves; the averages, which are one family, run from dark
# to light in cividis. Color-blind readers can distinguish both, also in gray.
NETWORK_COLORS = ("#D55E00", "#CC79A7")
OTHER_COLORS = ("#009E73", "#56B4E9", "#000000")
LOSS_COLOR, RECALL_COLOR = "#0072B2", "#D55E00"
FAMILY = "average-"
MARKERS = "osD^vPX*<>"
MARKED_OFFSETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # offsets with a tick, a marker and an interval
MAP_SONGS = 2_000  # songs on the map, the most played ones
TITLED_SONGS = 12  # songs of the map whose titles are in the legend
TITLE_LETTERS = 40
LEGEND: dict[str, Any] = {"frameon": False, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot as PNG, with its title, note and alternative text."""

    file: str  # its name in the report's folder
    title: str
    note: str  # plain text
    alt: str
    png: bytes


def cosine_plot(curves: Sequence[dict[str, Any]]) -> Plot | None:
    """Plot the curves of `Statistics.cosine_by_offset`, one line each with intervals as bars; None without curves."""
    plotted_curves = [curve for curve in curves if curve["offset"]]
    if not plotted_curves:
        return None
    figure, axes = _canvas()
    has_intervals = any(np.less(curve["low"], curve["high"]).any() for curve in plotted_curves)  # False without samples
    shifts = np.geomspace(1 / 1.05, 1.05, len(plotted_curves) + 2)[1:-1]
    for index, (curve, color, shift) in enumerate(zip(plotted_curves, _colors(plotted_curves), shifts, strict=True)):
        offsets, values, low, high = (np.asarray(curve[name]) for name in ("offset", "value", "low", "high"))
        is_network = curve["kind"] == "network"
        is_marked = np.isin(offsets, MARKED_OFFSETS)
        style = {"color": color, "marker": MARKERS[index % len(MARKERS)], "markersize": 7 if is_network else 5}
        axes.plot(
            offsets,
            values,
            linewidth=2.6 if is_network else 1.2,
            markevery=np.flatnonzero(is_marked).tolist(),
            label=curve_name(curve, plotted_curves),
            **style,
        )
        axes.vlines(offsets[is_marked] * shift, low[is_marked], high[is_marked], color=color, linewidth=1.2, alpha=0.55)
    plays: dict[int, int] = {}  # by offset: the largest number of any curve
    for curve in plotted_curves:
        for offset, count in zip(curve["offset"], curve["plays"], strict=True):
            plays[offset] = max(count, plays.get(offset, 0))
    ticks = [offset for offset in MARKED_OFFSETS if offset in plays]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick}\n{plays[tick]:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("plays ahead of the query (1 is the next play); below: number of plays in the mean")
    axes.set_ylabel("mean cosine with the taste vector")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(**LEGEND)
    return Plot(
        file="cosine_by_offset.png",
        title="Taste vectors and songs played later",
        note="Mean cosine of the taste vector with the song played that many plays later; each model uses its own song "
        f"embeddings.{' The bars are bootstrap intervals over users.' if has_intervals else ''}",
        alt="Mean cosine by offset, one line per model",
        png=_png(figure),
    )


def curve_name(curve: dict[str, Any], curves: Sequence[dict[str, Any]]) -> str:
    """Return the model's name, with the horizon if the model has several curves."""
    has_several_curves = sum(other_curve["model"] == curve["model"] for other_curve in curves) > 1
    return f"{curve['model']}, {curve['horizon']}" if has_several_curves else str(curve["model"])


def _colors(curves: Sequence[dict[str, Any]]) -> list[Any]:
    from matplotlib import colormaps

    family_indices = [index for index, curve in enumerate(curves) if curve["model"].startswith(FAMILY)]
    shades = colormaps["cividis"](np.linspace(0.0, 0.82, max(1, len(family_indices))))
    colors: list[Any] = []
    for index, curve in enumerate(curves):
        if index in family_indices:
            colors.append(tuple(shades[family_indices.index(index)]))
        else:
            palette = NETWORK_COLORS if curve["kind"] == "network" else OTHER_COLORS
            num_before = sum(
                other_curve["kind"] == curve["kind"]
                for other_index, other_curve in enumerate(curves[:index])
                if other_index not in family_indices
            )
            colors.append(palette[num_before % len(palette)])
    return colors


def training_plot(epochs: Sequence[dict[str, Any]]) -> Plot | None:
    """Plot loss and validation recall by epoch, from the lines of epochs.jsonl; None without lines."""
    if not epochs:
        return None
    recall_name = next((name for line in epochs for name in line if name.startswith("validation_recall")), None)
    figure, axes = _canvas()
    for phase, style, marker in (("selection", "-", "o"), ("final", "--", "s")):
        lines = [line for line in epochs if line["phase"] == phase]
        if lines:
            x, y = [line["epoch"] + 1 for line in lines], [line["loss"] for line in lines]
            name = "loss, selection phase" if phase == "selection" else "loss, final network"
            axes.plot(x, y, color=LOSS_COLOR, linestyle=style, marker=marker, markersize=5, label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    validated_lines = [line for line in epochs if recall_name and line.get(recall_name) is not None]
    handles, labels = axes.get_legend_handles_labels()
    if recall_name and validated_lines:
        recall_axes = axes.twinx()
        x, y = [line["epoch"] + 1 for line in validated_lines], [line[recall_name] for line in validated_lines]
        name = recall_name.replace("_", " ") + " (right)"
        handles += recall_axes.plot(x, y, color=RECALL_COLOR, linestyle=":", marker="D", markersize=5, linewidth=2)
        labels.append(name)
        recall_axes.set_ylabel(recall_name.replace("_", " "))
    axes.legend(handles, labels, **LEGEND)
    return Plot(
        file="training.png",
        title="Training",
        note="The selection phase chooses the number of epochs on the validation range; the final network is trained "
        "on the training and validation ranges.",
        alt="Loss and validation recall by epoch",
        png=_png(figure),
    )


def song_map(vectors: np.ndarray, plays: np.ndarray, titles: Sequence[str]) -> Plot | None:
    """Plot the most played songs on the two main axes of their vectors; None for fewer than three with a vector.

    `vectors` is float32 (N, D); `plays`, (N,), is the number of plays of each song. `titles` are those of the
    TITLED_SONGS most played songs, in this order; these songs are numbered on the map and listed in its legend.
    """
    songs = most_played(vectors, plays, MAP_SONGS)
    if len(songs) < 3:
        return None
    points, variance_shares = principal_axes(vectors[songs])
    figure, axes = _canvas()
    sizes = 4 + 60 * plays[songs] / max(1, plays[songs].max())
    axes.scatter(*points.T, s=sizes, color=LOSS_COLOR, alpha=0.35, linewidths=0)
    for number, (point, title) in enumerate(zip(points, titles[:TITLED_SONGS], strict=False), 1):
        short_title = title if len(title) <= TITLE_LETTERS else title[: TITLE_LETTERS - 1] + "…"
        label = short_title.replace("$", r"\$")  # else the title may be read as a formula
        axes.scatter(*point, marker=f"${number}$", s=90, color="black", linewidths=0.4, label=label)
    axes.set_xlabel(f"first component, {variance_shares[0]:.0%} of the variance")
    axes.set_ylabel(f"second component, {variance_shares[1]:.0%} of the variance")
    axes.spines[["top", "right"]].set_visible(False)
    if titles:
        axes.legend(**{**LEGEND, "ncols": 2}, fontsize=8)
    note = (
        f"The {len(songs):,} most played songs with an embedding, on the first two principal components of their "
        f"embeddings. Larger points have more plays. These 2 of {vectors.shape[1]} components explain "
        f"{variance_shares.sum():.0%} of the variance: songs that are close here may be far apart in the others."
    )
    alt = "Songs on the first two principal components"
    return Plot(file="songs.png", title="Map of the songs", note=note, alt=alt, png=_png(figure))


def most_played(vectors: np.ndarray, plays: np.ndarray, count: int) -> np.ndarray:
    """int64: the most played songs that have a vector, at most `count`, the most played first."""
    songs_with_vector = np.flatnonzero(vectors.any(axis=1))
    return np.asarray(songs_with_vector[np.argsort(-plays[songs_with_vector], kind="stable")][:count])


def _canvas() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
