"""Score tables as pictures: intervals, and learning curves with single seeds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from cvlctl.figures import can_draw, caption, colours_of, label_axes, make_panels, save_figure
from cvlctl.score.rows import Record
from cvlctl.score.statistics import Confidence
from cvlctl.score.tables import curve
from cvlctl.types import EpisodeResult


def plot_curves(
    rows: Sequence[EpisodeResult], path: str | os.PathLike[str], **confidence: Unpack[Confidence]
) -> Path | None:
    """Learning curves (PNG), return and success, a panel per task; intervals shaded. None where steps are single."""
    curves = {metric: curve(rows, metric=metric, **confidence) for metric in ("return", "success")}
    single = all(len(record["steps"]) < 2 for records in curves.values() for record in records)
    if single or not can_draw():
        return None
    colours = colours_of(record["algorithm"] for record in curves["return"])
    figure, panels = make_panels(((metric, r["task"]) for metric, records in curves.items() for r in records), 3.1)
    for (metric, task), axes in panels.items():
        for record in curves[metric]:
            if record["task"] == task:
                steps, colour = record["steps"], colours[record["algorithm"]]
                axes.plot(steps, record["mean"], ".-", color=colour, markersize=6, linewidth=1.8)
                if record["low"] is not None:
                    axes.fill_between(steps, record["low"], record["high"], color=colour, alpha=0.15, linewidth=0)
        label_axes(axes, x="training steps", y=metric)
    handles = [
        axes.plot([], [], color=colour, linewidth=2.5, label=caption(name))[0] for name, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=9)
    return save_figure(figure, path)


def plot_profiles(
    profiles: Sequence[Record], efficiency: Sequence[Record], path: str | os.PathLike[str]
) -> Path | None:
    """Performance profiles (PNG), and beside them sample efficiency where there are several steps; bands are pointwise.

    None where there is no profile: fewer than two tasks, or no metric in common.
    """
    if not profiles or not can_draw():
        return None
    colours, metric = colours_of(record["algorithm"] for record in profiles), profiles[0]["metric"]
    several = any(len(record["steps"]) > 1 for record in efficiency)
    names = ["share of runs above", *(["IQM over runs and tasks"] if several else [])]
    figure, panels = make_panels((("", name) for name in names), 3.3)
    for records, (_, name), axes in zip((profiles, efficiency), panels, panels.values(), strict=False):
        x, y = ("tau", "share") if records is profiles else ("steps", "iqm")
        for record in records:
            colour = colours[record["algorithm"]]
            axes.plot(record[x], record[y], color=colour, linewidth=1.8, marker="." if name != names[0] else "")
            if record["low"] is not None:
                axes.fill_between(record[x], record["low"], record["high"], color=colour, alpha=0.15, linewidth=0)
    first, *second = panels.values()
    label_axes(first, x=metric, y="share of runs")
    first.set_ylim(-0.03, 1.03)
    for axes in second:
        label_axes(axes, x="training steps", y=metric)
    handles = [
        first.plot([], [], color=colour, linewidth=2.5, label=caption(name))[0] for name, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=9)
    return save_figure(figure, path)


def plot_scores(records: Sequence[Record], path: str | os.PathLike[str]) -> Path | None:
    """Return and success of `score_table` (PNG), a panel per task: every algorithm's mean, interval and runs (dots)."""
    if not can_draw():
        return None
    colours = colours_of(record["algorithm"] for record in records)
    names = list(colours)
    shown = [(m, r["task"]) for m in ("return", "success") for r in records if r[f"{m}_mean"] is not None]
    figure, panels = make_panels(shown, height=1.0 + 0.36 * len(names))
    for (metric, task), axes in panels.items():
        for record in records:
            value, low, high = (record[f"{metric}_mean{end}"] for end in ("", "_low", "_high"))
            if record["task"] != task or value is None:
                continue
            y, colour, runs = names.index(record["algorithm"]), colours[record["algorithm"]], record[f"{metric}_runs"]
            if low is not None:
                axes.plot([low, high], [y, y], color=colour, linewidth=7, alpha=0.3, solid_capstyle="butt")
            axes.plot(runs, [y + 0.27] * len(runs), "o", color=colour, markersize=3, alpha=0.5, markeredgewidth=0)
            axes.plot([value], [y], "o", color=colour, markersize=6.5, markeredgecolor="white")
        label_axes(axes, x=metric)
        axes.set_yticks(range(len(names)), list(map(caption, names)))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
    return save_figure(figure, path)
