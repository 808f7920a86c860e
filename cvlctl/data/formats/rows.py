"""Episodes from rows on one time axis, as D4RL, Stable-Baselines3 and most files of one's own keep them.

Row t of an episode holds s_t, a_t, the reward received on arriving at s_(t+1), and whether the episode ended there:
`terminals` by the environment, `timeouts` by a time limit; where both are set, the environment ended it. The final
observation s_T has no row. It is the last row's `next_observations`, if the file has them; `cutting.with_final` says
what becomes of an episode if not. A single row that was cut off leaves nothing then, and is passed over.

Where a row's next observation is not the one in the row after it, an episode ends too, cut off: a reset that no flag
marks (D4RL's version 0 has no timeouts), or the seam of a ring buffer. Such cuts are counted and said; where they
outnumber those that flags mark, the file contradicts itself, and is refused.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cvlctl.data.formats.cutting import Rows, cut, cut_at, flags, flat, with_final
from cvlctl.data.formats.making import Maker, continuous
from cvlctl.data.formats.pictures import KEY, framed
from cvlctl.data.formats.sources import Column, same_length
from cvlctl.errors import CvlctlError
from cvlctl.progress import say
from cvlctl.types import Episode

NO_ENDS = (
    "--horizon: the number of steps after which the environment was reset; or, of the formats that take --key, "
    "timeouts=NAME, episode_starts=NAME, episode_ends=NAME, episode_lengths=NAME or episode_index=NAME"
)
TOLERANCE = 1e-4  # relative: files keep observations in one precision and the next ones in another


class Cuts(NamedTuple):
    """How many episodes end where flags or the horizon say so, how many elsewhere; the row of the first of these."""

    marked: int = 0
    unmarked: int = 0
    row: int = -1

    def __add__(self, other: Cuts) -> Cuts:  # type: ignore[override]
        row = self.row if self.unmarked else other.row
        return Cuts(self.marked + other.marked, self.unmarked + other.unmarked, row)


def episodes_of_rows(
    maker: Maker,
    columns: dict[str, Column],
    *,
    horizon: int | None,
    tasks: Sequence[str] = (),
    stride: int = 1,
    offset: int = 0,
) -> Generator[Episode, None, Cuts]:
    """The episodes of a file's rows; returns how they were cut, for `judge`.

    Args:
        columns: observations, actions, and where the file has them rewards, successes, terminals, timeouts,
            next_observations, ends (last rows as `segments` has them), and collected_at, seed, task (index into
            `tasks`), which are taken from the first row; frames as images/CAMERA, beside observations or alone.
        horizon: where there are neither timeouts nor ends, the length at which the time limit cut the episodes off.
            Needed unless there are next_observations.
        stride, offset: row i was the collector's environment step i * stride + offset.
    """
    path, cuts = maker.path, Cuts()
    length, cameras = same_length(path, columns), [name for name in columns if name.startswith(KEY)]
    if cameras and "next_observations" in columns:
        what = f"{path}: {cameras[0]} beside next_observations: there are no next frames for the final ones"
        raise CvlctlError(what, "leave next_observations out, and say where episodes end")
    continuous(columns["actions"])
    if not {"timeouts", "next_observations", "ends"} & set(columns) and horizon is None:
        what = f"{path}: neither timeouts nor next_observations say where time limits cut episodes off"
        raise CvlctlError(what, NO_ENDS)
    limit = cut_at(horizon) if horizon is not None and not {"timeouts", "ends"} & set(columns) else None
    if "next_observations" in columns and columns["next_observations"].shape != columns["observations"].shape:
        shapes = f"{columns['next_observations'].shape}, observations {columns['observations'].shape}"
        raise CvlctlError(f"{path}: next_observations have shape {shapes}")

    def marked(rows: Rows, name: str) -> np.ndarray:
        return flags(rows[name], columns[name].where) if name in rows else np.zeros(len(rows["actions"]), bool)

    def ends(rows: Rows, before: int) -> np.ndarray:
        found = marked(rows, "terminals") | marked(rows, "timeouts") | marked(rows, "ends")
        if "next_observations" in rows:
            found |= _gaps(path, rows, found)
        return limit(found, before) if limit else found

    began = timed_out = False  # whether the first row alone is an episode that was cut off, and the last row's flag
    flagged = {"terminals": 0, "timeouts": 0, "both": 0}  # last rows of episodes
    for number, (first, rows) in enumerate(cut(columns, length, ends, ("next_observations",))):
        count = len(rows["actions"])
        last = {name: values[-1:] for name, values in rows.items()}
        terminated, timed_out = (bool(marked(last, name)[0]) for name in ("terminals", "timeouts"))
        for name, value in zip(flagged, (terminated, timed_out, terminated and timed_out), strict=True):
            flagged[name] += value
        if first == 0:
            began = timed_out and not terminated and count == 1
        if terminated or timed_out or "ends" in rows or (limit and count == horizon):
            cuts += Cuts(marked=1)
        elif first + count < length:
            cuts += Cuts(unmarked=1, row=first + count - 1)
        after = last.get("next_observations")
        observations = images = None
        if "observations" in rows:
            observations, steps = with_final(rows.pop("observations"), after, terminated, count)
        if cameras:
            images, steps = framed(rows, cameras, terminated, count)
        if not steps:
            continue
        told = [name for name in ("collected_at", "seed") if name in rows]
        about = {name: _number(rows[name][:1], columns[name].where) for name in told}
        about.setdefault("collected_at", first * stride + offset)
        task = int(rows["task"][0]) if "task" in rows else -1
        if "task" in rows and not 0 <= task < len(tasks):
            raise CvlctlError(
                f"{columns['task'].where}, row {first}: task {task} is none of the {len(tasks)} that are named"
            )
        yield from maker.make(
            f"{path}: episode {number} (rows {first}-{first + count - 1})",
            observations=observations,
            images=images,
            actions=rows["actions"][:steps],
            rewards=flat(rows["rewards"], columns["rewards"].where)[:steps] if "rewards" in rows else None,
            successes=flags(rows["successes"], columns["successes"].where)[:steps] if "successes" in rows else None,
            terminated=terminated,
            task=tasks[task] if "task" in rows else "",
            **about,
        )
    if began and not timed_out and "next_observations" not in columns:
        what = f"{columns['timeouts'].where}: as timeouts it marks the first row, and not the last"
        raise CvlctlError(what, "it looks like marks of first rows: --key episode_starts=NAME takes those")
    if flagged["both"] and len(set(flagged.values())) == 1:
        maker.told.remarks.append(
            f"terminals and timeouts are the same in the imported file: all {flagged['both']} ends count as "
            "terminated, and nothing is learned of what comes after; where they are time limits, leave terminals out"
        )
    return cuts


def judge(path: Path, cuts: Cuts, *, timeouts: bool, seams: int = 1) -> None:
    """Say how many episodes end where nothing marks it, if any do.

    Args:
        timeouts: whether the file has them: its flags then mark every end, or claim to.
        seams: how many there may be where nothing is marked at all: a ring buffer came round.

    Raises:
        CvlctlError: more end so than where something marks it.
    """
    where = f"the first after row {cuts.row}, whose next observation is not the one in the row after it"
    if cuts.unmarked > max(cuts.marked, seams) and (cuts.marked or timeouts):
        what = f"{path}: no flag marks {cuts.unmarked} ends of episodes, beside {cuts.marked} that are marked: {where}"
        mend = "mark these rows in timeouts" if timeouts else "give --horizon, or mark these rows in timeouts,"
        raise CvlctlError(what, f"{mend} if the environment was reset there; else leave next_observations out")
    if cuts.unmarked:
        say(f"{path}: {cuts.unmarked} of its episodes end where no flag marks it: {where}")


def _number(values: np.ndarray, where: str) -> int:
    """What a row says of its episode, as a whole number."""
    (value,) = flat(values, where).tolist()
    if not -(2**63) <= value < 2**63:  # infinity and NaN too
        raise CvlctlError(f"{where}: holds {value} where whole numbers are expected")
    return int(value)


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
