"""Replay buffers of Diffusion Policy and UMI: Zarr's version 2, a folder or a .zarr.zip.

data/action, data/state, data/img, ...    rows of all episodes, one after the other
meta/episode_ends                         numbers of rows up to each episode's end

Observations are joined of the other arrays of `data/` that are no images, by name (`joining`). UMI has no actions of
its own: they are where the next row has the gripper, its pose and width, of each robot. All episodes count as cut off,
and the last row of each gives the final observation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cvlctl.data.formats import segments
from cvlctl.data.formats.joining import Observations, side_by_side
from cvlctl.data.formats.making import Maker
from cvlctl.data.formats.pictures import KEY, Cameras, fitted_column, image_names
from cvlctl.data.formats.rows import episodes_of_rows
from cvlctl.data.formats.segments import check_names
from cvlctl.data.formats.sources import Arrays, Column, Facts, Told
from cvlctl.data.formats.zarr_v2 import open_zarr
from cvlctl.errors import CvlctlError
from cvlctl.play.spaces import natural
from cvlctl.types import Episode
from cvlctl.units import Bounds

ENDS = "meta/episode_ends"
OTHERS = {"rewards": ("reward", "rewards"), "terminals": (), "successes": ()}
POSE = ("eef_pos", "eef_rot_axis_angle", "gripper_width")  # of UMI's robot0, robot1, ...


def read(
    path: str | Path,
    told: Told | None = None,
    *,
    keys: Mapping[str, str] | None = None,
    observation_keys: Sequence[str] = (),
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
    cameras: Sequence[str] = (),
    image_size: Sequence[int] | None = None,
) -> Iterator[Episode]:
    """The episodes of a replay buffer.

    Args:
        keys: our name -> the one in `data/`: actions (several with commas between), rewards, terminals, successes.
        observation_keys: arrays of `data/` to join, in this order.
    """
    path, keys = Path(path), dict(keys or {})
    check_names(keys, ["actions", *OTHERS])
    with open_zarr(path) as arrays:
        arrays.need(ENDS)
        shapes = {name.removeprefix("data/"): arrays.column(name).shape for name in _data(arrays)}
        acts, following = _actions(path, shapes, keys.get("actions", ""))
        singles = {ours: next((n for n in names if n in shapes), "") for ours, names in OTHERS.items()} | {
            ours: theirs for ours, theirs in keys.items() if ours != "actions"
        }
        arrays.need(*(f"data/{theirs}" for ours, theirs in keys.items() if ours != "actions"))
        maker = Maker(path, action_bounds, clip_actions, told=told)
        joined = Observations(path, observation_keys, alone=bool(cameras))
        pictures = Cameras(path, cameras, image_size, maker.told)
        images = image_names(shapes, {name: arrays.column(f"data/{name}").dtype for name in shapes})
        chosen = pictures.choose(images)
        apart = set(singles.values()) | (set() if following else set(acts))
        seen = joined.chosen(f"{path}: data", {name: shape for name, shape in shapes.items() if name not in apart})
        actions = side_by_side([arrays.column(f"data/{name}") for name in acts])
        columns = {"actions": _following(actions) if following else actions}
        if seen:
            columns["observations"] = side_by_side([arrays.column(f"data/{name}") for name in seen])
        for camera, name in chosen.items():
            columns[f"{KEY}{camera}"] = fitted_column(arrays.column(f"data/{name}"), pictures)
        columns |= {ours: arrays.column(f"data/{name}") for ours, name in singles.items() if name}
        total = len(columns["actions"])
        columns |= segments.marked(path, {"episode_ends": arrays.column(ENDS)}, total)
        maker.told.columns = maker.told.columns or joined.columns()
        if following:
            maker.told.remarks.append(f"actions are the next row's {', '.join(acts)}")
        yield from episodes_of_rows(maker, columns, horizon=None)
        left = pictures.left_out(set(images) - set(observation_keys))
        maker.told.dropped = sorted({*(set(joined.left_out) - set(images)), *left})
        maker.finish(joined.columns())


def facts(path: Path) -> Facts:
    """The number of rows; a replay buffer names no task."""
    with open_zarr(path) as arrays:
        arrays.need(ENDS)
        first = next(iter(_data(arrays)), "")
        total = len(arrays.column(first)) if first else 0
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return Facts(total, data=files)


def _data(arrays: Arrays) -> list[str]:
    return [name for name in arrays.names if name.startswith("data/")]


def _actions(path: Path, shapes: Mapping[str, tuple[int, ...]], given: str) -> tuple[list[str], bool]:
    """Names of the arrays that actions are made of, and whether those of the next row are."""
    names = given.split(",") if given else ["action"] if "action" in shapes else []
    robots = sorted({n.split("_")[0] for n in shapes if n.endswith(f"_{POSE[0]}")}, key=natural) if not names else []
    umi = [f"{robot}_{part}" for robot in robots for part in POSE]
    hint = f"--key actions=NAME[,NAME] says which: {', '.join(shapes)}"
    if not (names or umi) or not set(names or umi) <= set(shapes):
        raise CvlctlError(f"{path}: no data/{given or 'action'}", hint)
    for name in names or umi:
        if len(shapes[name]) > 2:
            raise CvlctlError(f"{path}: data/{name} has shape {shapes[name]}, which is no row of actions a step", hint)
    return names or umi, not names


def _following(column: Column) -> Column:
    """The rows after each row; after the last one, that row."""
    length = len(column)
    held = [np.empty((0, *column.shape[1:]), column.dtype)]

    def fetch(start: int, count: int) -> np.ndarray:
        if start == 0:
            column.take(1)
        rows = column.take(min(count, length - 1 - start))
        held[0] = rows[-1:] if len(rows) else held[0]
        short = count - len(rows)
        return np.concatenate([rows, held[0] if len(held[0]) else np.zeros((1, *column.shape[1:]))]) if short else rows

    return Column(column.where, column.shape, column.dtype, fetch)
