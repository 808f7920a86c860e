"""Figures as plain data: panels of marks. `svg` and `png` draw them; nothing here knows how."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

GREY = -1  # the colour of the usual baseline; others are numbers into `cvlctl.figures.COLOURS`, over and over
INK = -2  # the colour of text


class Axis(NamedTuple):
    """One axis of a panel; `high` may lie below `low`: it then runs down."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]


class Mark(NamedTuple):
    """Something drawn at data coordinates.

    kind: "line", "faint" (a single seed), "band" (y: lower, then upper edge, of the same x), "dot", "seed" (a small
    dot), "interval" and "whisker" (a thick, a thin line from (x0, y0) to (x1, y1)), "bar" (a rectangle between them),
    or "cells" (rectangles of half-width `size` around (x, y), darker by `level`).
    """

    kind: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    title: str = ""  # what hovering over it tells
    size: tuple[float, float] = (0.0, 0.0)
    level: float = 1.0


class Panel(NamedTuple):
    """Axes with marks; `height` in pixels, of a width that is always the same."""

    title: str
    x: Axis
    y: Axis
    marks: Sequence[Mark]
    height: int = 210


class Figure(NamedTuple):
    """Panels that belong together; `name` is that of its files."""

    name: str
    caption: str
    panels: Sequence[Panel]
    legend: Sequence[tuple[str, int]] = ()  # names with their colours


def colours(names: Iterable[str]) -> dict[str, int]:
    """Of each name its colour: bc's is grey, as in the pictures of `cvlctl evaluate`."""
    names = dict.fromkeys(names)
    others = [name for name in names if name != "bc"]
    return {name: others.index(name) if name != "bc" else GREY for name in names}


def axis(
    label: str, values: Iterable[float], *, zero: bool = False, per_cent: bool = False, whole: bool = False
) -> Axis:
    """An axis around finite values, with round ticks.

    `zero`: it begins (or ends) at 0; `per_cent`: it is of 0 to 1; `whole`: of counts.
    """
    found = [value for value in values if math.isfinite(value)]
    if per_cent:
        return Axis(label, -0.03, 1.03, [(share, f"{100 * share:.0f}%") for share in (0, 0.25, 0.5, 0.75, 1)])
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low) * 0.05 or max(1e-6, abs(high) * 0.05)
    at_zero = (zero and low == 0, zero and high == 0)
    low, high = low - room * (not at_zero[0]), high + room * (not at_zero[1])
    ticks = [value for value in _ticks(low, high) if not whole or value == round(value)]
    return Axis(label, low, high, [(value, _short(value)) for value in ticks])


def names_axis(names: Sequence[str]) -> Axis:
    """A name a row, the first above."""
    return Axis("", len(names) - 0.4, -0.6, list(enumerate(names)))


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _short(value: float) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if size >= 1e4 else f"{value:.4g}"


def thinned(num: int, most: int) -> list[int]:
    """At most so many of `num` positions, evenly, with both ends."""
    if num <= most:
        return list(range(num))
    return sorted({round(i * (num - 1) / (most - 1)) for i in range(most)})
