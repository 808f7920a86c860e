"""A Stable-Baselines3 replay buffer, saved as npz by the lines in docs/formats.md. Its own pickles are never read.

`observations`, `next_observations`, `actions`, `rewards`, `dones`, `timeouts`: (N, environments, ...), oldest first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cvlctl.data.formats.archives import open_npz
from cvlctl.data.formats.cutting import flags
from cvlctl.data.formats.making import Maker
from cvlctl.data.formats.rows import Cuts, episodes_of_rows, judge
from cvlctl.data.formats.sources import Arrays, Column, Facts, Told
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode
from cvlctl.units import Bounds

REQUIRED = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def read(
    path: str | Path,
    told: Told | None = None,
    *,
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
) -> Iterator[Episode]:
    """The episodes of a replay buffer, environment by environment; each one's last is cut off by the buffer's end."""
    path, cuts = Path(path), Cuts()
    maker, count = Maker(path, action_bounds, clip_actions, told=told), _environments(path)
    for number in range(count):
        with open_npz(path) as arrays:
            columns = {name: _of(arrays.column(name), number) for name in REQUIRED}
            columns["terminals"] = _terminals(arrays, number)
            del columns["dones"]
            cuts += yield from episodes_of_rows(maker, columns, horizon=None, stride=count, offset=number)
    judge(path, cuts, timeouts=True, seams=count)
    maker.finish()


def facts(path: Path) -> Facts:
    """The number of transitions; a buffer names no task."""
    with open_npz(path) as arrays:
        arrays.need(*REQUIRED)
        return Facts(len(arrays.column("actions")) * _width(arrays))


def _environments(path: Path) -> int:
    with open_npz(path) as arrays:
        arrays.need(*REQUIRED)
        return _width(arrays)


def _width(arrays: Arrays) -> int:
    shapes = {name: arrays.column(name).shape for name in REQUIRED}
    widths = {shape[1] if len(shape) > 1 else 0 for shape in shapes.values()}
    if len(widths) > 1 or 0 in widths:
        what = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise CvlctlError(f"{arrays.path}: expected (N, environments, ...): {what}", "save it as docs/formats.md says")
    return widths.pop()


def _of(column: Column, number: int) -> Column:
    """The column of one environment."""
    shape = (column.shape[0], *column.shape[2:])
    return Column(column.where, shape, column.dtype, lambda _, count: column.take(count)[:, number])


def _terminals(arrays: Arrays, number: int) -> Column:
    """Done, and not by a time limit."""
    done, timeout = (_of(arrays.column(name), number) for name in ("dones", "timeouts"))

    def fetch(_: int, count: int) -> np.ndarray:
        return flags(done.take(count), done.where) & ~flags(timeout.take(count), timeout.where)

    return Column(done.where, (min(len(done), len(timeout)),), np.dtype(bool), fetch)
