"""Figures of marks as PNG, for slides: the same marks as in `svg`, drawn by matplotlib."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from cvlctl.experiments.reports.marks import GREY, INK, Figure, Mark, Panel
from cvlctl.experiments.reports.svg import box, placed
from cvlctl.figures import COLOURS, caption

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ALPHA = {"faint": 0.45, "interval": 0.3, "seed": 0.5, "band": 0.15, "bar": 0.8}
_WIDTH = {"faint": 0.8, "interval": 6.0, "whisker": 1.0, "line": 1.8}


def drawn(figure: Figure) -> bytes:
    """The PNG of a figure, laid out as its SVG."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.patches import Patch

    width, height, at = placed(figure)
    canvas = Canvas(figsize=(width / 100, height / 100))
    for panel, (x, y) in zip(figure.panels, at, strict=True):
        left, right, top, bottom = box(panel)
        area = ((x + left) / width, 1 - (y + bottom) / height, (right - left) / width, (bottom - top) / height)
        _panel(canvas.add_axes(area), panel)
    if figure.legend:
        names = [Patch(color=_colour(colour), label=caption(name)) for name, colour in figure.legend]
        canvas.legend(handles=names, loc="upper left", ncols=min(6, len(names)), frameon=False, fontsize=7.5)
    data = io.BytesIO()
    canvas.savefig(data, dpi=150, format="png")
    return data.getvalue()


def _colour(number: int) -> str:
    return {GREY: "#777777", INK: "#222222"}.get(number) or COLOURS[number % len(COLOURS)]


def _panel(axes: Axes, panel: Panel) -> None:
    for mark in panel.marks:
        _mark(axes, mark)
    axes.set_xlim(panel.x.low, panel.x.high)
    axes.set_ylim(panel.y.low, panel.y.high)
    axes.set_xticks([at for at, _ in panel.x.ticks], [caption(text) for _, text in panel.x.ticks])
    axes.set_yticks([at for at, _ in panel.y.ticks], [caption(text) for _, text in panel.y.ticks])
    axes.set_title(caption(panel.title), fontsize=8, fontweight="bold", loc="left", color="#333333")
    axes.set_xlabel(caption(panel.x.label), fontsize=7)
    axes.set_ylabel(caption(panel.y.label), fontsize=7)
    axes.tick_params(labelsize=7, color="#999999")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _mark(axes: Axes, mark: Mark) -> None:
    colour, alpha = _colour(mark.colour), _ALPHA.get(mark.kind, 1.0)
    if mark.kind in ("dot", "seed"):
        size = 3.0 if mark.kind == "seed" else 6.5
        axes.plot(mark.x, mark.y, "o", color=colour, alpha=alpha, markersize=size, markeredgecolor="white",
                  markeredgewidth=0 if mark.kind == "seed" else 0.8)  # fmt: skip
    elif mark.kind == "bar":
        height = mark.y[1] - mark.y[0]
        axes.barh(mark.y[0] + height / 2, mark.x[1] - mark.x[0], height, mark.x[0], color=colour, alpha=alpha)
    elif mark.kind == "band":
        half = len(mark.y) // 2
        axes.fill_between(mark.x, mark.y[:half], mark.y[half:], color=colour, alpha=alpha, linewidth=0)
    elif mark.kind == "cells":
        from matplotlib.collections import PolyCollection

        a, b = mark.size
        shapes = [[(x - a, y - b), (x + a, y - b), (x + a, y + b), (x - a, y + b)]
                  for x, y in zip(mark.x, mark.y, strict=True)]  # fmt: skip
        axes.add_collection(PolyCollection(shapes, facecolors=colour, alpha=mark.level, linewidths=0))
    else:
        points = [(x, y) for x, y in zip(mark.x, mark.y, strict=True) if math.isfinite(y)]
        ink = "#222222" if mark.kind == "whisker" else colour
        axes.plot(*zip(*points, strict=True), color=ink, alpha=alpha, linewidth=_WIDTH[mark.kind],
                  solid_capstyle="butt")  # fmt: skip
