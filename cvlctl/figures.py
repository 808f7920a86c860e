"""What all pictures share: panels, colours that the colour-blind tell apart, files replaced whole."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cvlctl.files import write_atomically
from cvlctl.progress import say
from cvlctl.terminal import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
LONGEST = 80  # characters of a caption


@cache
def can_draw() -> bool:
    """Whether matplotlib is there: scores do not fail for want of a picture, on a machine that was equipped by hand."""
    found = find_spec("matplotlib") is not None
    if not found:
        say("matplotlib is not installed: no pictures")
    return found


def short_names(tasks: Sequence[str]) -> dict[str, str]:
    """Tasks without the family before the slash, where that stays unambiguous."""
    short = {task: task.rsplit("/", 1)[-1] for task in tasks}
    return short if len(set(short.values())) == len(short) else {}


def caption(text: str) -> str:
    """Text out of files as a picture shows it: no control characters, no end of length, and dollars are no formulas."""
    shown = visible(text.replace("\n", " "))
    return (shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}...").replace("$", r"\$")


def make_panels(wanted: Iterable[tuple[str, str]], height: float) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """One panel for each different (metric, task), titled by the task; `height` of a panel in inches."""
    from matplotlib.figure import Figure

    wanted = list(dict.fromkeys(wanted))
    tasks = list(dict.fromkeys(task for _, task in wanted))
    across = len(tasks) if 1 < len(tasks) <= 4 else min(4, len(wanted)) or 1
    down = math.ceil(len(wanted) / across) or 1
    figure = Figure(figsize=(max(5.0, 3.6 * across + 0.6), height * down + 0.4), layout="constrained")
    panels = {}
    for position, (metric, task) in enumerate(wanted, start=1):
        axes = panels[metric, task] = figure.add_subplot(down, across, position)
        title = caption(short_names(tasks).get(task, task) if metric else task)
        axes.set_title(title, fontsize=10, loc="left", color="#333333")
        axes.tick_params(labelsize=8, color="#999999")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def label_axes(axes: Axes, x: str, y: str = "") -> None:
    axes.set_xlabel(caption(x), fontsize=9)
    axes.set_ylabel(caption(y), fontsize=9)
    for name, axis, limit in ((x, axes.xaxis, axes.set_xlim), (y, axes.yaxis, axes.set_ylim)):
        if name == "success":
            limit(-0.03, 1.03)
            axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        elif name == "training steps":
            axis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}")


def colours_of(names: Iterable[str]) -> dict[str, str]:
    names = dict.fromkeys(names)
    others = [name for name in names if name != "bc"]  # the usual baseline is grey
    return {name: COLOURS[others.index(name) % len(COLOURS)] if name in others else "#777777" for name in names}


def drawn(figure: Figure, kind: str) -> memoryview:
    """A figure as "png" or "svg": the same bytes whenever it is drawn."""
    import matplotlib

    data = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cvlctl"}):
        figure.savefig(data, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return data.getbuffer()


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Replace the PNG at `path`, whole and durably, and the same as SVG beside it."""
    path = Path(path)
    write_atomically(path.with_suffix(".svg"), drawn(figure, "svg"))
    write_atomically(path, drawn(figure, "png"))
    return path
