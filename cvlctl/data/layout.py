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


def rows_of(episode: Episode, labels: Sequence[str]) -> dict[str, np.ndarray]:
    """An episode's T+1 rows of each array that it has; `labels` are the names of rewards and of successes."""
    rows = {OBSERVATION: episode.observations} if episode.observations.shape[1:] != (0,) else {}
    values = (episode.actions, episode.rewards, episode.successes)
    for name, value in zip((ACTION, *labels), values, strict=True):
        if value is not None:  # a row of zeros goes beside the final observation
            rows[name] = np.concatenate([value, np.zeros_like(value[:1])])
    rows |= {f"{IMAGES}{camera}": frames for camera, frames in (episode.images or {}).items()}
    return rows if episode.sim_state is None else rows | {SIM: episode.sim_state}


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


def problem(name: str, values: np.ndarray, num_rows: int, num_tasks: int) -> str:
    """What is wrong with an array's values, "" if nothing: what would garble training, and costs next to nothing to
    find. That they are those that were written is for the checksums to say."""
    if values.dtype.kind == "f" and values.size:
        low, high = values.min(), values.max()  # NaN if any is NaN
        if not np.isfinite([low, high]).all():
            return "NaN or infinity"
        if name == ACTION and max(-low, high) > 1.0:
            return "actions outside [-1, 1]"
    elif name == "meta/episode_ends":
        lengths = np.diff(values, prepend=0) - 1
        if len(values) == 0 or (lengths < 1).any():
            return f"episode {int(np.argmax(lengths < 1)) if len(values) else 0} has fewer than 2 rows"
        if values[-1] != num_rows:
            return f"the last episode ends at row {int(values[-1])} of {num_rows}"
    elif name == "meta/task" and len(values) and (values.min() < 0 or values.max() >= num_tasks):
        return f"indices outside the {num_tasks} task names"
    return ""
