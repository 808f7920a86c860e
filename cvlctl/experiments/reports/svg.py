"""Panels of marks as SVG: inline in a page, whose style gives colours and fonts, and as files with a style inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources

from cvlctl.experiments.reports.marks import GREY, INK, Axis, Figure, Mark, Panel
from cvlctl.figures import COLOURS
from cvlctl.score.typeset import html

WIDTH = 340  # pixels of a panel
_LETTER, _LONGEST = 5.6, 21  # the width of a letter of a tick's text, and how many there are at most
_GAP, _TOP, _LINE = 14, 34, 18  # of the files: between panels, above them, and a line of the legend

To = Callable[[float], float]


def of_panel(panel: Panel, place: str = "") -> str:
    """One `<svg>`; `place`: attributes that put it into another."""
    left, right, top, bottom = box(panel)
    to_x, to_y = _scale(panel.x, left, right), _scale(panel.y, bottom, top)
    parts = [_grid(panel, to_x, to_y)]
    parts += [_mark(mark, to_x, to_y) for mark in panel.marks]
    size = f'viewBox="0 0 {WIDTH} {panel.height}" ' + (place or f'width="{WIDTH}" height="{panel.height}"')
    title = (
        f'<text class="t" x="{left - 2:.0f}" y="14">{_cut(panel.title, int((right - left) / 6.6))}</text>'
        if panel.title
        else ""
    )
    return f'<svg class="panel" {size} role="img" aria-label="{html(panel.title)}">{title}{"".join(parts)}</svg>'


def box(panel: Panel) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of what is drawn between a panel's axes, in pixels."""
    left = 12 + _LETTER * max([0, *(min(len(text), _LONGEST) for _, text in panel.y.ticks)])
    return left + (14 if panel.y.label else 0), WIDTH - 12, 24, panel.height - (36 if panel.x.label else 22)


def placed(figure: Figure, across: int = 3) -> tuple[int, int, list[tuple[float, float]]]:
    """Width, height, and where each panel begins, in pixels: side by side, below the legend."""
    across = min(across, len(figure.panels)) or 1
    width, at = across * (WIDTH + _GAP), list[tuple[float, float]]()
    y = _legend(figure.legend, width)[1]
    for start in range(0, len(figure.panels), across):
        row = figure.panels[start : start + across]
        at += [(_GAP / 2 + i * (WIDTH + _GAP), y) for i in range(len(row))]
        y += max(panel.height for panel in row) + _GAP
    return width, y, at


def of_figure(figure: Figure) -> str:
    """A figure as a file of its own."""
    width, height, at = placed(figure)
    panels = "".join(
        of_panel(panel, f'x="{x:.0f}" y="{y}" width="{WIDTH}" height="{panel.height}"')
        for panel, (x, y) in zip(figure.panels, at, strict=True)
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return f"{head}<style>{_style()}</style>{background}{_legend(figure.legend, width)[0]}{panels}</svg>\n"


@cache
def _style() -> str:
    """The page's rules for figures, with the colours of paper."""
    colours = "".join(f"--k{i}:{colour};" for i, colour in enumerate(COLOURS))
    root = f"svg{{--ink:#222;--dim:#666;--line:#ccc;--grid:#eee;--paper:#fff;--kb:#777;{colours}}}"
    return root + resources.files("cvlctl.experiments.reports").joinpath("figures.css").read_text()


def _legend(names: Sequence[tuple[str, int]], width: int) -> tuple[str, int]:
    """Names in rows, and where the panels begin."""
    parts, x, y = list[str](), 10.0, 16
    for name, colour in names:
        wide = 26 + _LETTER * 1.15 * min(len(name), 48)
        if x + wide > width and x > 10:
            x, y = 10.0, y + _LINE
        parts.append(f'<rect class="{kind(colour)}" x="{x:.0f}" y="{y - 8}" width="10" height="10"/>')
        parts.append(f'<text class="a" x="{x + 15:.0f}" y="{y}">{_cut(name, 48)}</text>')
        x += wide
    return "".join(parts), y + _TOP - _LINE if names else _GAP


def kind(colour: int) -> str:
    """The class of a colour; beyond the eighth they are dashed."""
    if colour in (GREY, INK):
        return {GREY: "kb", INK: "ki"}[colour]
    return f"k{colour % len(COLOURS)}{' dash' if colour // len(COLOURS) % 2 else ''}"


def _scale(axis: Axis, start: float, end: float) -> To:
    span = (axis.high - axis.low) or 1.0
    return lambda value: start + (value - axis.low) / span * (end - start)


def _grid(panel: Panel, to_x: To, to_y: To) -> str:
    left, right, top, bottom = box(panel)
    named = not panel.y.label and panel.y.high < panel.y.low  # of rows with names there is no grid
    lines = "".join(f"M{to_x(at):.1f} {top}V{bottom}" for at, _ in panel.x.ticks)
    lines += "" if named else "".join(f"M{left:.1f} {to_y(at):.1f}H{right}" for at, _ in panel.y.ticks)
    parts = [f'<path class="g" d="{lines}"/>' if lines else "", f'<path class="f" d="M{left:.1f} {bottom}H{right}"/>']
    parts += [f'<text x="{to_x(at):.1f}" y="{bottom + 13}" class="x">{html(text)}</text>' for at, text in panel.x.ticks]
    parts += [f'<text x="{left - 5:.1f}" y="{to_y(at) + 3.5:.1f}" class="y">{_cut(text)}</text>'
              for at, text in panel.y.ticks]  # fmt: skip
    if panel.x.label:
        parts.append(
            f'<text x="{(left + right) / 2:.1f}" y="{panel.height - 6}" class="x a">{html(panel.x.label)}</text>'
        )
    if panel.y.label:
        at = f"translate(11 {(top + bottom) / 2:.1f}) rotate(-90)"
        parts.append(f'<text transform="{at}" class="x a">{_cut(panel.y.label, 30)}</text>')
    return "".join(parts)


def _cut(text: str, longest: int = _LONGEST) -> str:
    """A text that fits, and the whole of it on hovering."""
    if len(text) <= longest:
        return html(text)
    return f"<title>{html(text)}</title>{html(text[: longest - 1])}…"


def _mark(mark: Mark, to_x: To, to_y: To) -> str:
    colour, title = kind(mark.colour), f"<title>{html(mark.title)}</title>" if mark.title else ""
    xs, ys = [to_x(value) for value in mark.x], [to_y(value) for value in mark.y]
    if mark.kind in ("dot", "seed"):
        return "".join(
            f'<circle class="{mark.kind} {colour}" cx="{x:.1f}" cy="{y:.1f}" r="{2.2 if mark.kind == "seed" else 4}">'
            f"{title}</circle>"
            for x, y in zip(xs, ys, strict=True)
        )  # fmt: skip
    if mark.kind in ("interval", "whisker"):
        return f'<path class="{mark.kind} {colour}" d="M{xs[0]:.1f} {ys[0]:.1f}L{xs[1]:.1f} {ys[1]:.1f}">{title}</path>'
    if mark.kind == "bar":
        x, y, width, height = min(xs), min(ys), abs(xs[1] - xs[0]), abs(ys[1] - ys[0])
        place = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}"'
        return f'<rect class="bar {colour}" {place}>{title}</rect>'
    if mark.kind == "cells":
        width, height = (abs(to(half) - to(0)) * 2 for to, half in zip((to_x, to_y), mark.size, strict=True))
        shape = f"h{width:.1f}v{height:.1f}h-{width:.1f}z"
        path = "".join(f"M{x - width / 2:.1f} {y - height / 2:.1f}{shape}" for x, y in zip(xs, ys, strict=True))
        return f'<path class="cells {colour}" fill-opacity="{mark.level:.2f}" d="{path}">{title}</path>'
    if mark.kind == "band":
        xs, shape = [*xs, *xs[::-1]], "Z"
        half = len(ys) // 2
        ys = [*ys[:half], *ys[half:][::-1]]
    else:
        shape = ""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{mark.kind} {colour}" d="M{path}{shape}">{title}</path>' if points else ""
