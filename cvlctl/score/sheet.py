"""What a critic that sees frames stands on, to be looked at: moments, beside the states that weigh most there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cvlctl.figures import caption, drawn
from cvlctl.files import write_result
from cvlctl.frames import beside
from cvlctl.learn.attribution import Shares
from cvlctl.play.sights import Seen
from cvlctl.score.explained import check_can_draw, number, percent
from cvlctl.score.grounds import Grounds

ACROSS, DOWN = 6, 30  # states of an answer, and answers that are drawn
SIDE, LONG = 1.35, 8.0  # inches of a frame's shorter side, and how many times as long the other may be
GAP, HEAD = 0.08, 0.36  # inches between frames, and above them
Cell = tuple[np.ndarray, str]  # a frame, and what stands above it


def draw_sheet(path: Path, found: Grounds, answers: Sequence[tuple[int, Seen, str, Shares]], *, force: bool) -> str:
    """A PNG, or SVG: a row an answer, its moment first, then the states with the largest weights in it; of many
    answers the first.

    Args:
        answers: step, what is seen there (1, ...), action, and what its Q stands on.
    """
    check_can_draw()
    return _write(path, cells(found, answers[:DOWN]), force)


def cells(found: Grounds, answers: Sequence[tuple[int, Seen, str, Shares]]) -> list[list[Cell]]:
    """The rows of the sheet."""
    heavy = [_heaviest(shares.arrival) for *_, shares in answers]
    states = {j: _frame(found, found.state(j)) for j in sorted({j for row in heavy for j in row})}
    rows = []
    for (step, seen, action, shares), places in zip(answers, heavy, strict=True):
        told = f"step {step}: {action}" + (f"\nQ {number(shares.q)}" if found.rewards else "")
        about = [f"{percent(float(shares.arrival[j]))}: {_about(found, j)}" for j in places]
        rows.append([(_frame(found, seen), told), *((states[j], a) for j, a in zip(places, about, strict=True))])
    return rows


def _heaviest(weight: np.ndarray) -> list[int]:
    places = np.argsort(-weight, kind="stable")[:ACROSS]
    return [int(j) for j in places if weight[j] > 0]


def _frame(found: Grounds, seen: Seen) -> np.ndarray:
    """The latest frames of all cameras, side by side."""
    assert isinstance(seen, Mapping) and found.observe is not None
    return beside([seen[camera][0, -1] for camera in found.observe.cameras])


def _about(found: Grounds, j: int) -> str:
    """Where a state is, and what it pays."""
    episodes, reward = found.episodes, found.readout.states.reward[j]
    of = int(np.searchsorted(episodes.begins, j, side="right")) - 1
    number, store = episodes.number[of], Path(episodes.store[of]).name
    place = f"row {found.time[j]}" if number is None else f"ep. {number}, step {found.time[j]}"
    pays = found.rewards and found.readout.normaliser != "examples"
    more = [store] * (len(set(episodes.store)) > 1) + [f"reward {reward:.3g}"] * pays
    return "\n".join([place, ", ".join(more)])


def _write(path: Path, rows: Sequence[Sequence[Cell]], force: bool) -> str:
    from matplotlib.figure import Figure

    height, width = rows[0][0][0].shape[:2]
    high, wide = (SIDE * min(LONG, max(1.0, ratio)) for ratio in (height / width, width / height))
    size = ((ACROSS + 1) * (wide + GAP) + GAP, len(rows) * (high + HEAD) + GAP)
    figure = Figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1))
    for i, row in enumerate(rows):
        for k, (frame, text) in enumerate(row):
            left, top = GAP + k * (wide + GAP), HEAD + i * (high + HEAD)
            axes.imshow(frame, extent=(left, left + wide, top + high, top), interpolation="nearest")
            lines = "\n".join(caption(line) for line in text.split("\n"))
            colour = "#333333" if k else "#d55e00"
            axes.text(left, top - 0.03, lines, fontsize=7, color=colour, va="bottom", linespacing=1.0)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="auto")
    axes.set_axis_off()
    return write_result(path, drawn(figure, "svg" if path.suffix == ".svg" else "png"), force=force)
