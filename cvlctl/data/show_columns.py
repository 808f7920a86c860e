"""The columns of a store as a table for people, at any width of a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

NAME = 16  # characters of a name that are kept in one line
SHOWN = 60  # rows of a table; `--json` has all


def render_columns(columns: list[dict[str, Any]], actions: list[dict[str, Any]], console: Console) -> None:
    """Print what `data.columns` found: a table of observations, and one of actions, in the robot's units where known.

    Of more than `SHOWN` columns the first are shown, and all that have a note.
    """
    if columns:
        console.print(_table("observations", columns, [one["note"] for one in columns]))
    notes = []
    for one in actions:
        low, high = one["physical"] or (None, None)
        reached = (
            "" if low is None or [low, high] == [one["min"], one["max"]] else f"{low:.4g} .. {high:.4g} in its units"
        )
        notes.append("; ".join(filter(None, (reached, one["note"]))))
    console.print(_table("actions", actions, notes))


def _table(title: str, found: list[dict[str, Any]], notes: list[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold", min_width=min(NAME, max((len(one["name"]) for one in found), default=0)))
    for name in ("min", "max", "mean", "std"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    chosen = [i for i in range(len(found)) if i < SHOWN or (len(found) > SHOWN and notes[i])]
    for i in chosen[: 2 * SHOWN]:
        one = found[i]
        numbers = [f"{one[key]:.3g}" for key in ("min", "max", "mean", "std")]
        table.add_row(Text(one["name"], overflow="fold"), *numbers, Text(notes[i]))
    if len(found) > len(chosen[: 2 * SHOWN]):
        table.caption = f"{min(len(chosen), 2 * SHOWN)} of {len(found)}; --json has all"
    return table
