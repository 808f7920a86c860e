"""Rows in a file of your own, npz or HDF5: `keys` says which array is what; `rows.py` says what each one means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cvlctl.data.formats import segments
from cvlctl.data.formats.archives import open_arrays
from cvlctl.data.formats.making import Maker
from cvlctl.data.formats.pictures import KEY, fitted_columns, images_of
from cvlctl.data.formats.rows import episodes_of_rows, judge
from cvlctl.data.formats.segments import check_names, need_keys
from cvlctl.data.formats.sources import Facts, Told
from cvlctl.types import Episode
from cvlctl.units import Bounds

NAMES = ("observations", "actions", "rewards", "successes", "terminals", "timeouts", "next_observations")
ALL = (*NAMES, *segments.NAMES)


def read(
    path: str | Path,
    told: Told | None = None,
    *,
    keys: Mapping[str, str] | None = None,
    horizon: int | None = None,
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
    image_size: Sequence[int] | None = None,
) -> Iterator[Episode]:
    """The episodes of a file's rows.

    Args:
        keys: our name -> the file's: observations, actions, rewards, successes, terminals, timeouts,
            next_observations, and where episodes lie, `segments.NAMES`. What is not named is looked for under our own
            name, and may lack but for the first two. Frames are images/CAMERA, of any number of cameras; where there
            are some, observations may lack too.
        horizon: length of an episode that a time limit cut off, where none of these tells.
    """
    keys = dict(keys or {})
    check_names({ours: theirs for ours, theirs in keys.items() if not ours.startswith(KEY)}, ALL)
    with open_arrays(Path(path)) as arrays:
        images = images_of(arrays, keys)
        need_keys(arrays, keys, *images, *([] if images else ["observations"]), "actions")
        named = {name: keys.get(name, name) for name in (*ALL, *images)}
        columns = {name: arrays.column(key) for name, key in named.items() if key in arrays.names}
        segmented = {name: columns.pop(name) for name in segments.NAMES if name in columns}
        columns |= fitted_columns(arrays.path, {name: columns[name] for name in images}, image_size)
        columns |= segments.marked(arrays.path, segmented, len(columns["actions"]))
        maker = Maker(arrays.path, action_bounds, clip_actions, told=told)
        cuts = yield from episodes_of_rows(maker, columns, horizon=horizon)
        if unmapped := sorted(set(arrays.names) - set(named.values())):
            more = f" and {len(unmapped) - 20} more" if len(unmapped) > 20 else ""
            maker.told.remarks.append(
                f"arrays of the imported file that were not mapped: {', '.join(unmapped[:20])}{more}; "
                "--key OURS=THEIRS maps one"
            )
        judge(arrays.path, cuts, timeouts="timeouts" in columns)
        maker.finish()


def facts(path: Path) -> Facts:
    """Nothing: which array is what, only `keys` tell."""
    with open_arrays(path):
        return Facts(0)
