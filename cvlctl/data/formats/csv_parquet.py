"""Rows of CSV and parquet files, one step a row: a file an episode in a folder, or a file with where episodes lie.

`rows.py` says what each column means, `segments.py` what tells where episodes lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from cvlctl.data.formats import segments
from cvlctl.data.formats.arrays import ALL
from cvlctl.data.formats.joining import side_by_side
from cvlctl.data.formats.making import Maker
from cvlctl.data.formats.rows import Cuts, episodes_of_rows, judge
from cvlctl.data.formats.segments import check_names
from cvlctl.data.formats.sources import Column, Facts, Told, files_in
from cvlctl.data.formats.tables import SUFFIXES, Table, open_table
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode
from cvlctl.units import Bounds

SEVERAL = ("observations", "actions", "next_observations")  # that may be made of several columns


def read(
    path: str | Path,
    told: Told | None = None,
    *,
    keys: Mapping[str, str] | None = None,
    horizon: int | None = None,
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
) -> Iterator[Episode]:
    """The episodes of a file, or of a folder's files in the order of their names.

    Args:
        keys: our name -> the file's, as for "arrays"; observations, actions and next_observations may be several
            columns, with commas between, or NAME* for all that begin so.
        horizon: as for "arrays".
    """
    path, keys = Path(path), dict(keys or {})
    check_names(keys, ALL)
    files = files_of(path)
    maker, cuts, steps, timeouts = Maker(path, action_bounds, clip_actions, told=told), Cuts(), 0, False
    names: list[str] = []
    for file in files:
        with open_table(file) as table:
            groups = _groups(table, keys)
            columns = {name: table.column(found) for name, found in groups.items() if name not in segments.NAMES}
            columns |= {name: side_by_side([columns[name]]) for name in SEVERAL if name in columns}
            ends = segments.ends_of(
                file, {n: table.column(groups[n]) for n in segments.NAMES if n in groups}, table.length
            )
            if ends is None and len(files) > 1 and "timeouts" not in groups:
                ends = np.array([table.length])
            if ends is not None and table.length:
                columns["ends"] = segments.last_rows(file, ends, table.length)
            if names and names != groups["observations"]:
                ours, first = (", ".join(found)[:80] for found in (groups["observations"], names))
                what = f"{file}: its observations are {ours}, those of {files[0].name} {first}"
                raise CvlctlError(what, "name those that all files have")
            names = groups["observations"]
            maker.told.columns = maker.told.columns or _columns(groups["observations"], columns["observations"])
            maker.path = file
            cuts += yield from episodes_of_rows(maker, columns, horizon=horizon, offset=steps)
            steps, timeouts = steps + table.length, timeouts or "timeouts" in columns
    maker.path = path
    judge(path, cuts, timeouts=timeouts)
    maker.finish(maker.told.columns)


def files_of(path: Path) -> list[Path]:
    """The file itself, or a folder's tables in the order of their names, numbers as numbers."""
    files = files_in(path, SUFFIXES, "a CSV or parquet file")
    if path.is_dir() and len({file.suffix for file in files}) != 1:
        found = "none" if not files else "several kinds: " + ", ".join(sorted({file.suffix for file in files}))
        raise CvlctlError(f"{path} is a directory; expected files of CSV or of parquet in it: there are {found}")
    return files


def facts(path: Path) -> Facts:
    """The number of rows: which column is what, only `keys` tell."""
    files = files_of(path)
    if len(files) > 1:
        return Facts(0, data=files)
    with open_table(files[0]) as table:
        return Facts(table.length, data=files)


def _groups(table: Table, keys: Mapping[str, str]) -> dict[str, list[str]]:
    """Our names -> the columns of each."""
    found = {}
    for name in ALL:
        if name in keys or name in table.names or name in ("observations", "actions"):
            found[name] = table.matching(keys.get(name, name), name)
            if len(found[name]) > 1 and name not in SEVERAL:
                raise CvlctlError(f"--key {name}={keys[name]} names {len(found[name])} columns", "it is to be one")
    return found


def _columns(names: list[str], column: Column) -> list[str]:
    """Names of an observation's columns, where each is a column of the file or the one list that there is."""
    width = column.shape[1]
    return names if width == len(names) else [f"{names[0]}[{i}]" for i in range(width)] if len(names) == 1 else []
