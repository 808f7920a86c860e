"""Where the episodes of rows lie, as files say it beside flags of their ends: starts, ends, lengths, or an index."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from cvlctl.data.formats.cutting import BATCH_ROWS, flat
from cvlctl.data.formats.sources import Arrays, Column
from cvlctl.errors import CvlctlError

# numbers of first rows, or a flag a row; such flags; numbers after last rows; numbers of rows; a number a row that
# changes with the episode
NAMES = ("episode_starts", "is_first", "episode_ends", "episode_lengths", "episode_index")


def ends_of(path: Path, columns: Mapping[str, Column], total: int) -> np.ndarray | None:
    """(episodes,) counts of rows up to each episode's end, of whichever of `NAMES` a file has; None: it has none.

    Raises:
        CvlctlError: what is no such thing, or two of them that say different things.
    """
    found = {name: _ENDS[name](columns[name], total) for name in NAMES if name in columns}
    for name, ends in found.items():
        where = columns[name].where
        if len(ends) == 0 or ends[-1] != total or (np.diff(ends, prepend=0) <= 0).any():
            told = f"{len(ends)} episodes that end after {ends[-1] if len(ends) else 0} rows"
            raise CvlctlError(f"{where}: as {name} it says {told}; there are {total} rows", _MEANT[name])
        (first, ours) = next(iter(found.items()))
        if not np.array_equal(ours, ends):
            what = f"{path}: {columns[first].where.removeprefix(f'{path}: ')} and {where.removeprefix(f'{path}: ')}"
            raise CvlctlError(f"{what} say different episodes: {len(ours)} and {len(ends)}", "write what is right once")
    return next(iter(found.values()), None)


def check_names(keys: Mapping[str, str], legal: Sequence[str]) -> None:
    """Raise a CvlctlError where `keys` has a name of ours that is none."""
    for name in keys:
        if name not in legal:
            near = difflib.get_close_matches(name, legal, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(legal)}"
            raise CvlctlError(f"--key {name}={keys[name]}: no array {name!r}", hint)


def need_keys(arrays: Arrays, keys: Mapping[str, str], *required: str) -> None:
    """Raise a CvlctlError where the file has not all arrays that `keys` names, or that are required."""
    for ours in (*required, *keys):
        if (theirs := keys.get(ours, ours)) not in arrays.names:
            near = difflib.get_close_matches(theirs, arrays.names, n=1)
            there = ", ".join(arrays.names[:20]) or "nothing"
            asked = f"did you mean {near[0]}? " if near else ""
            hint = f"{asked}--key {ours}=NAME says which array it is: the file has {there}"
            raise CvlctlError(f"{arrays.path}: no array {theirs!r}", hint)


def marked(path: Path, columns: Mapping[str, Column], total: int) -> dict[str, Column]:
    """The column "ends" of rows whose episodes one of `NAMES` tells; nothing where none does."""
    ends = ends_of(path, columns, total)
    return {} if ends is None else {"ends": last_rows(path, ends, total)}


def last_rows(path: Path, ends: np.ndarray, total: int) -> Column:
    """(N,) bool: the last row of each episode."""
    last = ends - 1

    def fetch(start: int, count: int) -> np.ndarray:
        flags = np.zeros(count, bool)
        flags[last[np.searchsorted(last, start) : np.searchsorted(last, start + count)] - start] = True
        return flags

    return Column(f"{path}: ends of episodes", (total,), np.dtype(bool), fetch)


def _whole(column: Column) -> np.ndarray:
    """(N,) int64 of whole numbers, as floats too; (0,) where they are none."""
    values = flat(column.rest(), column.where)
    if values.dtype.kind == "f" and not (
        np.isfinite(values).all() and (values == np.floor(values)).all() and np.abs(values).max(initial=0) < 2**53
    ):
        raise CvlctlError(f"{column.where}: holds {values.dtype}, not whole numbers", "save it as integers")
    return values.astype(np.int64)


def _where(column: Column, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Numbers of the rows at which an episode begins, of (values, those of the row before)."""
    found, before, start = [], None, 0
    while start < len(column):
        values = flat(column.take(min(BATCH_ROWS, len(column) - start)), column.where)
        earlier = np.concatenate([values[:1] if before is None else before, values[:-1]])
        found.append(np.flatnonzero(change(values, earlier)) + start)
        before, start = values[-1:], start + len(values)
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _of_starts(starts: np.ndarray, total: int, where: str, name: str) -> np.ndarray:
    if len(starts) and starts[0] != 0:
        raise CvlctlError(f"{where}: as {name} its first episode begins at row {starts[0]}, not 0", _MEANT[name])
    return np.append(starts[1:], total)


def _starts(column: Column, total: int) -> np.ndarray:
    if column.dtype.kind == "b" or len(column) == total:
        return _first(column, total)
    return _of_starts(_whole(column), total, column.where, "episode_starts")


def _first(column: Column, total: int) -> np.ndarray:
    _a_row_each(column, total, "is_first")
    return _of_starts(_where(column, lambda values, _: values != 0), total, column.where, "is_first")


def _index(column: Column, total: int) -> np.ndarray:
    _a_row_each(column, total, "episode_index")
    numbers: list[np.ndarray] = []

    def change(values: np.ndarray, earlier: np.ndarray) -> np.ndarray:
        changed = values != earlier
        numbers.append(values[changed] if numbers else np.append(values[:1], values[changed]))
        return changed

    changes = _where(column, change)
    if changes.size and len(set(np.concatenate(numbers).tolist())) <= len(changes):
        raise CvlctlError(
            f"{column.where}: an episode goes on after another began", "sort the rows by episode and step"
        )
    return np.append(changes, total)


def _a_row_each(column: Column, total: int, name: str) -> None:
    if len(column) != total:
        raise CvlctlError(f"{column.where}: as {name} it has {len(column)} values for {total} rows", _MEANT[name])


_ENDS: dict[str, Callable[[Column, int], np.ndarray]] = {
    "episode_starts": _starts,
    "is_first": _first,
    "episode_ends": lambda column, total: _whole(column),
    "episode_lengths": lambda column, total: np.cumsum(_whole(column)),
    "episode_index": _index,
}
_MEANT = {
    "episode_starts": "it is to hold the numbers of first rows, from 0 on, or a flag a row that is 1 there",
    "is_first": "it is to hold a flag a row, 1 in the first row of each episode",
    "episode_ends": "it is to hold, for each episode, the number of rows up to its end: the last one is all rows",
    "episode_lengths": "it is to hold the number of rows of each episode",
    "episode_index": "it is to hold a number a row, the same within an episode",
}
