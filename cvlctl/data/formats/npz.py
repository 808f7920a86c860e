"""The plain npz: one array a thing, and `episode_ends`.

`observations` (sum(T+1), ...) with every final observation, `actions` (sum(T), A), `episode_ends` (episodes,): counts
of *actions* so far, so that the observations of episode i start at `episode_ends[i-1] + i`. Where there are such:
`rewards`, `successes` (sum(T),); `terminated`, `collected_at`, `seeds`, `tasks` (episodes,); `task`, `horizon`;
`action_bounds`, low and high of what the actions lie in (else in [-1, 1]): numbers, or one a dimension, (2, A). Frames
are `images/CAMERA` (sum(T+1), H, W, C) uint8, of any number of cameras, beside observations or instead of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.data.formats import pictures, segments
from cvlctl.data.formats.archives import open_npz
from cvlctl.data.formats.cutting import flags, flat
from cvlctl.data.formats.making import Maker, continuous
from cvlctl.data.formats.seeing import only_array
from cvlctl.data.formats.segments import check_names, need_keys
from cvlctl.data.formats.sources import Arrays, Column, Facts, Told, reading, same_length, steps_of
from cvlctl.data.store import Store
from cvlctl.data.units import bounds_of, export_digest, exported_units
from cvlctl.errors import CvlctlError
from cvlctl.folders import replacing
from cvlctl.types import Episode
from cvlctl.units import KEY, Bounds, physical, plain

STEPS = ("observations", "actions", "rewards", "successes")
TABLE = ("terminated", "collected_at", "seeds")  # one value an episode
EXPORTED = "cvlctl_exported"  # `units.export_digest`
UNITS = "cvlctl_units"  # `units.exported_units`, as JSON


def read(
    path: str | Path,
    told: Told | None = None,
    *,
    keys: Mapping[str, str] | None = None,
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
    image_size: Sequence[int] | None = None,
) -> Iterator[Episode]:
    """The episodes of a plain npz file.

    Args:
        keys: our name -> the file's, of the arrays above; and where episodes lie among the actions, in one of the ways
            of `segments.NAMES`.
    """
    keys = dict(keys or {})
    vectors = {ours: theirs for ours, theirs in keys.items() if not ours.startswith(pictures.KEY)}
    check_names(vectors, (*STEPS, *TABLE, "tasks", *segments.NAMES))
    with open_npz(Path(path)) as arrays:
        images = pictures.images_of(arrays, keys)
        need_keys(arrays, keys, *images, *([] if images else ["observations"]), "actions")
        arrays = renamed(arrays, keys)
        said = [name for name in segments.NAMES if name in arrays.names]
        if said not in ([], ["episode_ends"]) or "episode_ends" in keys:
            columns = {name: arrays.column(name) for name in said}
            found = segments.ends_of(arrays.path, columns, len(arrays.column("actions")))
            ends = [] if found is None else found.tolist()
        else:
            arrays.need("episode_ends")
            ends = integers(arrays.column("episode_ends"))
        yield from episodes_of(arrays, ends, told, action_bounds, clip_actions, image_size)


def renamed(arrays: Arrays, keys: Mapping[str, str]) -> Arrays:
    """The same arrays, some of them under our names."""
    names = [*keys, *(name for name in arrays.names if name not in keys and name not in keys.values())]
    column, text, value = (
        lambda name, get=get: get(keys.get(name, name)) for get in (arrays.column, arrays.text, arrays.value)
    )
    return Arrays(arrays.path, names, column, text, value)


def episodes_of(
    arrays: Arrays, ends: list[int], told: Told | None, action_bounds: Bounds | None, clip_actions: bool,
    image_size: Sequence[int] | None = None,
) -> Iterator[Episode]:  # fmt: skip
    """The episodes of arrays under the names of this layout; `ends` counts the actions up to each one's end."""
    actions, images = continuous(arrays.column("actions")), pictures.images_of(arrays, {})
    seen = {name: arrays.column(name) for name in images}
    seen = pictures.fitted_columns(arrays.path, seen, image_size)
    if "observations" in arrays.names or not images:
        seen["observations"] = arrays.column("observations")
    steps: dict[str, Column] = {name: arrays.column(name) for name in ("rewards", "successes") if name in arrays.names}
    total = same_length(arrays.path, {"actions": actions} | steps)
    for name, column in seen.items():
        if len(ends) and ends[-1] == total and len(column) == total + len(ends):
            continue
        what = f"{total} actions and {len(column)} {name}, but {len(ends)} episodes"
        raise CvlctlError(f"{arrays.path}: {what} of {ends[-1] if len(ends) else 0} actions in episode_ends",
                          "each episode has one observation more than it has actions")  # fmt: skip
    table = read_table(arrays, len(ends))
    maker, start = Maker(arrays.path, action_bounds, clip_actions, said_bounds(arrays), told), 0
    for number, end in enumerate(ends):
        if end <= start:
            raise CvlctlError(f"{arrays.path}: episode_ends: episode {number} has {end - start} actions")
        count = end - start
        parts = {name: column.take(count) for name, column in steps.items()}
        rows = {name: column.take(count + 1) for name, column in seen.items()}
        yield from maker.make(
            f"{arrays.path}: episode {number}",
            observations=rows.pop("observations", None), actions=actions.take(count),
            images={name.removeprefix(pictures.KEY): frames for name, frames in rows.items()},
            rewards=flat(parts["rewards"], "rewards") if "rewards" in parts else None,
            successes=flags(parts["successes"], "successes") if "successes" in parts else None,
            **({"collected_at": start} | table[number]),
        )  # fmt: skip
        start = end
    maker.finish()


def facts(path: Path) -> Facts:
    """The task, the horizon and the number of transitions, as the file has them."""
    with open_npz(path) as arrays:
        return said_facts(arrays)


def said_facts(arrays: Arrays) -> Facts:
    """What `table_arrays` wrote, and the number of rows that actions have."""
    task = arrays.text("task") if "task" in arrays.names else [""]
    if len(task) != 1:
        raise CvlctlError(f"{arrays.path}: task: has {len(task)} values, and should be a single one")
    horizon = arrays.value("horizon")
    limit = None if horizon is None else steps_of(horizon, str(arrays.path))
    exported = "".join(arrays.text(EXPORTED)) if EXPORTED in arrays.names else ""
    units, known = _object(arrays, UNITS), (task[0], limit)
    steps = len(arrays.column("actions")) if "actions" in arrays.names else 0
    return Facts(steps, *known, action_bounds=said_bounds(arrays), exported=exported, units=units)


def _object(arrays: Arrays, name: str) -> dict[str, Any]:
    """The object in an array of one text; {} where there is none."""
    if name not in arrays.names:
        return {}
    with reading(f"{arrays.path}: {name}"):
        found = json.loads("".join(arrays.text(name)))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return found


def said_bounds(arrays: Arrays) -> Bounds | None:
    """The file's `action_bounds`; None where there are none."""
    if KEY not in arrays.names:
        return None
    column = arrays.column(KEY)
    return plain(column.rest().tolist(), column.where)


def read_table(arrays: Arrays, episodes: int) -> list[dict[str, Any]]:
    """What the file says about each episode, by the names that `Episode` has for it."""
    rows: list[dict[str, Any]] = [{} for _ in range(episodes)]
    ours = {"terminated": "terminated", "collected_at": "collected_at", "seeds": "seed", "tasks": "task"}
    for name in ours:
        if name not in arrays.names:
            continue
        values: list[Any] = arrays.text(name) if name == "tasks" else integers(arrays.column(name))
        if len(values) != episodes:
            raise CvlctlError(f"{arrays.path}: {name}: has {len(values)} values for {episodes} episodes")
        for row, value in zip(rows, values, strict=True):
            row[ours[name]] = value
    return rows


def integers(column: Column) -> list[int]:
    """The whole numbers of a column; anything else is a CvlctlError."""
    values = flat(column.rest(), column.where)
    if values.dtype.kind not in "iub":
        raise CvlctlError(f"{column.where}: holds {values.dtype}, not whole numbers")
    return [int(value) for value in values.tolist()]


def table_arrays(store: Store, bounds: Bounds | None, exported: str) -> dict[str, np.ndarray]:
    """The arrays of a store that have one value an episode, and its task, horizon, action bounds and digest."""
    said = {} if bounds is None else {KEY: np.array(plain(bounds), np.float64)}
    if more := exported_units(store):
        said[UNITS] = np.array(json.dumps(more))
    return said | {
        "terminated": store.terminated(), "collected_at": store.collected_at(), "seeds": store.seeds(),
        "tasks": np.array(store.episode_tasks()), "task": np.array(store.task),
        "horizon": np.array([store.spec.horizon]), EXPORTED: np.array(exported),
    }  # fmt: skip


def write(store: Store, path: Path, label: str, force: bool = False) -> None:
    """Write a store as a plain npz."""
    row = np.delete(np.arange(store.num_rows), store.episode_ends() - 1)
    bounds = bounds_of(store)
    arrays = {**_seen(store), "actions": physical(store.actions()[row], bounds),
              "episode_ends": np.cumsum(store.lengths()),
              **table_arrays(store, bounds, export_digest("npz", store, label))}  # fmt: skip
    if store.has_label(label):
        arrays["rewards"] = store.rewards(label)[row]
    if store.has_label(label, "success"):
        arrays["successes"] = store.successes(label)[row]
    save(path, arrays, force)


def _seen(store: Store) -> dict[str, np.ndarray]:
    """What a policy sees: observations, and images/CAMERA."""
    if list(store.spec.cameras) in ([], ["pixels"]) and (
        not store.spec.cameras or store.spec.observation_shape == (0,)
    ):
        return {"observations": store.array(only_array(store))}
    found = {} if store.spec.observation_shape == (0,) else {"observations": store.observations()}
    return found | {f"{pictures.KEY}{camera}": store.images(camera) for camera in store.spec.cameras}


def save(path: Path, arrays: dict[str, np.ndarray], force: bool) -> None:
    """Write an npz file, compressed, whole or not at all."""
    with replacing(path, force=force) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
