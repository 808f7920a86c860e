"""Rows cut into episodes, and flags as bool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cvlctl.data.formats.sources import Column
from cvlctl.errors import CvlctlError

BATCH_ROWS, BATCH_BYTES = 2**16, 2**25  # what is cut into episodes at a time

Rows = dict[str, np.ndarray]


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
    columns: dict[str, Column], length: int, ends: Callable[[Rows, int], np.ndarray], last_only: Sequence[str] = ()
) -> Iterator[tuple[int, Rows]]:
    """Rows cut into episodes: (number of the first row, arrays); the last one may be unfinished.

    Memory holds one episode and one block of rows. The last row of a block is looked at again with the row after it.

    Args:
        ends: (rows, how many rows the first one's episode had before it) -> (n,) bool, true at an episode's last row.
        last_only: columns of which an episode's last row is all that is wanted.
    """
    held: Rows = {}
    parts: list[Rows] = []  # of the episode that has no end yet
    first = before = done = 0
    size = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, sum(column.row_bytes for column in columns.values()))))
    while done < length:
        count = min(size, length - done)
        block = {name: column.take(count) for name, column in columns.items()}
        rows = {name: np.concatenate([held[name], block[name]]) for name in block} if held else block
        done, known, start = done + count, len(next(iter(rows.values()))) - (done + count < length), 0
        for stop in (np.flatnonzero(ends(rows, before)[:known]) + 1).tolist():
            yield first, _together([*parts, _part(rows, start, stop, last_only)])
            first, before, start = first + before + stop - start, 0, stop
            parts.clear()
        if start < known:
            parts.append(_part(rows, start, known, last_only))
            before += known - start
        held = {name: values[known:].copy() for name, values in rows.items()} if done < length else {}
    if parts:
        yield first, _together(parts)


def _part(rows: Rows, start: int, stop: int, last_only: Sequence[str]) -> Rows:
    return {name: values[stop - 1 : stop].copy() if name in last_only else values[start:stop]
            for name, values in rows.items()}  # fmt: skip


def _together(parts: list[Rows]) -> Rows:
    """The parts of an episode as one; column by column, each of which is then let go of. Of one row, the last."""
    if len(parts) == 1:
        return parts[0]
    found = {}
    for name in list(parts[0]):
        pieces = [part.pop(name) for part in parts]
        found[name] = np.concatenate(pieces)
    return found


def cut_at(horizon: int) -> Callable[[np.ndarray, int], np.ndarray]:
    """A function from (n,) terminal flags, the first episode `before` rows old, to (n,) ends: there, and wherever an
    episode has `horizon` rows."""

    def ends(terminal: np.ndarray, before: int) -> np.ndarray:
        found, start = terminal.copy(), -before
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
