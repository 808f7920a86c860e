"""Score records, rows and metrics -> tables (rich, CSV, JSON, Markdown) and pictures (PNG). Nothing is computed here.

Whatever shows a score shows how sure it is, and of how many seeds; the notes under a table say what its intervals mean.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from rich import box
from rich.table import Table
from rich.text import Text

from cvlctl.scores import Confidence, Record, curve
from cvlctl.types import EpisodeResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMES = {"task": "task", "algorithm": "algorithm", "baseline": "against", "metric": "metric"}
_COUNTS = {"seed": "seed", "tasks": "tasks", "runs": "seeds", "episodes": "episodes"}
_SCORES = {"return_mean": "return", "success_mean": "success", "normalised_mean": "normalised"}
_OFFLINE = {"offline_mean": "offline estimate", "discounted_mean": "discounted return"}
_AGGREGATES = {"iqm": "IQM", "mean": "mean", "median": "median", "optimality_gap": "optimality gap"}
_COMPARISONS = {"difference": "difference", "probability_of_improvement": "P(better)"}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")


def to_rich(records: Sequence[Record], title: str = "") -> Table:
    """A table of any of the records of `scores`; the best of each task is bold. Readable in 100 columns."""
    table = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.caption, table.caption_justify, table.caption_style = "\n".join(_notes(records)), "left", "dim"
    columns = _columns(records)
    for key, heading, _ in columns:
        # long names break at hyphens, underscores and spaces; in a narrow window the intervals wrap, never the names
        fixed = key in _NAMES or key in _COUNTS
        table.add_column(heading, no_wrap=fixed, overflow="fold", justify="left" if key in _NAMES else "right")
    for i, record in enumerate(records):
        texts = ["\n".join(folded(cells[i], 18)) if key in _NAMES else cells[i] for key, _, cells in columns]
        if i > 0 and record.get("task") != records[i - 1].get("task"):
            table.add_section()
        elif i > 0 and "task" in record:
            texts[0] = ""
        best = ["bold" if _is_best(records, i, key) else "" for key, _, _ in columns]
        table.add_row(*map(Text, texts, best))
    return table


def to_markdown(records: Sequence[Record], title: str = "") -> str:
    """A Markdown table, its best scores bold, its notes below."""
    columns = _columns(records)
    lines = [f"### {title}", ""] if title else []
    lines += ["| " + " | ".join(heading for _, heading, _ in columns) + " |"]
    lines += ["|" + "|".join(" --- " if key in _NAMES else " ---: " for key, _, _ in columns) + "|"]
    for i in range(len(records)):
        cells = [(cells[i].replace("|", r"\|"), _is_best(records, i, key)) for key, _, cells in columns]
        lines.append("| " + " | ".join(f"**{cell}**" if best else cell for cell, best in cells) + " |")
    return "\n".join([*lines, "", *(note + "  " for note in _notes(records))]).rstrip() + "\n"


def to_csv(records: Sequence[Record]) -> str:
    """Every key of the records, one line each; lists are joined by semicolons, None is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: ";".join(map(str, v)) if isinstance(v, list) else v for k, v in record.items()})
    return file.getvalue()


def folded(name: str, width: int) -> list[str]:
    """Lines of at most `width`, broken after hyphens, underscores, dots and spaces, never within a word."""
    lines = [""]
    for piece in re.findall(r"[^-_. ]+[-_. ]?|[-_. ]", name):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _columns(records: Sequence[Record]) -> list[tuple[str, str, list[str]]]:
    """(key, heading, cells), without the columns that are empty throughout."""
    short = _short_names([record["task"] for record in records if "task" in record])
    columns = []
    for key, heading in (_NAMES | _COUNTS | _SCORES | _OFFLINE | _AGGREGATES | _COMPARISONS).items():
        if any(record.get(key) is not None for record in records):
            plain = key in _NAMES or key in _COUNTS
            cells = [str(short.get(r[key], r[key])) if plain else _cell(r, key) for r in records]
            columns.append((key, heading, cells))
    return columns or [("", "nothing to show", [])]


def _cell(record: Record, key: str) -> str:
    value, low, high = (record.get(key + end) for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    percent = key in ("success_mean", "probability_of_improvement") or record.get("metric") == "success"
    # one number of digits a cell: percents whole, returns above 100 whole, the rest by their size
    size = max(abs(x) for x in (value, low, high) if x is not None)
    digits = 0 if percent or size > 100 else 1 if size > 1 else 3
    shown = [round(100 * x if percent else x, digits) + 0.0 for x in (value, low, high) if x is not None]  # no -0
    text, *interval = (f"{x:.{digits}f}" for x in shown)
    text += "%" * percent
    if interval and not (
        key == "probability_of_improvement" and interval[0] == interval[1]
    ):  # nothing left to resample
        return f"{text} [{', '.join(interval)}]"
    return f"{text} (1 run)" if 1 in (record.get("runs"), record.get("baseline_runs")) else text


def _is_best(records: Sequence[Record], i: int, key: str) -> bool:
    if key not in (_SCORES | _OFFLINE | _AGGREGATES) or "seed" in records[i]:
        return False
    group = [r[key] for r in records if r.get("task") == records[i].get("task") and r.get(key) is not None]
    return len(group) > 1 and records[i].get(key) == (min if key == "optimality_gap" else max)(group)


def _notes(records: Sequence[Record]) -> list[str]:
    if not records:
        return []
    level = f"in brackets: {100 * records[0].get('level', 0.95):g}% interval"
    if "seed" in records[0]:
        return [f"{level} over one policy's episodes (Wilson's for success); it says nothing of other seeds"]
    runs = [record[key] for record in records for key in ("runs", "baseline_runs") if key in record]
    seeds = "bootstrap over seeds, which all meet the same starts; each run's last checkpoint"
    notes = [f"{level}, {seeds}" if max(runs, default=2) > 1 else "one seed: no intervals"]
    if any(1 < num < 5 for num in runs):
        notes.append("fewer than five seeds: the intervals are narrower than the truth")
    notes += dict.fromkeys(
        f"offline: the discounted return (gamma {r['gamma']:g}) that fitted Q evaluation expects, from the store alone"
        for r in records
        if "gamma" in r
    )
    notes += dict.fromkeys(f"episodes cut off at {r['horizon']} steps" for r in records if "horizon" in r)
    notes += dict.fromkeys(
        f"simulated by {r['backend']}: the starts are not those of gymnasium's episodes"
        for r in records
        if "backend" in r
    )
    notes += dict.fromkeys(_reference(r) for r in records if r.get("reference_min") is not None)
    notes += [f"{r['algorithm']} on {r['task']}: seeds end at unequal steps" for r in records if r.get("uneven_steps")]
    return notes + [f"{r['algorithm']}: too few runs on {', '.join(r['missing'])}" for r in records if r.get("missing")]


def _reference(record: Record) -> str:
    """What 0 and 100 of the normalised score are: a table without its floor can hide that random actions do as well."""
    low, high = f"{record['reference_min']:.0f}", f"{record['reference_max']:.0f}"
    if record["random_success"] is not None and record["scripted_success"] is not None:
        low += f" (random actions, {record['random_success']:.0%} success)"
        high += f" (scripted expert, {record['scripted_success']:.0%})"
    played = f" ({record['simulator']})" if record.get("simulator") else ""
    return f"{record['task'].rsplit('/', 1)[-1]}{played}: normalised 0 is return {low}, 100 is {high}"


def _short_names(tasks: Sequence[str]) -> dict[str, str]:
    """Tasks without the family before the slash, where that stays unambiguous."""
    short = {task: task.rsplit("/", 1)[-1] for task in tasks}
    return short if len(set(short.values())) == len(short) else {}


def plot_curves(
    rows: Sequence[EpisodeResult], path: str | os.PathLike[str], **confidence: Unpack[Confidence]
) -> Path | None:
    """Learning curves (PNG), return and success, a panel per task; intervals shaded. None where steps are single."""
    curves = {metric: curve(rows, metric=metric, **confidence) for metric in ("return", "success")}
    if all(len(record["steps"]) < 2 for records in curves.values() for record in records):
        return None
    colours = _colours(record["algorithm"] for record in curves["return"])
    figure, panels = _panels(((metric, r["task"]) for metric, records in curves.items() for r in records), 3.1)
    for (metric, task), axes in panels.items():
        for record in curves[metric]:
            if record["task"] == task:
                steps, colour = record["steps"], colours[record["algorithm"]]
                axes.plot(steps, record["mean"], ".-", color=colour, markersize=6, linewidth=1.8)
                if record["low"] is not None:
                    axes.fill_between(steps, record["low"], record["high"], color=colour, alpha=0.15, linewidth=0)
        _label(axes, x="training steps", y=metric)
    handles = [axes.plot([], [], color=colour, linewidth=2.5, label=name)[0] for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=9)
    return _save(figure, path)


def plot_scores(records: Sequence[Record], path: str | os.PathLike[str]) -> Path:
    """Return and success of `score_table` (PNG), a panel per task: every algorithm's mean, interval and runs (dots)."""
    colours = _colours(record["algorithm"] for record in records)
    names = list(colours)
    shown = [(m, r["task"]) for m in ("return", "success") for r in records if r[f"{m}_mean"] is not None]
    figure, panels = _panels(shown, height=1.0 + 0.36 * len(names))
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
        _label(axes, x=metric)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
    return _save(figure, path)


def plot_metrics(metrics: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path | None:
    """Each metric of a metrics.jsonl over "step" (PNG): seeds (lists) thin, their mean bold. None without two steps."""
    series: dict[str, list[tuple[int, list[float]]]] = {}
    for line in metrics:
        for key, value in line.items():
            values = value if isinstance(value, list) else [value]
            if key != "step" and values and all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                series.setdefault(key, []).append((line["step"], values))
    series = {key: points for key, points in series.items() if len(points) > 1}
    if not series:
        return None
    figure, panels = _panels([("", key) for key in series], height=2.5)
    for (_, key), axes in panels.items():
        steps = [step for step, _ in series[key]]
        for seed in range(min(len(values) for _, values in series[key])):
            axes.plot(steps, [values[seed] for _, values in series[key]], color=_COLOURS[0], linewidth=0.8, alpha=0.35)
        axes.plot(steps, [sum(values) / len(values) for _, values in series[key]], color=_COLOURS[0], linewidth=1.6)
        _label(axes, x="training steps")
    return _save(figure, path)


def _panels(wanted: Iterable[tuple[str, str]], height: float) -> tuple[Figure, dict[tuple[str, str], Axes]]:
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
        axes.set_title(
            _short_names(tasks).get(task, task) if metric else task, fontsize=10, loc="left", color="#333333"
        )
        axes.tick_params(labelsize=8, color="#999999")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def _label(axes: Axes, x: str, y: str = "") -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    for name, axis, limit in ((x, axes.xaxis, axes.set_xlim), (y, axes.yaxis, axes.set_ylim)):
        if name == "success":
            limit(-0.03, 1.03)
            axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        elif name == "training steps":
            axis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}")


def _colours(names: Iterable[str]) -> dict[str, str]:
    names = dict.fromkeys(names)
    others = [name for name in names if name != "bc"]  # the usual baseline is grey
    return {name: _COLOURS[others.index(name) % len(_COLOURS)] if name in others else "#777777" for name in names}


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    return Path(path)
