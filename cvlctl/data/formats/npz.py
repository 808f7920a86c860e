"""The plain npz: one array a thing, and `episode_ends`.

`observations` (sum(T+1), ...) with every final observation, `actions` (sum(T), A), `episode_ends` (episodes,): counts
of *actions* so far, so that the observations of episode i start at `episode_ends[i-1] + i`. Where there are such:
`rewards`, `successes` (sum(T),); `terminated`, `collected_at`, `seeds`, `tasks` (episodes,); `task`, `horizon`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.data.formats.archives import open_npz
from cvlctl.data.formats.cutting import Bounds, flags, flat, make
from cvlctl.data.formats.sources import Arrays, Column, Facts, replacing, same_length
from cvlctl.data.store import Store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

TABLE = ("terminated", "collected_at", "seeds")  # one value an episode


def read(path: str | Path, *, action_bounds: Bounds | None = None, clip_actions: bool = False) -> Iterator[Episode]:
    """The episodes of a plain npz file."""
    with open_npz(Path(path)) as arrays:
        arrays.need("observations", "actions", "episode_ends")
        ends = _integers(arrays.column("episode_ends"))
        observations, actions = arrays.column("observations"), arrays.column("actions")
        steps: dict[str, Column] = {
            name: arrays.column(name) for name in ("rewards", "successes") if name in arrays.names
        }
        total = same_length(arrays.path, {"actions": actions} | steps)
        if len(ends) == 0 or ends[-1] != total or len(observations) != total + len(ends):
            what = f"{total} actions and {len(observations)} observations, but {len(ends)} episodes"
            raise CvlctlError(f"{arrays.path}: {what} of {ends[-1] if len(ends) else 0} actions in episode_ends",
                              "each episode has one observation more than it has actions")  # fmt: skip
        table = read_table(arrays, len(ends))
        start = 0
        for number, end in enumerate(ends):
            if end <= start:
                raise CvlctlError(f"{arrays.path}: episode_ends: episode {number} has {end - start} actions")
            count = end - start
            parts = {name: column.take(count) for name, column in steps.items()}
            yield make(
                f"{arrays.path}: episode {number}", action_bounds, clip_actions,
                observations=observations.take(count + 1), actions=actions.take(count),
                rewards=flat(parts["rewards"], "rewards") if "rewards" in parts else None,
                successes=flags(parts["successes"], "successes") if "successes" in parts else None,
                **({"collected_at": start} | table[number]),
            )  # fmt: skip
            start = end


def facts(path: Path) -> Facts:
    """The task, the horizon and the number of transitions, as the file has them."""
    with open_npz(path) as arrays:
        arrays.need("observations", "actions")
        return Facts(len(arrays.column("actions")), *task_and_horizon(arrays))


def task_and_horizon(arrays: Arrays) -> tuple[str, int | None]:
    """What `table_arrays` wrote; "" and None where there is nothing."""
    task = arrays.text("task") if "task" in arrays.names else [""]
    horizon = _integers(arrays.column("horizon")) if "horizon" in arrays.names else [None]
    if len(task) != 1 or len(horizon) != 1:
        raise CvlctlError(f"{arrays.path}: task and horizon are single values")
    return task[0], horizon[0]


def read_table(arrays: Arrays, episodes: int) -> list[dict[str, Any]]:
    """What the file says about each episode, by the names that `Episode` has for it."""
    rows: list[dict[str, Any]] = [{} for _ in range(episodes)]
    ours = {"terminated": "terminated", "collected_at": "collected_at", "seeds": "seed", "tasks": "task"}
    for name in ours:
        if name not in arrays.names:
            continue
        values: list[Any] = arrays.text(name) if name == "tasks" else _integers(arrays.column(name))
        if len(values) != episodes:
            raise CvlctlError(f"{arrays.path}: {name}: has {len(values)} values for {episodes} episodes")
        for row, value in zip(rows, values, strict=True):
            row[ours[name]] = value
    return rows


def _integers(column: Column) -> list[int]:
    values = flat(column.rest(), column.where)
    if values.dtype.kind not in "iub":
        raise CvlctlError(f"{column.where}: holds {values.dtype}, not whole numbers")
    return [int(value) for value in values.tolist()]


def table_arrays(store: Store) -> dict[str, np.ndarray]:
    """The arrays of a store that have one value an episode, and its task and horizon."""
    return {
        "terminated": store.terminated(), "collected_at": store.collected_at(), "seeds": store.seeds(),
        "tasks": np.array(store.episode_tasks()), "task": np.array(store.task),
        "horizon": np.array([store.spec.horizon]),
    }  # fmt: skip


def write(store: Store, path: Path, label: str) -> None:
    """Write a store as a plain npz."""
    row = np.delete(np.arange(len(store.observations())), store.episode_ends() - 1)
    arrays = {"observations": store.observations(), "actions": store.actions()[row],
              "episode_ends": np.cumsum(store.lengths()), **table_arrays(store)}  # fmt: skip
    if store.has_label(label):
        arrays["rewards"] = store.rewards(label)[row]
    if store.has_label(label, "success"):
        arrays["successes"] = store.successes(label)[row]
    save(path, arrays)


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz file, compressed, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
