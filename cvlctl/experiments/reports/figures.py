"""The figures of a report: records of tables, and rows, as panels of marks. What hovering tells stands in the tables

Figures of many runs keep every run's score, and of lines as many points as `POINTS` leaves to each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

from cvlctl.experiments.reports.marks import Figure, Mark, Panel, axis, names_axis, thinned
from cvlctl.figures import short_names
from cvlctl.score.render import cell
from cvlctl.score.rows import METRICS, Record, as_tree, scores_of
from cvlctl.score.statistics import Confidence
from cvlctl.score.tables import curve
from cvlctl.types import EpisodeResult

POINTS = 4_000  # of all lines of a panel
MOST_PANELS = 60  # of a figure

Series = Mapping[str, Mapping[str, list[tuple[int, list[float]]]]]  # run -> metric -> (step, a value a seed)


def intervals(table: Sequence[Record], named: Mapping[str, int]) -> Figure | None:
    """Return and success of a score table, a panel a task: each algorithm's mean, its interval, and its runs."""
    short = short_names([record["task"] for record in table])
    panels = []
    for metric, task in _panels_of(table, ("return", "success")):
        rows = [r for r in table if r["task"] == task and r[f"{metric}_mean"] is not None]
        marks, values = list[Mark](), list[float]()
        for y, record in enumerate(rows):
            key, colour = f"{metric}_mean", named[record["algorithm"]]
            value, low, high = (record[key + end] for end in ("", "_low", "_high"))
            title = f"{record['algorithm']}: {metric} {cell(record, key)}, {_seeds(record['runs'])}"
            if low is not None:
                marks.append(Mark("interval", (low, high), (y, y), colour, title))
            runs = record[f"{metric}_runs"]
            marks += [
                Mark("seed", (x,), (y + 0.3,), colour, f"{record['algorithm']}: {_plain(x, metric)}") for x in runs
            ]
            marks.append(Mark("dot", (value,), (y,), colour, title))
            values += [x for x in (value, low, high, *runs) if x is not None]
        across = axis(_label(metric), values, per_cent=metric == "success")
        names = names_axis([record["algorithm"] for record in rows])
        panels.append(Panel(short.get(task, task), across, names, marks, 64 + 22 * len(rows)))
    about = "Mean of each algorithm's runs (dot), its interval (band), and every run (small dots below)."
    return _figure("scores", about, panels)


def bars(table: Sequence[Record], named: Mapping[str, int]) -> Figure | None:
    """Every task's scores as bars from 0, on the scale that all tasks have: normalised, success, or else return."""
    common = [metric for metric in ("normalised", "success") if all(r[f"{metric}_mean"] is not None for r in table)]
    metric = (common or ["return"])[0]
    short, key = short_names([record["task"] for record in table]), f"{metric}_mean"
    ends = [r[key + end] for r in table for end in ("", "_low", "_high") if r[key + end] is not None]
    panels = []
    for task in dict.fromkeys(record["task"] for record in table):
        rows = [record for record in table if record["task"] == task]
        own = [r[key + end] for r in rows for end in ("", "_low", "_high") if r[key + end] is not None]
        across = axis(_label(metric), ends if common else own, zero=True, per_cent=metric == "success")
        marks = []
        for y, record in enumerate(rows):
            value, low, high = (record[key + end] for end in ("", "_low", "_high"))
            title = f"{record['algorithm']}: {metric} {cell(record, key)}"
            marks.append(Mark("bar", (0, value), (y - 0.36, y + 0.36), named[record["algorithm"]], title))
            if low is not None:
                marks.append(Mark("whisker", (low, high), (y, y), named[record["algorithm"]], title))
        names = names_axis([record["algorithm"] for record in rows])
        panels.append(Panel(short.get(task, task), across, names, marks, 60 + 17 * len(rows)))
    about = f"{metric.capitalize()} by task, with intervals" + (
        "; one scale for all tasks." if common and len(panels) > 1 else "."
    )
    return _figure("bars", about, panels)


def profiles(shares: Sequence[Record], efficiency: Sequence[Record], named: Mapping[str, int]) -> Figure | None:
    """Performance profiles, and beside them sample efficiency where there are several steps."""
    panels = []
    if shares:
        metric = shares[0]["metric"]
        marks = [mark for r in shares for mark in _with_band(r, "tau", "share", named[r["algorithm"]])]
        high = max(shares[0]["tau"])
        panels.append(Panel("performance profiles", axis(f"{metric} score above", (0, high), per_cent=high == 1),
                            axis("share of runs", (), per_cent=True), marks, 250))  # fmt: skip
    lines = [record for record in efficiency if len(record["steps"]) > 1]
    if lines:
        steps = axis("training steps", [x for r in lines for x in r["steps"]])
        marks = [mark for r in lines for mark in _with_band(r, "steps", "iqm", named[r["algorithm"]])]
        up = axis(f"IQM, {lines[0]['metric']}", [y for mark in marks for y in mark.y])
        panels.append(Panel("sample efficiency", steps, up, marks, 250))
    about = "Over all runs and tasks. Left: the share of runs whose score is above the value on the axis."
    return _figure("profiles", about, panels, named)


def learning(
    rows: Sequence[EpisodeResult], named: Mapping[str, int], **confidence: Unpack[Confidence]
) -> Figure | None:
    """Scores over training, a panel a task and metric: the mean, its interval, and single seeds. None of one step."""
    tree = as_tree(rows)
    panels = []
    short = short_names(list(dict.fromkeys(task for task, _ in tree)))
    for metric in ("return", "success"):
        records = [record for record in curve(rows, metric=metric, **confidence) if len(record["steps"]) > 1]
        for task in dict.fromkeys(record["task"] for record in records):
            of_task = [record for record in records if record["task"] == task]
            marks = [mark for r in of_task for mark in _seeds_of(tree[task, r["algorithm"]], metric, named, r)]
            marks += [mark for r in of_task for mark in _with_band(r, "steps", "mean", named[r["algorithm"]])]
            steps = axis("training steps", [x for mark in marks for x in mark.x])
            up = axis(_label(metric), [y for mark in marks for y in mark.y], per_cent=metric == "success")
            panels.append(Panel(short.get(task, task), steps, up, marks))
    about = "Mean over runs (bold), its interval (shaded), and single seeds (thin)."
    return _figure("learning", about, panels, named)


def training(
    series: Series, tasks: Mapping[str, str], labels: Mapping[str, str], named: Mapping[str, int], unread: int = 0
) -> Figure | None:
    """What runs have logged, a panel a task and metric, a line a seed; the first `MOST_PANELS` panels.

    `unread`: so many more runs were left out beforehand.
    """
    wanted = sorted({(tasks[run], metric) for run, metrics in series.items() for metric in metrics})
    panels = []
    short = short_names(list(dict.fromkeys(tasks.values())))
    for task, metric in wanted[:MOST_PANELS]:
        runs = [run for run in series if tasks[run] == task and metric in series[run]]
        num = sum(len(series[run][metric][0][1]) for run in runs)
        marks = []
        for run in runs:
            points = series[run][metric]
            kept = [points[i] for i in thinned(len(points), max(8, POINTS // num))]
            steps = [step for step, _ in kept]
            for seed in range(min(len(values) for _, values in kept)):
                ys = [values[seed] for _, values in kept]
                title = f"{labels[run]}, seed {seed + 1} of {len(kept[0][1])}: {ys[-1]:.4g} at step {steps[-1]}"
                marks.append(Mark("faint", steps, ys, named[labels[run]], title))
        up = axis("", [y for mark in marks for y in mark.y])
        title = f"{metric}, {short.get(task, task)}" if len(set(tasks.values())) > 1 else metric
        across = axis("updates", [x for mark in marks for x in mark.x])
        panels.append(Panel(title, across, up, marks, 190))
    left = len(wanted) - len(panels)
    about = "What training logged, a line a seed." + (f" {left} more panels are left out." if left else "")
    about += f" So are {unread} runs of other tasks." if unread else ""
    return _figure("training", about, panels, named)


def series_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, list[float]]]]:
    """Metric -> (step, a value a seed), of what has two steps and is finite throughout, from lines of metrics.jsonl."""
    found: dict[str, list[tuple[int, list[float]]]] = {}
    for line in lines:
        for key, value in line.items():
            values = value if isinstance(value, list) else [value]
            if key != "step" and values and all(type(v) in (int, float) and math.isfinite(v) for v in values):
                found.setdefault(key, []).append((line["step"], values))
    return {key: points for key, points in found.items() if len(points) > 1}


def _seeds_of(runs: Mapping[int, Any], metric: str, named: Mapping[str, int], record: Record) -> Iterable[Mark]:
    for seed, by_step in runs.items():
        at = [step for step in sorted(by_step) for _ in scores_of([by_step[step]], metric)]
        ys = [float(x[0, 0]) for step in at for x in scores_of([by_step[step]], metric)]
        if len(at) > 1:
            title = f"{record['algorithm']}, seed {seed}: {_plain(ys[-1], metric)} at step {at[-1]}"
            yield Mark("faint", at, ys, named[record["algorithm"]], title)


def _with_band(record: Record, x: str, y: str, colour: int) -> list[Mark]:
    last = f"{record['algorithm']}: {record[y][-1]:.4g} at {record[x][-1]:g}, {_seeds(record['runs'])}"
    if y == "share":
        middle = len(record[x]) // 2
        last = f"{record['algorithm']}: {record[y][middle]:.0%} of runs above {record[x][middle]:g}"
    found = [Mark("line", record[x], record[y], colour, last)]
    if record["low"] is not None:
        found.insert(0, Mark("band", record[x], [*record["low"], *record["high"]], colour))
    return found


def _panels_of(table: Sequence[Record], metrics: Sequence[str]) -> list[tuple[str, str]]:
    shown = [(m, r["task"]) for m in metrics if m in METRICS for r in table if r[f"{m}_mean"] is not None]
    return list(dict.fromkeys(shown))


def _figure(name: str, about: str, panels: Sequence[Panel], named: Mapping[str, int] | None = None) -> Figure | None:
    shown = {mark.colour for panel in panels for mark in panel.marks}
    return Figure(name, about, panels, [pair for pair in (named or {}).items() if pair[1] in shown]) if panels else None


def _label(metric: str) -> str:
    return {"normalised": "normalised score"}.get(metric, metric)


def _plain(value: float, metric: str) -> str:
    return f"{value:.0%}" if metric == "success" else f"{value:.4g}"


def _seeds(num: int) -> str:
    return "1 seed" if num == 1 else f"{num} seeds"
