"""The plot of mean cosine by offset."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colors for the few curves that matter; the averages, which are one family, run
# from dark to light along one hue of cividis. Both are told apart by color-blind readers and in gray.
NETWORK_COLORS = ("#D55E00", "#CC79A7")
OTHER_COLORS = ("#009E73", "#56B4E9", "#000000")
FAMILY = "average-"
MARKERS = "osD^vPX*<>"
MARKED = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # offsets with a tick, a marker and an interval
LABEL_GAP = 0.042  # least distance between labels, as a share of the height


def cosine_figure(curves: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of the curves of `curves_of_tally`: one line each, its name at its end, its intervals as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = [curve for curve in curves if curve["offset"]]
    colors = _colors(drawn)
    shifts = np.geomspace(1 / 1.05, 1.05, len(drawn) + 2)[1:-1]
    for place, (curve, color, shift) in enumerate(zip(drawn, colors, shifts, strict=True)):
        _draw(axes, curve, color, MARKERS[place % len(MARKERS)], float(shift))
    _dress(axes, drawn)
    _label_ends(axes, drawn, colors)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def curve_name(curve: dict[str, Any], curves: Sequence[dict[str, Any]]) -> str:
    """The model's name, with the horizon where the model has several curves."""
    several = sum(other["model"] == curve["model"] for other in curves) > 1
    return f"{curve['model']}, {curve['horizon']}" if several else str(curve["model"])


def _colors(curves: Sequence[dict[str, Any]]) -> list[Any]:
    from matplotlib import colormaps

    family = [row for row, curve in enumerate(curves) if curve["model"].startswith(FAMILY)]
    shades = colormaps["cividis"](np.linspace(0.0, 0.82, max(1, len(family))))
    colors: list[Any] = []
    for row, curve in enumerate(curves):
        if row in family:
            colors.append(tuple(shades[family.index(row)]))
        else:
            choices = NETWORK_COLORS if curve["kind"] == "network" else OTHER_COLORS
            before = sum(other["kind"] == curve["kind"] for at, other in enumerate(curves[:row]) if at not in family)
            colors.append(choices[before % len(choices)])
    return colors


def _draw(axes: Axes, curve: dict[str, Any], color: Any, marker: str, shift: float) -> None:
    """The line, and at the marked offsets a marker and its interval, the latter moved aside by the factor `shift`."""
    offsets, value, low, high = (np.asarray(curve[name]) for name in ("offset", "value", "low", "high"))
    bold = curve["kind"] == "network"
    marked = np.isin(offsets, MARKED)
    axes.plot(offsets, value, color=color, linewidth=2.6 if bold else 1.2, alpha=1 if bold else 0.8)
    axes.vlines(offsets[marked] * shift, low[marked], high[marked], color=color, linewidth=1.2, alpha=0.55)
    axes.plot(offsets[marked], value[marked], color=color, linestyle="none", marker=marker, markersize=7 if bold else 5)


def _dress(axes: Axes, curves: Sequence[dict[str, Any]]) -> None:
    plays: dict[int, int] = {}  # behind each offset: the most of any curve
    for curve in curves:
        for offset, count in zip(curve["offset"], curve["plays"], strict=True):
            plays[offset] = max(count, plays.get(offset, 0))
    ticks = [offset for offset in MARKED if offset in plays]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick}\n{plays[tick]:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.9, max(2, *plays) * 1.1 if plays else 2)
    axes.set_xlabel("plays ahead of the question (1 is the next song); below it, how many plays are behind the mean")
    axes.set_ylabel("mean cosine with the taste vector")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _label_ends(axes: Axes, curves: Sequence[dict[str, Any]], colors: Sequence[Any]) -> None:
    """Each curve's name at its right end, moved apart where they would overlap."""
    if not curves:
        return
    bottom, top = axes.get_ylim()
    ends = np.array([(curve["value"][-1] - bottom) / (top - bottom) for curve in curves])
    heights = spread(ends, LABEL_GAP)
    for curve, color, end, height in zip(curves, colors, ends, heights, strict=True):
        axes.annotate(
            curve_name(curve, curves),
            xy=(1.0, end),
            xytext=(1.035, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=color,
            va="center",
            fontsize=9,
            fontweight="bold" if curve["kind"] == "network" else "normal",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 0},
            annotation_clip=False,
        )


def spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """float64: the heights moved as little as a sweep can, so that neighbours are at least `gap` apart.

    The order stays, and so does the mean height of each group that was moved apart.
    """
    groups: list[tuple[float, int]] = []  # mean height, members
    order = np.argsort(heights, kind="stable")
    for height in heights[order]:
        mean, size = float(height), 1
        while groups and mean - groups[-1][0] < gap * (size + groups[-1][1]) / 2:
            below, members = groups.pop()
            mean, size = (mean * size + below * members) / (size + members), size + members
        groups.append((mean, size))
    placed = [mean + gap * (place - (size - 1) / 2) for mean, size in groups for place in range(size)]
    moved = np.empty(len(heights))
    moved[order] = placed
    return moved
