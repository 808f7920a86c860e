"""A run's metrics as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cvlctl.figures import COLOURS, can_draw, label_axes, make_panels, save_figure

HELD_OUT = "validation/"  # before the names of held-out losses


def plot_metrics(metrics: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path | None:
    """Each metric of a metrics.jsonl over "step" (PNG): seeds (lists) thin, their mean bold, and
    held-out losses (`validation/...`) in their panel, in a second colour. None without two steps."""
    series: dict[str, list[tuple[int, list[float]]]] = {}
    for line in metrics:
        for key, value in line.items():
            values = value if isinstance(value, list) else [value]
            if key != "step" and values and all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                series.setdefault(key, []).append((line["step"], values))
    series = {key: points for key, points in series.items() if len(points) > 1}
    if not series or not can_draw():
        return None
    own = [key for key in series if key.removeprefix(HELD_OUT) not in series or not key.startswith(HELD_OUT)]
    figure, panels = make_panels([("", key) for key in own], height=2.5)
    for (_, key), axes in panels.items():
        _draw(axes, series[key], COLOURS[0], "training")
        if HELD_OUT + key in series:
            _draw(axes, series[HELD_OUT + key], COLOURS[1], "held out")
            axes.legend(frameon=False, fontsize=8)
        label_axes(axes, x="training steps")
    return save_figure(figure, path)


def _draw(axes: Any, points: list[tuple[int, list[float]]], colour: str, name: str) -> None:
    steps = [step for step, _ in points]
    for seed in range(min(len(values) for _, values in points)):
        axes.plot(steps, [values[seed] for _, values in points], color=colour, linewidth=0.8, alpha=0.35)
    means = [sum(values) / len(values) for _, values in points]
    axes.plot(steps, means, color=colour, linewidth=1.6, label=name)
