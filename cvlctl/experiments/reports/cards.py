"""Dataset cards: what a store holds, in numbers (those of `cvlctl data info`) and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cvlctl.data.look import episode_returns, facts, info
from cvlctl.data.plots import observations, plane
from cvlctl.data.preview import episode_frames
from cvlctl.data.store import Store, open_store
from cvlctl.errors import CvlctlError
from cvlctl.experiments.reports.marks import INK, Axis, Figure, Mark, Panel, axis, thinned
from cvlctl.frames import png, sheet

MOST_FIGURES = 24  # stores whose figures are drawn: others are told of in numbers
EPISODES = 400  # dots of a panel
ACROSS, DOWN, LEVELS = 36, 24, 6  # cells of the coverage, and shades of them
BINS = 24  # of lengths
FRAMES, FRAME_SIDE = 6, 192  # of a card, and the most pixels of their shorter side


class Card(NamedTuple):
    """A store in a report: facts as (name, text), figure where it can be read; what is wrong with it else."""

    path: str
    facts: Sequence[tuple[str, str]]  # those of the store, then
    provenance: Sequence[tuple[str, str]]  # what it says of where it came from
    figure: Figure | None
    problem: str
    frames: bytes = b""  # a PNG of some, where it has cameras


def card(path: str, digests: Mapping[str, Sequence[str]], draw: bool = True) -> Card:
    """The card of a store.

    Args:
        digests: of each digest that was trained on, the runs.
        draw: with figures.
    """
    try:
        about = info(Path(path))
        store = open_store(Path(path))
        figure = _figure(path, store) if draw else None
        frames = _frames(store) if draw and store.spec.cameras else b""
    except CvlctlError as error:
        gone = "it is gone" if not Path(path).exists() else error.what
        used = _few([name for names in digests.values() for name in names])
        return Card(path, [("trained on it", used)] if used else [], [], None, gone)
    others = [name for digest, names in digests.items() if digest != about["digest"] for name in names]
    problem = f"it is not what was trained on any more: {_few(others)} saw another digest" if others else ""
    told = facts(about)
    num = len(told) - len(about["provenance"])
    return Card(path, told[:num], told[num:], figure, problem, frames)


def _frames(store: Store) -> bytes:
    """A PNG of the first episode's frames: all cameras side by side, large ones made smaller."""
    seen = episode_frames(store, 0, list(store.spec.cameras))
    step = -(-min(seen[0].shape[:2]) // FRAME_SIDE)
    chosen = sorted({round(i * (len(seen) - 1) / (FRAMES - 1)) for i in range(FRAMES)})
    return png(sheet([seen[i][::step, ::step] for i in chosen]))


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _figure(path: str, store: Store) -> Figure:
    label = "given" if "given" in store.labels else next(iter(store.labels), "given")
    panels = [_returns(store, label)] if store.has_label(label) else []
    panels += [_coverage(store), _lengths(store)]
    return Figure("data-" + Path(path).stem, "", panels)


def _returns(store: Store, label: str) -> Panel:
    """Each episode's return over its collection, solved ones apart, with the median."""
    returns, collected_at = episode_returns(store, label), store.collected_at()
    told = len(np.unique(collected_at)) > 1
    x = collected_at if told else np.arange(store.num_episodes)
    ends = store.episode_ends()
    solved = np.zeros(store.num_episodes, bool)
    if store.has_label(label, "success"):
        solved = np.logical_or.reduceat(store.successes(label), np.concatenate([[0], ends[:-1]]))
    order = np.argsort(x, kind="stable")
    marks = []
    for i in order[thinned(len(order), EPISODES)].tolist():
        title = f"episode {i}: return {returns[i]:.4g}" + (", success" if solved[i] else "")
        marks.append(Mark("seed", (float(x[i]),), (float(returns[i]),), 1 if solved[i] else 0, title))
    pieces = np.array_split(order, min(20, max(1, store.num_episodes // 5)))
    if len(pieces) > 1:
        middle = (
            [float(np.median(x[piece])) for piece in pieces],
            [float(np.median(returns[piece])) for piece in pieces],
        )
        marks.append(Mark("line", *middle, INK, "median"))
    name = "step of collection" if told else "episode"
    title = f"returns ({label})" + (", orange: success" if solved.any() else "")
    return Panel(title, axis(name, x.tolist()), axis("return", returns.tolist()), marks, 220)


def _coverage(store: Store) -> Panel:
    """States on the plane of their first two principal components; darker: more of them (log density)."""
    coordinates, shares = plane(observations(store))
    counts, *edges = np.histogram2d(coordinates[:, 0], coordinates[:, 1], bins=(ACROSS, DOWN))
    most = np.log1p(counts.max())
    level = np.where(counts > 0, np.ceil(LEVELS * np.log1p(counts) / most), 0).astype(int)
    middles = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    half = tuple(float(edge[1] - edge[0]) / 2 for edge in edges)
    marks = []
    for shade in range(1, LEVELS + 1):
        i, j = np.nonzero(level == shade)
        if len(i):
            number = f"up to {counts[i, j].max():.0f} states a cell"
            at = middles[0][i].tolist(), middles[1][j].tolist()
            marks.append(Mark("cells", *at, 0, number, (half[0], half[1]), 0.15 + 0.8 * shade / LEVELS))
    x, y = (Axis(f"PC{n + 1} ({100 * share:.0f}%)", float(edge[0]), float(edge[-1]), ())
            for n, (share, edge) in enumerate(zip(shares, edges, strict=True)))  # fmt: skip
    return Panel("state coverage", x, y, marks, 220)


def _lengths(store: Store) -> Panel:
    lengths, terminated = store.lengths(), store.terminated()
    longest = int(lengths.max())
    edges = np.linspace(0, longest, min(BINS, longest) + 1)
    marks, below = list[Mark](), np.zeros(len(edges) - 1)
    for colour, (name, chosen) in enumerate({"truncated": ~terminated, "terminated": terminated}.items()):
        counts = np.histogram(lengths[chosen], edges)[0]
        for k in np.nonzero(counts)[0].tolist():
            low, high = float(edges[k]), float(edges[k + 1])
            title = f"{counts[k]} episodes of {low:.0f} to {high:.0f} steps, {name}"
            marks.append(Mark("bar", (low, high), (float(below[k]), float(below[k] + counts[k])), colour, title))
        below += counts
    counts_axis = axis("episodes", below.tolist(), zero=True, whole=True)
    title = "episode lengths" + (", orange: terminated" if terminated.any() else "")
    return Panel(title, axis("steps", (0, longest), zero=True), counts_axis, marks, 220)
