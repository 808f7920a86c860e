"""Episodes from rows on one time axis, as D4RL, Stable-Baselines3 and most files of one's own keep them.

Row t of an episode holds s_t, a_t, the reward received on arriving at s_(t+1), and whether the episode ended there:
`terminals` by the environment, `timeouts` by a time limit; where both are set, the environment ended it. The final
observation s_T has no row. It is the last row's `next_observations`, if the file has them; `sources.with_final` says
what becomes of an episode if not. A single row that was cut off leaves nothing then, and is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.formats.sources import Bounds, Column, cut, cut_at, flags, flat, make, same_length, with_final
from cvlctl.types import Episode


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
        stride, offset: row i was the collector's environment step i * stride + offset.
    """
    length = same_length(path, columns)
    limit = None if "timeouts" in columns else cut_at(_require(path, horizon))
    if "next_observations" in columns and columns["next_observations"].shape != columns["observations"].shape:
        shapes = f"{columns['next_observations'].shape}, observations {columns['observations'].shape}"
        raise CvlctlError(f"{path}: next_observations have shape {shapes}")

    def where(name: str) -> str:
        return columns[name].where

    def ends(rows: dict[str, np.ndarray]) -> np.ndarray:
        found = np.zeros(len(rows["actions"]), bool)
        if "terminals" in rows:
            found = flags(rows["terminals"], where("terminals"))
        return limit(found) if limit else found | flags(rows["timeouts"], where("timeouts"))

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


def _require(path: Path, horizon: int | None) -> int:
    if horizon is None:
        what = f"{path}: no timeouts say where time limits cut episodes off"
        raise CvlctlError(what, "give the horizon: the number of steps after which the environment was reset")
    return horizon
