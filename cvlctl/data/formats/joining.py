"""Observations that lie in several arrays, of an HDF5 group or by name, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cvlctl.data.formats.hdf5 import dataset_column, dataset_in, datasets
from cvlctl.data.formats.pictures import coded
from cvlctl.data.formats.sources import Column, same_length
from cvlctl.errors import CvlctlError
from cvlctl.play.spaces import natural

if TYPE_CHECKING:
    import h5py

CHOOSE = "choose by --observation-key (in Python, observation_keys)"


class Observations:
    """Joins the arrays of one group after the other; which ones, the first group settles, by names and shapes.

    Args:
        path: the file's, for messages.
        keys: the arrays to join, in this order; none: all of at most two dimensions, by name, numbers in names as
            numbers. A single one of more dimensions (an image) is taken as it is.
        alone: whether frames of cameras are imported beside, so that without any there is no error.

    Raises:
        CvlctlError: a name that is not there, or named twice; an image beside others; a group unlike the first one.
    """

    def __init__(self, path: Path, keys: Sequence[str], alone: bool = False) -> None:
        self._path, self.keys, self._alone = path, list(keys), alone
        self._widths: dict[str, tuple[int, ...]] = {}
        self._several: bool | None = None
        self.left_out: list[str] = []  # arrays of the first group that are not joined
        if twice := [key for key in self.keys if self.keys.count(key) > 1]:
            raise CvlctlError(f"--observation-key {twice[0]} is given twice", "name each array once")

    def several(self, found: bool, where: str) -> bool:
        """`found`: whether observations are a group here; raises a CvlctlError where that is unlike the first time, or
        keys are given, and it is not one."""
        if self.keys and not found:
            raise CvlctlError(f"{where}: is one array, not several to choose from", "leave out --observation-key")
        if found != (self._several if self._several is not None else found):
            raise CvlctlError(f"{where}: is {'several arrays' if found else 'one array'}, unlike the first")
        self._several = found
        return found

    def of(self, group: h5py.Group) -> np.ndarray | None:
        """(N, sum of sizes) of a group, in a type that holds all of them; (N, ...) of a single array; None of none."""
        columns = {name: dataset_column(self._path, group, name) for name in self._of_group(group)}
        if not columns:
            return None
        length = same_length(self._path, columns)
        return beside([column.rest() for column in columns.values()], length)

    def last(self, group: h5py.Group) -> np.ndarray | None:
        """(1, ...): the same of a group's last row alone; (0, ...) where it has none."""
        parts = [np.asarray(dataset_in(self._path, group, name)[-1:]) for name in self._of_group(group)]
        return beside(parts, 1) if parts else None

    def of_arrays(self, where: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """As `of`, of arrays by name."""
        names = self.chosen(where, {name: values.shape for name, values in arrays.items()})
        if not names:
            return None
        length = same_length(where, {name: arrays[name] for name in names})
        return beside([arrays[name] for name in names], length)

    def columns(self) -> list[str]:
        """Names of the joined columns, such as "joints[2]"."""
        named = []
        for name, shape in self._widths.items():
            named += [f"{name}[{i}]" for i in range(shape[0])] if shape and shape != (1,) else [name]
        return named

    def _of_group(self, group: h5py.Group) -> list[str]:
        there = datasets(self._path, group).items()
        shapes = {name: tuple(found.shape or ()) for name, found in there if name in self.keys or not coded(found)}
        return self.chosen(f"{self._path}: {group.name.strip('/')}", shapes)

    def chosen(self, where: str, arrays: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Names of the arrays to join, of those that are there with their shapes, one row a step."""
        there = {name: shape[1:] for name, shape in arrays.items()}
        shapes = {name: shape or (1,) for name, shape in there.items() if name in self.keys or len(shape) < 2}
        if self._widths:
            found = {name: shapes[name] for name in self.keys or shapes if name in shapes}
            if found != self._widths:
                raise CvlctlError(f"{where}: {_difference(found, self._widths)}", f"{CHOOSE} what all of them have")
            return list(self._widths)
        for name in self.keys:
            if name not in there:
                raise CvlctlError(f"{where}: no observation {name!r}", f"it has: {', '.join(sorted(there)[:20])}")
        chosen = self.keys or sorted(shapes, key=natural)
        if not chosen and self._alone:
            return []
        if not chosen:
            hint = f"--camera NAME takes them; {CHOOSE}: {', '.join(sorted(there)[:20])}"
            raise CvlctlError(f"{where}: nothing but images", hint)
        if len(chosen) > 1 and any(len(shapes[name]) > 1 for name in chosen):
            listed = ", ".join(f"{name} {shapes[name]}" for name in chosen)
            raise CvlctlError(f"{where}: an image does not join with others: {listed}", CHOOSE)
        self._widths = {name: shapes[name] for name in chosen}
        self.left_out = sorted(set(there) - set(chosen))
        return list(self._widths)


def beside(parts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Arrays of `length` rows side by side; one alone stays as it is, a number a row becomes a row of one."""
    if len(parts) == 1 and parts[0].ndim > 1:
        return parts[0]
    return np.concatenate([part.reshape(length, -1) for part in parts], axis=1)


def side_by_side(columns: Sequence[Column]) -> Column:
    """(N, sum of widths) of columns of numbers or rows; one alone of rows stays as it is."""
    if len(columns) == 1 and len(columns[0].shape) > 1:
        return columns[0]
    widths = [1 if len(column.shape) == 1 else column.shape[1] for column in columns]
    same_length(columns[0].where, {column.where: column for column in columns})

    def fetch(_: int, count: int) -> np.ndarray:
        return beside([column.take(count) for column in columns], count)

    kind = np.result_type(*(column.dtype for column in columns))
    return Column(columns[0].where, (len(columns[0]), sum(widths)), kind, fetch)


def _difference(found: dict[str, tuple[int, ...]], first: dict[str, tuple[int, ...]]) -> str:
    told = [f"{name} is missing" for name in first if name not in found]
    told += [f"{name} is new" for name in found if name not in first]
    told += [
        f"{name} has rows of shape {found[name]}, not {shape}"
        for name, shape in first.items() if found.get(name, shape) != shape
    ]  # fmt: skip
    return f"is unlike the first: {', '.join(told[:10])}"
