"""Pictures of a model for the report: how its training went, and a map of its songs.

N songs, D dimensions.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LOSS_COLOR, RECALL_COLOR = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermillion; dashes tell them apart too
MAPPED = 2_000  # songs drawn, the most played
NAMED = 60  # of them with their titles, where there is room
TITLE_LETTERS = 28
LEGEND: dict[str, Any] = {"frameon": False, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG with the words around it."""

    file: str  # its name in the report's folder
    title: str
    note: str  # plain text
    alt: str
    png: bytes


def training_picture(epochs: Sequence[dict[str, Any]]) -> Picture | None:
    """Loss and validation recall by epoch, from the lines of epochs.jsonl; None where there are none."""
    if not epochs:
        return None
    recall = next((name for line in epochs for name in line if name.startswith("validation_recall")), None)
    figure, axes = _canvas()
    for phase, style, marker in (("selection", "-", "o"), ("final", "--", "s")):
        lines = [line for line in epochs if line["phase"] == phase]
        if lines:
            x, y = [line["epoch"] + 1 for line in lines], [line["loss"] for line in lines]
            name = "loss, to choose the epochs" if phase == "selection" else "loss, of the network kept"
            axes.plot(x, y, color=LOSS_COLOR, linestyle=style, marker=marker, markersize=5, label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    judged = [line for line in epochs if recall and line.get(recall) is not None]
    if recall and judged:
        other = axes.twinx()
        x, y = [line["epoch"] + 1 for line in judged], [line[recall] for line in judged]
        name = recall.replace("_", " ") + " (right)"
        other.plot(x, y, color=RECALL_COLOR, linestyle=":", marker="D", markersize=5, linewidth=2, label=name)
        other.set_ylabel(recall.replace("_", " "))
        handles = [axes.get_legend_handles_labels(), other.get_legend_handles_labels()]
        axes.legend(*(one + two for one, two in zip(*handles, strict=True)), **LEGEND)
    else:
        axes.legend(**LEGEND)
    note = "The validation range says after how many epochs to stop; then a network is trained again on both ranges."
    return Picture(
        file="training.png",
        title="How the training went",
        note=note,
        alt="Loss and validation recall by epoch",
        png=_png(figure),
    )


def song_map(vectors: np.ndarray, plays: np.ndarray, titles: Sequence[str]) -> Picture | None:
    """The most played songs on the two main axes of their vectors; None for fewer than three with a vector.

    `vectors` float32 (N, D), `plays` (N,) how often each was played; `titles` those of the NAMED most played, in
    that order. The axes are the principal components of what is drawn, from numpy's SVD.
    """
    songs = most_played(vectors, plays, MAPPED)
    if len(songs) < 3:
        return None
    points, share = principal_axes(vectors[songs])
    figure, axes = _canvas()
    size = 4 + 60 * plays[songs] / max(1, plays[songs].max())
    axes.scatter(*points.T, s=size, color=LOSS_COLOR, alpha=0.35, linewidths=0)
    _name_songs(axes, points, titles)
    axes.set_xlabel(f"first axis, {share[0]:.0%} of the variance")
    axes.set_ylabel(f"second axis, {share[1]:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    note = (
        f"The {len(songs):,} most played songs with a vector, on the two axes along which their vectors differ most; "
        f"the larger, the more played. Two axes of {vectors.shape[1]} show {share.sum():.0%} of the variance: "
        "songs that lie together here may lie apart in the others."
    )
    return Picture(file="songs.png", title="A map of the songs", note=note, alt="Songs on two axes", png=_png(figure))


def most_played(vectors: np.ndarray, plays: np.ndarray, count: int) -> np.ndarray:
    """int64: the most played songs that have a vector, at most `count`, the most played first."""
    known = np.flatnonzero(vectors.any(axis=1))
    return np.asarray(known[np.argsort(-plays[known], kind="stable")][:count])


def principal_axes(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places on the two main axes, float64 (N, 2), and the shares of the variance along them, float64 (2,)."""
    centered = vectors - vectors.mean(axis=0, dtype=np.float64)
    left, lengths, _ = np.linalg.svd(centered, full_matrices=False)
    variance = lengths**2
    return left[:, :2] * lengths[:2], variance[:2] / max(variance.sum(), 1e-12)


def _name_songs(axes: Any, points: np.ndarray, titles: Sequence[str]) -> None:
    """Write titles beside their points, the most played first; one that would lie on another is left out."""
    spans = np.maximum(np.ptp(points, axis=0), 1e-9)
    taken: list[np.ndarray] = []
    for point, title in zip(points, titles, strict=False):
        place = (point - points.min(axis=0)) / spans
        if any(abs(place[1] - other[1]) < 0.035 and abs(place[0] - other[0]) < 0.3 for other in taken):
            continue
        taken.append(place)
        short = title if len(title) <= TITLE_LETTERS else title[: TITLE_LETTERS - 1] + "…"
        right = place[0] > 0.7
        axes.annotate(
            short,
            point,
            xytext=(-5 if right else 5, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            fontsize=8,
        )


def _canvas() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
