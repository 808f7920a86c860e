"""The arrays of a store by name, and rows of them as episodes (`docs/store.md`, "Layout")."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from cvlctl.data.attributes import SpecAttribute
from cvlctl.types import Episode, Spec

LABEL_ARRAYS = ("reward", "success")
META: dict[str, type[np.generic]] = {
    "meta/episode_ends": np.int64,
    "meta/terminated": np.bool_,
    "meta/task": np.int32,
    "meta/collected_at": np.int64,
    "meta/seed": np.int64,
}
OBSERVATION, ACTION = "data/observation", "data/action"
IMAGES, SIM = "data/images/", "sim/state"
PIXELS = f"{IMAGES}pixels"  # where version 1 kept frames as `data/observation`

Rows = Callable[[int, int], np.ndarray]  # first row and end of an array -> those rows


def cameras_of(names: Iterable[str]) -> dict[str, str]:
    """The cameras among arrays: name of each -> name of its array."""
    return {name.removeprefix(IMAGES): name for name in sorted(names) if name.startswith(IMAGES)}


def spec_of(said: SpecAttribute) -> Spec:
    """What a store holds; frames that version 1 kept as observations are those of a camera "pixels"."""
    shape = tuple(said.observation_shape)
    if not said.pixels:
        cameras = {name: (h, w, c) for name, (h, w, c) in said.cameras.items()}
        return Spec(shape, said.action_dim, said.horizon, cameras)
    *above, width, channels = (*shape, 1) if len(shape) == 2 else shape
    size = (math.prod(above), width, channels)  # of stacks of frames, each below the one before
    return Spec((0,), said.action_dim, said.horizon, {"pixels": size})


def split(
    rows: Mapping[str, Rows], table: Iterable[tuple[int, ...]], tasks: Sequence[str], labels: Sequence[str]
) -> Iterator[Episode]:
    """Rows of arrays as episodes; `table` is as `META`, `labels` are the names of rewards and of successes."""
    cameras, start = cameras_of(rows), 0
    for end, ended, task, collected_at, seed in table:

        def of(name: str, stop: int, start: int = start) -> np.ndarray | None:
            return rows[name](start, stop) if name in rows else None

        rewards, successes = (of(name, end - 1) for name in labels)
        images = {camera: rows[name](start, end) for camera, name in cameras.items()}
        yield Episode(
            of(OBSERVATION, end), rows[ACTION](start, end - 1), rewards, successes, bool(ended), tasks[task],
            collected_at, seed, images, of(SIM, end),
        )  # fmt: skip
        start = end
