"""What the columns of a store hold, chunk by chunk: range, mean and deviation, and which look amiss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cvlctl.data.store import Column, Store
from cvlctl.data.units import bounds_of, column_names, units_of
from cvlctl.units import physical

ROUNDING = 1e-6  # relative: float32's, as `statistics.never_varied` has it
BLOCK_ROWS = 2**14  # what is looked at at a time
SAMPLE_ROWS = 201  # of a block, whose middle value may be the most common one
MOSTLY, SATURATED = 0.9, 0.05  # shares of the rows from which on it is said


class Running:
    """Statistics of rows (n, C) that come block by block."""

    def __init__(self, first: np.ndarray) -> None:
        self.rows, self._reference = 0, first.astype(np.float64)  # subtracted, so that no digits are lost
        self.low, self.high, self.common = (np.array(first) for _ in range(3))
        self._sum, self._square = (np.zeros(first.shape) for _ in range(2))
        self._at_low, self._at_high, self.count = (np.zeros(first.shape, np.int64) for _ in range(3))

    def add(self, rows: np.ndarray) -> None:
        """Take more of them; (0, C) will do."""
        if not len(rows):
            return
        self.rows += len(rows)
        low, high = rows.min(axis=0), rows.max(axis=0)
        self._at_low = (rows == low).sum(axis=0) * (low <= self.low) + self._at_low * (low >= self.low)
        self._at_high = (rows == high).sum(axis=0) * (high >= self.high) + self._at_high * (high <= self.high)
        self.low, self.high = np.minimum(low, self.low), np.maximum(high, self.high)
        sample = rows[:: len(rows) // SAMPLE_ROWS + 1]
        middle = np.partition(sample, len(sample) // 2, axis=0)[len(sample) // 2]
        self.count += (rows == self.common).sum(axis=0)
        here = (rows == middle).sum(axis=0)
        better = (middle != self.common) & (here > self.count)
        self.common, self.count = np.where(better, middle, self.common), np.where(better, here, self.count)
        apart = rows.astype(np.float64) - self._reference
        self._sum += apart.sum(axis=0)
        self._square += np.square(apart, out=apart).sum(axis=0)

    def facts(self, names: list[str]) -> list[dict[str, Any]]:
        """Of each column name, min, max, mean, std, and `note`: what of it people should know, "" if nothing."""
        mean = self._sum / self.rows
        std = np.sqrt(np.maximum(self._square / self.rows - np.square(mean), 0.0))
        values = zip(names, self.low, self.high, mean + self._reference, std, self._notes(), strict=True)
        return [
            {"name": name, "min": float(low), "max": float(high), "mean": float(m), "std": float(s), "note": note}
            for name, low, high, m, s, note in values
        ]

    def _notes(self) -> Iterator[str]:
        limits = zip(self.low, self.high, self._at_low, self._at_high, strict=True)
        for (low, high, at_low, at_high), common, count in zip(limits, self.common, self.count, strict=True):
            if high - low <= ROUNDING * max(abs(low), abs(high)):
                yield "constant"
            elif count >= MOSTLY * self.rows:
                yield f"{100 * count / self.rows:.0f} % are {common:.3g}"
            elif at_low + at_high == self.rows:
                yield "two values"
            elif max(at_low, at_high) >= max(SATURATED * self.rows, 10):
                at, where = (at_high, "max") if at_high >= at_low else (at_low, "min")
                yield f"saturated: {100 * at / self.rows:.0f} % at {where}"
            else:
                yield ""


def observation_columns(store: Store) -> list[dict[str, Any]]:
    """`Running.facts` of an observation's columns; none of observations that are no vectors."""
    if len(store.spec.observation_shape) != 1 or not store.spec.observation_shape[0]:
        return []
    running = None
    for rows in _blocks(store, "data/observation"):
        running = running or Running(rows[0])
        running.add(rows)
    assert running is not None
    return running.facts(column_names(units_of(store), *store.spec.observation_shape))


def action_columns(store: Store) -> list[dict[str, Any]]:
    """The same of actions in [-1, 1], without the rows beside final observations; `physical`: min and max in the
    robot's own units, None where nobody knows them."""
    running, ends, start = None, store.episode_ends() - 1, 0
    for rows in _blocks(store, "data/action"):
        running = running or Running(rows[0])
        padding = ends[np.searchsorted(ends, start) : np.searchsorted(ends, start + len(rows))] - start
        start += len(rows)
        running.add(np.delete(rows, padding, axis=0))
    assert running is not None
    facts = running.facts([f"action {i}" for i in range(store.spec.action_dim)])
    bounds = bounds_of(store)
    if bounds is None:
        return [{**one, "physical": None} for one in facts]
    reached = physical(np.stack([running.low, running.high]), bounds).T.tolist()
    return [{**one, "physical": pair} for one, pair in zip(facts, reached, strict=True)]


def _blocks(store: Store, name: str) -> Iterator[np.ndarray]:
    column = Column(store, name)
    for start in range(0, store.num_rows, BLOCK_ROWS):
        yield column.rows(start, min(start + BLOCK_ROWS, store.num_rows))
