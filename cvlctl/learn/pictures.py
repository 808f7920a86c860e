"""A run's metrics as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cvlctl.figures import COLOURS, can_draw, label_axes, make_panels, save_figure


def plot_metrics(metrics: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path | None:
    """Each metric of a metrics.jsonl over "step" (PNG): seeds (lists) thin, their mean bold. None without two steps."""
    series: dict[str, list[tuple[int, list[float]]]] = {}
    for line in metrics:
        for key, value in line.items():
            values = value if isinstance(value, list) else [value]
            if key != "step" and values and all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                series.setdefault(key, []).append((line["step"], values))
    series = {key: points for key, points in series.items() if len(points) > 1}
    if not series or not can_draw():
        return None
    figure, panels = make_panels([("", key) for key in series], height=2.5)
    for (_, key), axes in panels.items():
        steps = [step for step, _ in series[key]]
        for seed in range(min(len(values) for _, values in series[key])):
            axes.plot(steps, [values[seed] for _, values in series[key]], color=COLOURS[0], linewidth=0.8, alpha=0.35)
        axes.plot(steps, [sum(values) / len(values) for _, values in series[key]], color=COLOURS[0], linewidth=1.6)
        label_axes(axes, x="training steps")
    return save_figure(figure, path)
