"""`tail.npz` in a store that is being written: all that no chunk holds yet, and what it takes to go on from there."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvlctl import files
from cvlctl.errors import CvlctlError
from cvlctl.folders import TAIL

__all__ = ["TAIL", "Tail", "discard_hint", "load", "prune", "save"]


class Tail(NamedTuple):
    """How far a store is."""

    identity: dict[str, Any]  # task, horizon, label and digest of the recipe: who may go on
    table: list[tuple[int, ...]]  # one row of store.META an episode
    tasks: list[str]
    chunk_rows: dict[str, int]  # of each row array
    written: dict[str, int]  # rows of each that lie in full chunks
    rest: dict[str, np.ndarray]  # rows of each row array that no chunk holds yet


def save(folder: Path, tail: Tail) -> None:
    """Replace the tail in `folder`, durably."""
    state = {**tail.identity, "tasks": tail.tasks, "chunk_rows": tail.chunk_rows, "written": tail.written}
    text, table = np.frombuffer(json.dumps(state).encode(), np.uint8), np.array(tail.table, np.int64)
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **tail.rest, state=text, episodes=table)
    files.write_atomically(folder / TAIL, data.getbuffer())


def load(folder: Path) -> Tail:
    """The tail in `folder`.

    Raises:
        CvlctlError: it is damaged.
    """
    try:
        with files.open_regular(folder / TAIL) as opened, np.load(opened, allow_pickle=False) as file:
            rest = {name: file[name] for name in file.files}
        table, state = rest.pop("episodes").tolist(), json.loads(rest.pop("state").tobytes())
        chunk_rows, written = (_of_each(state.pop(key), rest) for key in ("chunk_rows", "written"))
        return Tail(state, [tuple(row) for row in table], state.pop("tasks"), chunk_rows, written, rest)
    except Exception as error:  # zip, JSON and numpy each have their own; the file is not sound whichever it is
        raise CvlctlError(f"{folder / TAIL} cannot be read: {error}", discard_hint(folder)) from error


def _of_each(value: Any, rest: dict[str, np.ndarray]) -> dict[str, int]:
    """Of each array; earlier versions had one number for all."""
    return {name: int(value[name] if isinstance(value, dict) else value) for name in rest}


def discard_hint(folder: Path) -> str:
    return f"delete {folder}, or discard it by --force (in Python, force=True)"


def prune(folder: Path, kept: set[Path]) -> None:
    """Remove all but `kept` and what is above: it came after the last flush, and power may have cut it off."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink() and entry not in kept:
            prune(entry, kept)
            with contextlib.suppress(OSError):  # it holds some of them
                entry.rmdir()
        elif entry not in kept:
            entry.unlink()
