"""D4RL's HDF5: rows on one time axis, as its `qlearning_dataset` and `sequence_dataset` read them.

Read: any version; float32 or float64, (N,) or (N, 1), with or without `timeouts` and `next_observations` (`rows.py`
says what becomes of an episode's end). Written: version 2's layout. What D4RL has no place for lies where its readers
find nothing amiss: successes, collected_at, seed and task as rows under `infos/`, the rest in an attribute of the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.data.formats.hdf5 import fixed_text, open_hdf5
from cvlctl.data.formats.hdf5_out import new_hdf5
from cvlctl.data.formats.making import Maker
from cvlctl.data.formats.rows import episodes_of_rows, judge
from cvlctl.data.formats.seeing import only_array
from cvlctl.data.formats.sources import Arrays, Facts, Told, steps_of
from cvlctl.data.store import Store
from cvlctl.data.units import bounds_of, export_digest, exported_units
from cvlctl.errors import CvlctlError
from cvlctl.folders import replacing
from cvlctl.types import Episode
from cvlctl.units import KEY, Bounds, physical, plain

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations")
OURS = {"successes": "infos/success", "collected_at": "infos/collected_at", "seed": "infos/seed", "task": "infos/task"}
ATTRIBUTE = "cvlctl"
CHUNK_BYTES = 2**18
BLOCK_ROWS = 2**16


def read(
    path: str | Path,
    told: Told | None = None,
    *,
    horizon: int | None = None,
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
) -> Iterator[Episode]:
    """The episodes of a D4RL file; `horizon` is needed where neither timeouts nor next_observations mark cuts."""
    with open_hdf5(Path(path)) as arrays:
        arrays.need(*REQUIRED)
        ours = _ours(arrays)
        names = {name: name for name in (*REQUIRED, *OPTIONAL) if name in arrays.names}
        if ours:
            names |= {name: key for name, key in OURS.items() if key in arrays.names}
            if not ours["rewards"]:
                del names["rewards"]
        columns = {name: arrays.column(key) for name, key in names.items()}
        maker = Maker(arrays.path, action_bounds, clip_actions, ours.get(KEY), told)
        cuts = yield from episodes_of_rows(maker, columns, horizon=horizon, tasks=ours.get("tasks", ()))
        judge(arrays.path, cuts, timeouts="timeouts" in columns)
        maker.finish()


def facts(path: Path) -> Facts:
    """The task and horizon are known where cvlctl wrote the file."""
    with open_hdf5(path) as arrays:
        arrays.need(*REQUIRED)
        ours = _ours(arrays)
        return Facts(
            len(arrays.column("actions")), ours.get("task", ""), ours.get("horizon"),
            action_bounds=ours.get(KEY), exported=ours.get("exported", ""), units=ours.get("units", {}),
        )  # fmt: skip


def _ours(arrays: Arrays) -> dict[str, Any]:
    """What `write` left in the file's attribute; empty in anybody else's file."""
    found, where = arrays.value(ATTRIBUTE), f"{arrays.path}: attribute {ATTRIBUTE!r}"
    if found is None:
        return {}
    try:
        found = json.loads(found)
        tasks = [str(task) for task in found["tasks"]]
        horizon, bounds = steps_of(found["horizon"], where), plain(found.get(KEY), where)
        return {"task": str(found["task"]), "tasks": tasks, "horizon": horizon, "rewards": bool(found["rewards"]),
                KEY: bounds, "exported": str(found.get("exported", "")),
                "units": dict(found.get("units", {}))}  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"{arrays.path}: the attribute {ATTRIBUTE!r} is damaged: {error}"
        raise CvlctlError(what, "write the file again") from error


def write(store: Store, path: Path, label: str, force: bool = False) -> None:
    """Write a store as D4RL's version 2 does; without reward labels, with rewards of zero."""
    last = store.episode_ends() - 1
    row = np.delete(np.arange(last[-1] + 1), last)  # of each transition
    final = np.zeros(last[-1] + 1, bool)
    final[last - 1] = True
    ended = np.repeat(store.terminated(), store.lengths())
    observations, has_rewards, bounds = store.array(only_array(store)), store.has_label(label), bounds_of(store)
    per_episode = {"collected_at": store.collected_at(), "seed": store.seeds(),
                   "task": np.array([store.task_names.index(t) for t in store.episode_tasks()], np.int32)}  # fmt: skip
    arrays = {
        "observations": lambda at: observations[row[at]],
        "next_observations": lambda at: observations[row[at] + 1],
        "actions": lambda at: physical(store.actions()[row[at]], bounds),
        "rewards": lambda at: store.rewards(label)[row[at]] if has_rewards else np.zeros(len(row[at]), np.float32),
        "terminals": lambda at: final[row[at]] & ended[at],
        "timeouts": lambda at: final[row[at]] & ~ended[at],
    }
    if store.has_label(label, "success"):
        arrays[OURS["successes"]] = lambda at: store.successes(label)[row[at]]
    with replacing(path, force=force) as temporary, new_hdf5(temporary, libver=("v108", "latest")) as (file, check):
        for name, take in arrays.items():
            _write(file, name, len(row), take, check)
        for name, values in per_episode.items():
            wide = np.repeat(values, store.lengths())
            _write(file, OURS[name], len(row), lambda at, wide=wide: wide[at], check)
        about = {"task": store.task, "tasks": store.task_names, "horizon": store.spec.horizon, "rewards": has_rewards,
                 KEY: plain(bounds), "exported": export_digest("d4rl", store, label)}  # fmt: skip
        if more := exported_units(store):
            about["units"] = more
        file.attrs[ATTRIBUTE] = fixed_text(json.dumps(about))


def _write(file: Any, name: str, length: int, take: Any, check: Callable[[], None]) -> None:
    first = take(slice(0, 1))
    chunk = max(1, min(length, CHUNK_BYTES // max(1, first[0].nbytes)))
    made = file.create_dataset(
        name, (length, *first.shape[1:]), first.dtype, chunks=(chunk, *first.shape[1:]), compression="gzip",
        compression_opts=1, shuffle=True,
    )  # fmt: skip
    for start in range(0, length, BLOCK_ROWS):
        made[start : start + BLOCK_ROWS] = take(slice(start, start + BLOCK_ROWS))
        check()
