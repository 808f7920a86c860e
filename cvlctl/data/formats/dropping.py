"""Columns of observations that are left out as episodes are read, and the names of those that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cvlctl.data.formats.sources import Told
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode


class Dropping:
    """Leaves columns out of the episodes of one file.

    Args:
        path: the file's, for messages.
        drop: names of columns, or numbers from 0.
        told: what the reader tells; the names are there with the first episode.

    Attributes:
        kept, dropped: names of the columns once an episode has come; `kept` is empty where nobody named them.
    """

    def __init__(self, path: Path, drop: Sequence[str], told: Told) -> None:
        self._path, self._drop, self._told = path, [str(one) for one in drop], told
        self.kept: list[str] = []
        self.dropped: list[str] = []
        self._stay: np.ndarray | None = None

    def of(self, episode: Episode) -> Episode:
        """The episode with the columns that stay.

        Raises:
            CvlctlError: no such column, none that stays, or observations that are no vectors.
        """
        if self._stay is None:
            self._settle(episode.observations.shape[1:])
        if not self._drop:
            return episode
        if episode.observations.shape[1:] != self._shape:  # the writer says so
            return episode
        return replace(episode, observations=episode.observations[:, self._stay])

    def _settle(self, shape: tuple[int, ...]) -> None:
        names, self._shape = self._told.columns, shape
        if names and len(shape) == 1 and len(names) != shape[0]:
            what = f"{self._path}: {len(names)} columns are named, and observations have {shape[0]}"
            raise CvlctlError(what, "name all of them, in their order: --columns a,b,c")
        if not all(names):
            raise CvlctlError(f"{self._path}: column {names.index('')} has an empty name", "--columns x,y,battery")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise CvlctlError(f"{self._path}: two columns are called {twice}", "give each a name of its own")
        if self._drop and len(shape) != 1:
            raise CvlctlError(f"{self._path}: observations of shape {shape} have no columns to drop", "drop none")
        gone = {self._number(name, shape[0]) for name in self._drop}
        if gone and len(gone) == shape[0]:
            raise CvlctlError(f"{self._path}: --drop-column leaves no column of {shape[0]}", "keep one at least")
        self._stay = np.array([i for i in range(shape[0]) if i not in gone]) if gone else np.arange(0)
        self.kept = [name for i, name in enumerate(names) if i not in gone]
        self.dropped = [names[i] if names else f"column {i}" for i in sorted(gone)]

    def _number(self, name: str, width: int) -> int:
        if name in self._told.columns:
            return self._told.columns.index(name)
        if name.isdecimal() and int(name) < width:
            return int(name)
        there = ", ".join(self._told.columns[:20]) or f"0 to {width - 1}; --columns gives them names"
        raise CvlctlError(f"{self._path}: no column {name!r} to drop", f"there are: {there}")
