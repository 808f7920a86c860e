"""What networks are shown at rows of a store: its vector, frames of its cameras in stacks, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from cvlctl.data.store import Column, Store
from cvlctl.play.sights import VECTOR, Seen
from cvlctl.types import Observe

ROWS, FRAMES = 16_384, 512  # at a time, of vectors and of frames: bounds memory


class Sight:
    """Reads a store as a policy is shown it, chunk by chunk: each once where rows are asked for in ascending order.

    Args:
        observe: what is seen of its cameras; None: the vector alone.

    Raises:
        CvlctlError: there is no such camera, or the store is damaged.
    """

    def __init__(self, store: Store, observe: Observe | None) -> None:
        self._observe, self._ends = observe, store.episode_ends()
        self._vector = Column(store, "data/observation") if observe is None or observe.vector else None
        cameras = () if observe is None else observe.cameras
        self._cameras = {camera: Column(store, store.camera_array(camera)) for camera in cameras}

    def at(self, rows: np.ndarray) -> Seen:
        """Of rows (N,) that ascend the vector (N, O), or by camera (N, S, H, W, C) and "vector" where it is seen."""
        if self._observe is None:
            assert self._vector is not None
            return self._vector.take(rows)
        shown = {name: stacks(column, self._ends, rows, self._observe.stack) for name, column in self._cameras.items()}
        return shown if self._vector is None else {**shown, VECTOR: self._vector.take(rows)}


def stacks(column: Column, ends: np.ndarray, rows: np.ndarray, stack: int) -> np.ndarray:
    """(N, stack, H, W, C) of rows (N,) that ascend: each frame and those before it, the latest last; before an
    episode's first frame stands that one again.

    Args:
        column: of a camera. ends: (n,) cumulative row counts of the store's episodes.
    """
    first = np.append(0, ends)[np.searchsorted(ends, rows, side="right")]
    place = np.maximum(rows[:, None] - np.arange(stack)[::-1], first[:, None])
    needed, where = np.unique(place, return_inverse=True)
    return column.take(needed)[where.reshape(place.shape)]


def pieces(stores: Sequence[Store], observe: Observe | None) -> Iterator[Seen]:
    """What is seen at all rows of stores, in order."""
    for store in stores:
        sight, size = Sight(store, observe), FRAMES if observe else ROWS
        for rows in np.split(np.arange(store.num_rows), range(size, store.num_rows, size)):
            yield sight.at(rows)


def state_of(stores: Sequence[Store], observe: Observe | None) -> Callable[[int], Seen]:
    """What is seen at one row of stores, counted through all of them; of rows that ascend each chunk is read once."""
    ends = np.cumsum([store.num_rows for store in stores])
    sight = lru_cache(maxsize=1)(lambda i: Sight(stores[i], observe))

    def state(j: int) -> Seen:
        i = int(np.searchsorted(ends, j, side="right"))
        return sight(i).at(np.array([j - int(ends[i]) + stores[i].num_rows]))

    return state
