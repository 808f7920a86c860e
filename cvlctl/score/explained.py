"""What people see of an explanation: tables, and pictures of moments and of maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cvlctl.errors import CvlctlError
from cvlctl.figures import COLOURS, can_draw, drawn, label_axes, make_panels
from cvlctl.files import write_result
from cvlctl.learn.attribution import Shares, by_group
from cvlctl.score.grounds import Grounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Answer = dict[str, Any]
ACTIONS = dict(zip(("policy", "logged", "rejected"), COLOURS, strict=False))
SHOWN = 1e-3  # of the weight: what holds less is in the JSON alone


def render(answers: Sequence[Answer], console: Console) -> None:
    """Print the result of `explain`: Q's, then the states, episodes, tasks and stretches of the collection in them."""
    several = len({one["store"] for answer in answers for one in answer["states"]}) > 1
    tables = [
        _summary(answers),
        _table(answers, "the states that carry Q", _states(answers, several)),
        _table(answers, "episodes", _episodes(answers, several)),
        _table(answers, "tasks", _tasks(answers)),
        _collected(answers),
    ]
    for table in tables:
        if table.row_count:
            console.print(table)
    for note in answers[0]["notes"] if answers else []:
        console.print(Text(note, style="dim"))


def _summary(answers: Sequence[Answer]) -> Table:
    rows = [[{"Q": number(a["q"]), "states, in effect": f"{a['effective_states']:,.1f}"}] for a in answers]
    return _table(answers, "", rows)


def _states(answers: Sequence[Answer], several: bool) -> list[list[dict[str, str]]]:
    rows = []
    for answer in answers:
        found = [
            {"weight": percent(one["weight"]), **_place(one, several), "time": f"{one['time']:,}",
             "reward": number(one["reward"])}
            for one in shown(answer["states"])
        ]  # fmt: skip
        if answer["absorbed"]:
            found.append({"weight": percent(answer["absorbed"]), "episode": "absorbed", "reward": "0"})
        rows.append(found)
    return rows


def _episodes(answers: Sequence[Answer], several: bool) -> list[list[dict[str, str]]]:
    return [
        [{"weight": percent(one["weight"]), "of the data": percent(one["of_data"]), **_place(one, several),
          "Q without it": number(one["q_without"])} for one in shown(answer["episodes"])]
        for answer in answers
    ]  # fmt: skip


def _tasks(answers: Sequence[Answer]) -> list[list[dict[str, str]]]:
    if all(len(answer["tasks"]) < 2 for answer in answers):
        return [[] for _ in answers]
    return [
        [{"weight": percent(one["weight"]), "of the data": percent(one["of_data"]), "task": one["task"]}
         for one in shown(sorted(answer["tasks"], key=lambda one: -one["weight"]))]
        for answer in answers
    ]  # fmt: skip


def _collected(answers: Sequence[Answer]) -> Table:
    """A row an action, a column a stretch; the data's own shares come last."""
    stretches = answers[0]["collected"] if answers else []
    rows = [[{f"to {one['to']:,}": percent(one["weight"]) for one in answer["collected"]}] for answer in answers]
    table = _table(answers, "collected, in environment steps", rows if stretches else [[] for _ in answers])
    if stretches:
        table.add_row("", "of the data", *(percent(one["of_data"]) for one in stretches))
    return table


def shown(found: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Those that hold a weight worth a line; the first in any case."""
    return [one for i, one in enumerate(found) if i == 0 or one["weight"] >= SHOWN]


def _place(one: dict[str, Any], several: bool) -> dict[str, str]:
    store = {"store": Path(one["store"]).name} if several else {}
    return {**store, "episode": "" if one["episode"] is None else str(one["episode"])}


def _table(answers: Sequence[Answer], title: str, rows: Sequence[Sequence[dict[str, str]]]) -> Table:
    """A group of rows an answer, each a cell by its column's heading."""
    table = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    columns = list(dict.fromkeys(name for group in rows for row in group for name, text in row.items() if text))
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("action", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="left" if name in ("task", "store") else "right", overflow="fold")
    for answer, group in zip(answers, rows, strict=True):
        for i, row in enumerate(group):
            first = [str(answer["step"]), answer["action"]] if i == 0 else ["", ""]
            table.add_row(*(Text(text) for text in [*first, *(row.get(name, "") for name in columns)]))
    return table


def number(value: float | None) -> str:
    """Four digits; nothing for what is not known."""
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def percent(share: float) -> str:
    """A tenth of a hundredth where it is large, two digits where it is small."""
    if share == 0:
        return "0"
    return f"{100 * share:.1f}%" if share >= 0.01 else f"{100 * share:.2f}%" if share >= 1e-4 else "<0.01%"


# --- pictures


def plot_moments(path: Path, found: Grounds, answers: Sequence[tuple[int, str, Shares]], *, force: bool) -> str:
    """A PNG: above, each step's states over episode and time of its first action; below, weight by episode of each
    action, beside the episode's share of the data."""
    check_can_draw()
    steps = list(dict.fromkeys(step for step, _, _ in answers))
    panels = [(kind, f"step {step}") for kind in ("states", "episodes") for step in steps]
    figure, axes = make_panels(panels, height=2.7)
    of = np.repeat(np.arange(len(found.episodes.mass)), np.diff(found.episodes.begins))
    for step in steps:
        here = {name: shares for at, name, shares in answers if at == step}
        name, first = next(iter(here.items()))
        _draw_states(figure, axes["states", f"step {step}"], found, first, of)
        axes["states", f"step {step}"].set_title(
            f"step {step}: states of the {name} action", fontsize=10, loc="left", color="#333333"
        )
        panel = axes["episodes", f"step {step}"]
        panel.set_title(f"step {step}: episodes", fontsize=10, loc="left", color="#333333")
        panel.plot(found.episodes.mass, color="#999999", linewidth=1.0, label="of the data")
        for name, shares in here.items():
            weight = by_group(shares.arrival + shares.absorbed, found.episodes.begins)
            panel.plot(weight, "o", color=ACTIONS[name], markersize=4, alpha=0.7, markeredgewidth=0, label=name)
        panel.legend(frameon=False, fontsize=7)
        label_axes(panel, "episode, in the order of the data", "share")
    return _write(figure, path, force)


def _draw_states(figure: Figure, panel: Axes, found: Grounds, shares: Shares, of: np.ndarray) -> None:
    """The states that hold most of the weight: a dot each, as large as its share, coloured by its reward."""
    heavy = np.argsort(-shares.arrival)[:2000]
    heavy = heavy[shares.arrival[heavy] > 0][::-1]
    size = 60 * shares.arrival[heavy] / max(shares.arrival.max(), 1e-300) + 0.5
    reward = found.readout.states.reward[heavy]
    points = panel.scatter(of[heavy], found.time[heavy], s=size, c=reward, cmap="viridis", linewidths=0)
    if np.ptp(reward) > 0:
        figure.colorbar(points, ax=panel).set_label("reward", fontsize=8)
    label_axes(panel, "episode, in the order of the data", "step in it")


def plot_map(path: Path, positions: np.ndarray, q: np.ndarray, columns: Sequence[int], *, force: bool) -> str:
    """A PNG of Q (N,) at positions (N, 2), two columns of an observation."""
    check_can_draw()
    figure, panels = make_panels([("", "Q")], height=4.2)
    ((_, axes),) = panels.items()
    draw_map(figure, axes, positions, q)
    label_axes(axes, *(f"column {column} of the observation" for column in columns))
    return _write(figure, path, force)


def draw_map(
    figure: Figure, axes: Axes, positions: np.ndarray, q: np.ndarray, logarithmic_from: float | None = None
) -> None:
    """Points at positions (N, 2), coloured by q (N,) between its first and last hundredth.

    Args:
        logarithmic_from: share of the highest values from which on the colours are logarithmic; what is lower, or below
            0, has the lowest colour. None: linear.
    """
    from matplotlib.colors import LogNorm, Normalize

    order = np.random.default_rng(0).permutation(len(q))  # or the last episode would hide the others
    low, top = np.quantile(q, (0.01, 0.99))
    norm = Normalize(low, top)
    if logarithmic_from is not None:
        top = max(float(top), 1e-6)  # where nothing pays, nothing is shown
        low = logarithmic_from * top
        norm = LogNorm(low, top)
    x, y = positions[order].T
    points = axes.scatter(x, y, c=np.clip(q[order], low, top), s=4, norm=norm, cmap="viridis", linewidths=0)
    figure.colorbar(points, ax=axes)


def check_can_draw() -> None:
    """Raise a CvlctlError where no picture can be drawn."""
    if not can_draw():
        raise CvlctlError("matplotlib is not installed: no picture can be drawn", "pip install matplotlib")


def _write(figure: Figure, path: Path, force: bool) -> str:
    return write_result(path, drawn(figure, "svg" if path.suffix == ".svg" else "png"), force=force)
