"""What all readers end in: an episode of what they read, its actions scaled; what float32 merges of it is said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.data.formats.sources import Column, Told
from cvlctl.errors import CvlctlError
from cvlctl.progress import say
from cvlctl.types import Episode
from cvlctl.units import Bounds, scaled

NOISE = 1e-10  # relative: what varies by less within an episode is the rounding of whatever computed it
BLOCK_ROWS = 2**14  # what is compared at a time


def continuous(column: Column) -> Column:
    """The column, if its values can be continuous actions.

    Raises:
        CvlctlError: integers or booleans: the actions of a discrete task.
    """
    if column.dtype.kind != "f":
        what = f"{column.where}: {column.dtype} actions have shape {column.shape}: discrete actions are not supported"
        raise CvlctlError(what, "cvlctl learns continuous ones, (T, A); if these are such, save them as floats")
    return column


class Maker:
    """Makes the episodes of one file.

    Args:
        path: the file's, for what is said at the end.
        bounds, clip: of its actions; see `units.scaled`.
        said: the bounds that the file itself says, used where none are given.
        told: what is noted down: how many values were cut off, and what is said at the end.
    """

    def __init__(
        self, path: Path, bounds: Bounds | None, clip: bool, said: Bounds | None = None, told: Told | None = None
    ) -> None:
        self.told = told or Told()
        self.path, self._bounds, self._clip = path, said if bounds is None else bounds, clip
        self._changes = self._merged = np.zeros(0, np.int64)
        self._allowed = 0.5  # share of the changes that may be lost unsaid: what hardly moves always loses some

    def make(self, where: str, **parts: Any) -> Iterator[Episode]:
        """An episode, or none where it is dropped; what is wrong with it begins with `where`."""
        self.told.episodes += 1
        if self.told.drop_nan and (name := _not_finite(parts)):
            self.told.bad.append(f"{where.removeprefix(f'{self.path}: ')} ({name})")
            return
        try:
            parts["actions"] = self._scaled(parts["actions"])
            if parts.get("observations") is not None:
                self._compare(parts["observations"])
            made = Episode(**parts)
        except CvlctlError as error:
            hint = error.hint
            if "outside [-1, 1]" in error.what:
                hint = "say in which bounds they lie, --action-bounds LOW HIGH, or cut them off, --clip-actions"
            elif "NaN" in error.what:
                hint = "repair them, or leave such episodes out: --drop-episodes-with nan"
            raise CvlctlError(f"{where}: {error.what}", hint) from error
        yield made

    def finish(self, names: Sequence[str] = ()) -> None:
        """After the last episode: say which columns of the observations lost what they told, if any did.

        Args:
            names: of the columns, where the file has any.
        """
        if self.told.bad:
            rest = f" and {len(self.told.bad) - 10} more" if len(self.told.bad) > 10 else ""
            self.told.remarks.append(
                f"{len(self.told.bad)} of {self.told.episodes} episodes were dropped for NaN or infinity: "
                f"{', '.join(self.told.bad[:10])}{rest}"
            )
        lost = np.flatnonzero(self._merged > self._allowed * self._changes).tolist()
        if not lost:
            return
        told = [
            f"{names[i] if i < len(names) else f'column {i}'} ({self._merged[i]:,} of {self._changes[i]:,} changes)"
            for i in lost[:10]
        ]
        more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
        say(
            f"{self.path}: in float32 these observations no longer change where they did: {', '.join(told)}{more}; "
            "of a clock or a large offset, subtract the first value, or leave it out"
        )

    def _scaled(self, actions: np.ndarray) -> np.ndarray:
        actions = scaled(actions, self._bounds, clip=False)
        if not self._clip:
            return actions
        self.told.values += actions.size
        self.told.clipped += int(np.count_nonzero(np.abs(actions) > 1.0))
        return np.clip(actions, -1, 1)

    def _compare(self, observations: np.ndarray) -> None:
        """Count, column by column, the changes from one row to the next, and those that are none in float32."""
        wide = observations.dtype.itemsize > 4 or observations.dtype in (np.int32, np.uint32)
        if observations.ndim != 2 or len(observations) < 2 or not wide:
            return
        changes = np.zeros(observations.shape[1], np.int64)
        merged = changes.copy()
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are told of with their episode
            for start in range(0, len(observations) - 1, BLOCK_ROWS):
                rows = observations[start : start + BLOCK_ROWS + 1]
                narrow, changed = rows.astype(np.float32), rows[1:] != rows[:-1]
                changes += changed.sum(axis=0)
                merged += (changed & (narrow[1:] == narrow[:-1])).sum(axis=0)
            low, high = observations.min(axis=0).astype(np.float64), observations.max(axis=0).astype(np.float64)
            noise = high - low <= NOISE * np.maximum(np.abs(low), np.abs(high))
        changes[noise] = merged[noise] = 0
        if len(self._changes) != len(changes):  # another width is the writer's to refuse
            self._changes, self._merged = np.zeros_like(changes), np.zeros_like(changes)
        self._changes += changes
        self._merged += merged
        if observations.dtype.kind in "iu":  # that count, and have no noise
            self._allowed = 0.0


def _not_finite(parts: dict[str, Any]) -> str:
    """Which of an episode's arrays holds what float32 has no number for; "" where none does."""
    with np.errstate(over="ignore"):
        for name in ("observations", "actions", "rewards"):
            values = parts.get(name)
            if values is not None and values.dtype.kind == "f" and not np.isfinite(values.astype(np.float32)).all():
                return name
    return ""
