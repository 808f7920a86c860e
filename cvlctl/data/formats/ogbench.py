"""OGBench's npz: one row more an episode than it has transitions; `terminals` is 1 in that last row alone.

Row t of an episode holds s_t and a_t; the last one s_T and an action without meaning. Its `terminals` end trajectories:
whether the environment or the collector ended them is not told, so that imported episodes count as cut off.
Rewards, where a file has them, are in the row of the step that earned them. Other arrays (qpos, button_states) are
not read. Written files carry cvlctl's own table of episodes beside what OGBench reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cvlctl.data.formats.archives import open_npz
from cvlctl.data.formats.cutting import Bounds, cut, flags, flat, make
from cvlctl.data.formats.npz import TABLE, read_table, save, table_arrays, task_and_horizon
from cvlctl.data.formats.sources import Facts, same_length
from cvlctl.data.store import Store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

REQUIRED = ("observations", "actions", "terminals")


def read(path: str | Path, *, action_bounds: Bounds | None = None, clip_actions: bool = False) -> Iterator[Episode]:
    """The episodes of an OGBench file."""
    with open_npz(Path(path)) as arrays:
        arrays.need(*REQUIRED)
        names = [*REQUIRED, *(name for name in ("rewards", "successes") if name in arrays.names)]
        columns = {name: arrays.column(name) for name in names}
        length = same_length(arrays.path, columns)
        table = None
        if any(name in arrays.names for name in (*TABLE, "tasks")):
            counter = {"terminals": arrays.column("terminals")}
            ends = (flags(rows["terminals"], counter["terminals"].where) for _, rows in cut(counter, length, _all))
            table = read_table(arrays, sum(int(np.count_nonzero(e)) for e in ends))

        def done(rows: dict[str, np.ndarray]) -> np.ndarray:
            return flags(rows["terminals"], columns["terminals"].where)

        for number, (first, rows) in enumerate(cut(columns, length, done)):
            where = f"{arrays.path}: episode {number} (rows {first}-{first + len(rows['actions']) - 1})"
            if len(rows["actions"]) == 1:
                raise CvlctlError(f"{where} has no transition: a single row between two terminals")
            about = table[number] if table and number < len(table) else {}
            parts = {name: rows[name][:-1] for name in names if name in ("rewards", "successes")}
            yield make(
                where, action_bounds, clip_actions,
                observations=rows["observations"], actions=rows["actions"][:-1],
                rewards=flat(parts["rewards"], "rewards") if "rewards" in parts else None,
                successes=flags(parts["successes"], "successes") if "successes" in parts else None,
                **({"collected_at": first - number} | about),
            )  # fmt: skip


def _all(rows: dict[str, np.ndarray]) -> np.ndarray:
    return np.arange(len(rows["terminals"])) == len(rows["terminals"]) - 1  # whole blocks


def facts(path: Path) -> Facts:
    """The task and horizon are known where cvlctl wrote the file."""
    with open_npz(path) as arrays:
        arrays.need(*REQUIRED)
        return Facts(len(arrays.column("actions")), *task_and_horizon(arrays))


def write(store: Store, path: Path, label: str) -> None:
    """Write a store as OGBench's own files are; rewards and successes too, if it has them."""
    terminals = np.zeros(len(store.observations()), np.float32)
    terminals[store.episode_ends() - 1] = 1.0
    arrays = {"observations": store.observations(), "actions": store.actions(), "terminals": terminals}
    if store.has_label(label):
        arrays["rewards"] = store.rewards(label)
    if store.has_label(label, "success"):
        arrays["successes"] = store.successes(label)
    save(path, arrays | table_arrays(store))
