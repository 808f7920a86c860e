"""`cvlctl data plot`: a store in one picture. Returns over collection, state coverage, episode lengths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cvlctl import files
from cvlctl.data.derive import Part, bounds, column_rows
from cvlctl.data.store import Column, Store, open_store
from cvlctl.figures import caption, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
STATES, IMAGES = 20_000, 2_000  # at most so many observations decide the plane
FEATURES = 512  # of an image, every n-th value is enough


def plot(path: Path, out: Path | None = None, *, label: str = "given", force: bool = False) -> dict[str, Any]:
    """Draw a store as a PNG, by default beside it.

    Returns:
        status, path, panels (their names; returns only where `label` has rewards), and explained_variance: the shares
        of variance that the two axes of the coverage panel hold.

    Raises:
        CvlctlError: another file is there (and no `force`), the store cannot be read, or it has other labels only.
    """
    from matplotlib.figure import Figure

    store = open_store(path)
    target = Path(out) if out is not None else files.named(Path(path)).with_suffix(".png")
    if store.labels or label != "given":
        store.require_label(label)
    names = [*(["returns"] if store.has_label(label) else []), "coverage", "lengths"]
    figure = Figure(figsize=(4.2 * len(names) + 0.4, 3.7), layout="constrained")
    named = f"{caption(Path(path).name)}: {caption(store.task)}, {store.num_episodes:,} episodes"
    figure.suptitle(named, fontsize=11, color="#333333")
    axes = dict(zip(names, figure.subplots(1, len(names)), strict=True))
    for panel in axes.values():
        panel.tick_params(labelsize=8, color="#999999")
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color("#999999")
    if "returns" in axes:
        _returns(axes["returns"], store, label)
    explained = _coverage(axes["coverage"], store)
    _lengths(axes["lengths"], store)
    picture = drawn(figure, "svg" if target.suffix == ".svg" else "png")
    status = files.write_result(target, picture, force=force)
    return {"status": status, "path": str(target), "panels": names, "explained_variance": explained}


def plane(observations: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """The first two principal components of standardised observations (n, O); constant dimensions count for nothing.

    Returns:
        coordinates (n, 2), and the share of the variance along each.
    """
    centred = observations - observations.mean(0)
    spread = centred.std(0)
    moving = spread > 1e-6 * np.maximum(1.0, np.abs(observations).max(0))
    _, singular, directions = np.linalg.svd(centred[:, moving] / spread[moving], full_matrices=False)
    coordinates, shares = np.zeros((len(observations), 2)), [0.0, 0.0]
    total = float((singular**2).sum())
    for i, direction in enumerate(directions[:2]):
        coordinates[:, i] = (centred[:, moving] / spread[moving]) @ direction
        shares[i] = float(singular[i] ** 2 / total) if total else 0.0
    return coordinates, shares


def _returns(axes: Axes, store: Store, label: str) -> None:
    part = Part(store, np.arange(store.num_episodes))
    returns = np.array([x.sum(dtype=np.float64) for x in column_rows([part], f"labels/{label}/reward")])
    collected_at, tasks = store.collected_at(), np.array(store.episode_tasks())
    told = len(np.unique(collected_at)) > 1
    x = collected_at if told else np.arange(store.num_episodes)
    groups = {task.rsplit("/", 1)[-1]: tasks == task for task in store.task_names[: len(COLOURS)]}
    if len(groups) == 1 and store.has_label(label, "success"):
        solved = np.array([rows.any() for rows in column_rows([part], f"labels/{label}/success")])
        groups = {"no success": ~solved, "success": solved}
    for colour, (name, chosen) in zip(COLOURS, groups.items(), strict=False):
        axes.plot(
            x[chosen],
            returns[chosen],
            "o",
            color=colour,
            markersize=3,
            alpha=0.5,
            markeredgewidth=0,
            label=caption(name),
        )
    order = np.argsort(x, kind="stable")
    pieces = np.array_split(order, min(20, max(1, store.num_episodes // 5)))
    axes.plot(
        [np.median(x[piece]) for piece in pieces], [np.median(returns[piece]) for piece in pieces],
        color="#333333", linewidth=1.4, label="median",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=7)
    _label(axes, f"returns ({caption(label)})", "environment step of collection" if told else "episode", "return")


def _coverage(axes: Axes, store: Store) -> list[float]:
    coordinates, shares = plane(observations(store))
    axes.hexbin(*coordinates.T, gridsize=45, bins="log", cmap="viridis", mincnt=1, linewidths=0.1)
    _label(axes, "state coverage (log density)", *(f"PC{i + 1} ({100 * share:.0f}%)" for i, share in enumerate(shares)))
    return shares


def _lengths(axes: Axes, store: Store) -> None:
    lengths, terminated = store.lengths(), store.terminated()
    longest = int(lengths.max())
    edges = np.linspace(0, longest, min(30, longest) + 1) + 0.5
    kinds = {"truncated": lengths[~terminated], "terminated": lengths[terminated]}
    kinds = {name: values for name, values in kinds.items() if len(values)}
    colours = [COLOURS[name == "terminated"] for name in kinds]
    axes.hist(list(kinds.values()), bins=edges.tolist(), stacked=True, color=colours, label=list(kinds))
    axes.legend(frameon=False, fontsize=7)
    _label(axes, "episode lengths", "steps", "episodes")


def observations(store: Store) -> np.ndarray:
    """(n, O) float64: a seeded choice of rows; where there is no vector, frames of the first camera, thinned out to
    `FEATURES` values."""
    rows = int(store.episode_ends()[-1])
    seen = next(iter(store.spec.cameras), None) if store.spec.observation_shape == (0,) else None
    count = min(rows, IMAGES if seen else STATES)
    chosen = np.zeros(rows, bool)
    chosen[np.random.default_rng(0).permutation(rows)[:count]] = True
    column, found = Column(store, store.camera_array(seen) if seen else "data/observation"), []
    for start, end in bounds(Part(store, np.arange(store.num_episodes))):
        if chosen[start:end].any():
            values = column.rows(start, end)[chosen[start:end]]
            flat = values.reshape(len(values), -1)
            found.append(flat[:, :: -(-flat.shape[1] // FEATURES)].astype(np.float64))
    return np.concatenate(found)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color="#333333")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
