"""OGBench's npz: one row more an episode than it has transitions; `terminals` is 1 in that last row alone.

Row t of an episode holds s_t and a_t; the last one s_T and an action without meaning. Its `terminals` end trajectories:
whether the environment or the collector ended them is not told, so that imported episodes count as cut off.
Rewards, where a file has them, are in the row of the step that earned them. Other arrays (qpos, button_states) are
not read. Written files carry cvlctl's own table of episodes beside what OGBench reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cvlctl.data.formats.archives import open_npz
from cvlctl.data.formats.cutting import BATCH_ROWS, Rows, cut, flags, flat
from cvlctl.data.formats.making import Maker, continuous
from cvlctl.data.formats.npz import TABLE, read_table, said_bounds, said_facts, save, table_arrays
from cvlctl.data.formats.seeing import only_array
from cvlctl.data.formats.sources import Column, Facts, Told, same_length
from cvlctl.data.store import Store
from cvlctl.data.units import bounds_of, export_digest
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode
from cvlctl.units import Bounds, physical

# cube-single-play-v0.npz, puzzle-3x3-noisy-v0-val.npz: of gymnasium's cube-single-v0 and puzzle-3x3-v0
NAME = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)+)-(?:play|noisy|navigate|stitch|explore)-(v\d+)(?:-val)?")
REQUIRED = ("observations", "actions", "terminals")


def read(
    path: str | Path,
    told: Told | None = None,
    *,
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
) -> Iterator[Episode]:
    """The episodes of an OGBench file."""
    with open_npz(Path(path)) as arrays:
        arrays.need(*REQUIRED)
        names = [*REQUIRED, *(name for name in ("rewards", "successes") if name in arrays.names)]
        columns = {name: arrays.column(name) for name in names}
        continuous(columns["actions"])
        length = same_length(arrays.path, columns)
        table = None
        if any(name in arrays.names for name in (*TABLE, "tasks")):
            table = read_table(arrays, _count(arrays.column("terminals")))

        def done(rows: Rows, _: int) -> np.ndarray:
            return flags(rows["terminals"], columns["terminals"].where)

        maker = Maker(arrays.path, action_bounds, clip_actions, said_bounds(arrays), told)
        for number, (first, rows) in enumerate(cut(columns, length, done)):
            where = f"{arrays.path}: episode {number} (rows {first}-{first + len(rows['actions']) - 1})"
            if len(rows["actions"]) == 1:
                raise CvlctlError(f"{where} has no transition: a single row between two terminals")
            about = table[number] if table and number < len(table) else {}
            parts = {name: rows[name][:-1] for name in names if name in ("rewards", "successes")}
            yield from maker.make(
                where,
                observations=rows["observations"], actions=rows["actions"][:-1],
                rewards=flat(parts["rewards"], "rewards") if "rewards" in parts else None,
                successes=flags(parts["successes"], "successes") if "successes" in parts else None,
                **({"collected_at": first - number} | about),
            )  # fmt: skip
        maker.finish()


def _count(terminals: Column) -> int:
    """How many of the flags are set."""
    blocks = (min(BATCH_ROWS, len(terminals) - start) for start in range(0, len(terminals), BATCH_ROWS))
    return sum(int(np.count_nonzero(flags(terminals.take(size), terminals.where))) for size in blocks)


def facts(path: Path) -> Facts:
    """The task and horizon are known where cvlctl wrote the file; else OGBench's own name of it tells the task."""
    with open_npz(path) as arrays:
        arrays.need(*REQUIRED)
        found = said_facts(arrays)
    named = NAME.fullmatch(path.stem)
    if found.task or not named:
        return found
    task = f"gym/{named[1]}-{named[2]}"
    return found._replace(task=task, environment={"task": task})


def write(store: Store, path: Path, label: str, force: bool = False) -> None:
    """Write a store as OGBench's own files are; rewards and successes too, if it has them."""
    terminals = np.zeros(store.num_rows, np.float32)
    terminals[store.episode_ends() - 1] = 1.0
    bounds = bounds_of(store)
    actions = physical(store.actions(), bounds)
    arrays = {"observations": store.array(only_array(store)), "actions": actions, "terminals": terminals}
    if store.has_label(label):
        arrays["rewards"] = store.rewards(label)
    if store.has_label(label, "success"):
        arrays["successes"] = store.successes(label)
    save(path, arrays | table_arrays(store, bounds, export_digest("ogbench", store, label)), force)
