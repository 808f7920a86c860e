"""Episodes from rows on one time axis, as D4RL, Stable-Baselines3 and most files of one's own keep them.

Row t of an episode holds s_t, a_t, the reward received on arriving at s_(t+1), and whether the episode ended there:
`terminals` by the environment, `timeouts` by a time limit; where both are set, the environment ended it. The final
observation s_T has no row. It is the last row's `next_observations`, if the file has them; `cutting.with_final` says
what becomes of an episode if not. A single row that was cut off leaves nothing then, and is passed over.

Where a row's next observation is not the one in the row after it, an episode ends too, cut off: a reset that no flag
marks (D4RL's version 0 has no timeouts), or the seam of a ring buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cvlctl.data.formats.cutting import Bounds, cut, cut_at, flags, flat, make, with_final
from cvlctl.data.formats.sources import Column, same_length
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

TOLERANCE = 1e-4  # relative: files keep observations in one precision and the next ones in another


def episodes_of_rows(
    path: Path,
    columns: dict[str, Column],
    *,
    horizon: int | None,
    action_bounds: Bounds | None,
    clip_actions: bool,
    tasks: Sequence[str] = (),
    stride: int = 1,
    offset: int = 0,
) -> Iterator[Episode]:
    """The episodes of a file's rows.

    Args:
        columns: observations, actions, and where the file has them rewards, successes, terminals, timeouts,
            next_observations, and collected_at, seed, task (index into `tasks`), which are taken from the first row.
        horizon: where there are no timeouts, the length at which the time limit cut the episodes off.
            Needed unless there are next_observations.
        stride, offset: row i was the collector's environment step i * stride + offset.
    """
    length = same_length(path, columns)
    if not {"timeouts", "next_observations"} & set(columns) and horizon is None:
        what = f"{path}: neither timeouts nor next_observations say where time limits cut episodes off"
        raise CvlctlError(what, "give the horizon: the number of steps after which the environment was reset")
    limit = cut_at(horizon) if horizon is not None and "timeouts" not in columns else None
    if "next_observations" in columns and columns["next_observations"].shape != columns["observations"].shape:
        shapes = f"{columns['next_observations'].shape}, observations {columns['observations'].shape}"
        raise CvlctlError(f"{path}: next_observations have shape {shapes}")

    def where(name: str) -> str:
        return columns[name].where

    def ends(rows: dict[str, np.ndarray]) -> np.ndarray:
        found = np.zeros(len(rows["actions"]), bool)
        if "terminals" in rows:
            found = flags(rows["terminals"], where("terminals"))
        if "timeouts" in rows:
            found |= flags(rows["timeouts"], where("timeouts"))
        if "next_observations" in rows:
            found |= _gaps(path, rows, found)
        return limit(found) if limit else found

    for number, (first, rows) in enumerate(cut(columns, length, ends)):
        terminated = "terminals" in rows and bool(flags(rows["terminals"][-1:], where("terminals"))[0])
        after = rows["next_observations"][-1:] if "next_observations" in rows else None
        observations, steps = with_final(rows["observations"], after, terminated, len(rows["actions"]))
        if not steps:
            continue
        about = {name: int(flat(rows[name][:1], where(name))[0]) for name in ("collected_at", "seed") if name in rows}
        about.setdefault("collected_at", first * stride + offset)
        task = int(rows["task"][0]) if "task" in rows else -1
        if "task" in rows and not 0 <= task < len(tasks):
            raise CvlctlError(f"{where('task')}, row {first}: task {task} is none of the {len(tasks)} that are named")
        yield make(
            f"{path}: episode {number} (rows {first}-{first + len(rows['actions']) - 1})",
            action_bounds,
            clip_actions,
            observations=observations,
            actions=rows["actions"][:steps],
            rewards=flat(rows["rewards"], where("rewards"))[:steps] if "rewards" in rows else None,
            successes=flags(rows["successes"], where("successes"))[:steps] if "successes" in rows else None,
            terminated=terminated,
            task=tasks[task] if "task" in rows else "",
            **about,
        )


def _gaps(path: Path, rows: dict[str, np.ndarray], ends: np.ndarray) -> np.ndarray:
    """(n,) bool: the next row holds another observation than the one that followed.

    Raises:
        CvlctlError: that is so nearly everywhere: the rows are shuffled, and no episodes can be made of them.
    """
    found = np.zeros(len(ends), bool)
    after, then = rows["next_observations"][:-1], rows["observations"][1:]
    if after.dtype.kind == "f":
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are told of with their episode
            apart = np.abs(after - then) > TOLERANCE * (1 + np.abs(after))
    else:
        apart = after != then
    found[:-1] = apart.any(axis=tuple(range(1, apart.ndim)))
    unmarked = int(np.count_nonzero(found & ~ends))
    if unmarked > 10 and unmarked > np.count_nonzero(~ends) / 2:
        what = f"{path}: after {unmarked} of {len(ends)} rows the next row does not go on where they led"
        raise CvlctlError(what, "give rows in order of time: shuffled ones, or next_observations scaled, do not do")
    return found
