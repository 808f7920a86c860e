"""Rows cut into episodes, flags as bool, actions in [-1, 1]: the last steps that readers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cvlctl.data.formats.sources import Column
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

BATCH_ROWS, BATCH_BYTES = 2**16, 2**25  # what is cut into episodes at a time
ROUNDING = 1e-5  # actions beyond [-1, 1] by no more than float32's rounding of a scaled action are cut off

Bounds = tuple[float | Sequence[float], float | Sequence[float]]


def flat(values: np.ndarray, where: str) -> np.ndarray:
    """(N,) of what may be (N, 1)."""
    if values.ndim == 2 and values.shape[1] == 1:
        return values[:, 0]
    if values.ndim != 1:
        raise CvlctlError(f"{where}: has shape (N, {', '.join(map(str, values.shape[1:]))}); expected (N,) or (N, 1)")
    return values


def flags(values: np.ndarray, where: str) -> np.ndarray:
    """(N,) bool of 0 and 1 in whatever type."""
    values = flat(values, where)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise CvlctlError(f"{where}: holds NaN or infinity where 0 and 1 are expected")
    return values != 0


def cut(
    columns: dict[str, Column], length: int, ends: Callable[[dict[str, np.ndarray]], np.ndarray]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Rows cut into episodes: (number of the first row, arrays); the last one may be unfinished.

    Args:
        ends: (rows that begin with an episode's first) -> (n,) bool, true at an episode's last row.
    """
    rows: dict[str, np.ndarray] = {}
    first = done = 0
    size = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, sum(column.row_bytes for column in columns.values()))))
    while done < length:
        count = min(size, length - done)
        block = {name: column.take(count) for name, column in columns.items()}
        rows = {name: np.concatenate([rows[name], block[name]]) for name in block} if rows else block
        done, start = done + count, 0
        for stop in (np.flatnonzero(ends(rows)) + 1).tolist():
            yield first + start, {name: values[start:stop] for name, values in rows.items()}
            start = stop
        left = len(next(iter(rows.values()))) - start
        rows = {name: values[start:] for name, values in rows.items()} if left else {}
        first += start
    if rows:
        yield first, rows


def cut_at(horizon: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function from (n,) terminal flags to (n,) ends: there, and wherever an episode has `horizon` rows."""

    def ends(terminal: np.ndarray) -> np.ndarray:
        found, start = terminal.copy(), 0
        for stop in [*(np.flatnonzero(terminal) + 1).tolist(), len(terminal)]:
            found[start + horizon - 1 : stop : horizon] = True
            start = stop
        return found

    return ends


def with_final(
    observations: np.ndarray, after: np.ndarray | None, terminated: bool, steps: int
) -> tuple[np.ndarray, int]:
    """Observations with the final one that rows lack, and the number of transitions that this leaves.

    Where the file has no observation `after` the last step, two ways are left. If the environment ended the episode,
    the last observation stands in for the final one: the transition tells that the episode ends. If it was cut off,
    the last transition is dropped, and the observation before it is the final one.
    """
    if after is not None:
        return np.concatenate([observations, after]), steps
    if terminated:
        return np.concatenate([observations, observations[-1:]]), steps
    return observations, steps - 1


def make(where: str, bounds: Bounds | None, clip: bool, **parts: Any) -> Episode:
    """An episode, its actions scaled from `bounds` to [-1, 1]; what is wrong with it begins with `where`."""
    try:
        parts["actions"] = scaled(parts["actions"], bounds, clip)
        return Episode(**parts)
    except CvlctlError as error:
        hint = error.hint
        if "outside [-1, 1]" in error.what:
            hint = "say in which bounds they lie, --action-bounds LOW HIGH, or cut them off, --clip-actions"
        raise CvlctlError(f"{where}: {error.what}", hint) from error


def scaled(actions: np.ndarray, bounds: Bounds | None, clip: bool) -> np.ndarray:
    """Actions in [-1, 1]: scaled from `bounds` if given, cut off if asked, or if beyond by rounding alone."""
    if bounds is not None:
        try:
            low, high = (np.asarray(bound, np.float64) for bound in bounds)
            np.broadcast_shapes(low.shape, high.shape, actions.shape[1:])
            if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
                raise ValueError
        except (TypeError, ValueError) as error:
            what = f"action_bounds {bounds} are no (low, high) for actions of shape {actions.shape[1:]}"
            raise CvlctlError(what, "give two numbers, or two lists of one number a dimension") from error
        actions = ((actions - low) * (2.0 / (high - low)) - 1.0).astype(np.float32)
    if actions.size and actions.dtype.kind == "f":
        most = np.abs(actions).max()
        if clip or 1.0 < most <= 1.0 + ROUNDING:
            return np.clip(actions, -1.0, 1.0)
    return np.clip(actions, -1, 1) if clip else actions
