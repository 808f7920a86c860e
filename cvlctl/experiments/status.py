"""How far an experiment is, read from its files: at any time, from any machine that sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlctl.experiments.engines import on_slurm
from cvlctl.experiments.engines.start import is_at_work, state_in
from cvlctl.experiments.graph import CELLS, Cell, folder_of
from cvlctl.experiments.plan import looked_at
from cvlctl.files import now_at
from cvlctl.progress import how_far
from cvlctl.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

MANY = 40  # cells: those that are done or wait are then told of by their number alone
STATES = ("done", "running", "waiting", "failed", "blocked", "stopped")
_DIED = "its process died without a word, or its host is gone: the same command goes on where it was"


def status(out: Path, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One dict a cell: cell, stage, command, combination, out, state (of STATES), why (of a failure; else ""), progress
    (in words), host, engine, job."""
    now, rows = now_at(out / CELLS), list[dict[str, Any]]()
    said = on_slurm.states(out)
    stuck: dict[str, str] = {}  # cells that nothing will come of now -> the failure behind it
    for cell in cells:
        told = state_in(folder_of(out, cell.name))
        state, why = _state(out, cell, told, now)
        if cell.name in said:
            state, why = on_slurm.seen(state, why, told, said[cell.name], _DIED)
            if state in ("waiting", "running") and told.get("state") != "running":
                told = {"engine": "slurm", "job": said[cell.name].job, "host": said[cell.name].host}
        behind = next((stuck[need] for need in cell.needs if need in stuck), None)
        if state == "waiting" and behind:
            state, why = "blocked", f"it needs {behind}, which failed"
        if state in ("failed", "blocked"):
            stuck[cell.name] = behind or cell.name
        rows.append({
            "cell": cell.name, "stage": cell.job.stage, "command": cell.job.command,
            "combination": cell.job.combination, "out": str(cell.job.recipe.out), "state": state, "why": why,
            "progress": in_words(told) if state == "running" else "",
            **{name: told.get(name) for name in ("host", "engine", "job")},
        })  # fmt: skip
    return rows


def _state(out: Path, cell: Cell, told: Mapping[str, Any], now: float) -> tuple[str, str]:
    state = told.get("state")
    if state == "running":
        if is_at_work(folder_of(out, cell.name), told, now):
            return "running", ""
        state = "failed"
        told = {"error": [_DIED, ""]}
    done, refused = looked_at(cell.job)
    if done == "finished":
        return "done", ""
    if refused is not None:
        return "failed", refused.what
    if state == "failed":
        return "failed", told.get("error", ["it died without a word"])[0]
    return ("stopped", "") if state == "stopped" else ("waiting", "")


def in_words(told: Mapping[str, Any]) -> str:
    """How far a running cell is."""
    found = told.get("progress")
    if found is None:
        return "starting"
    return how_far(found["done"], found["total"], found["unit"], found["rate"])


def counts(states: Sequence[str]) -> str:
    """ "3 of 6 cells done, 2 running, 1 waiting"."""
    others = [f"{states.count(state)} {state}" for state in STATES[1:] if state in states]
    return ", ".join([f"{states.count('done')} of {len(states)} cells done", *others])


def render(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print how far the cells are."""
    print_table(console, table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """How far the cells are; of those that are done or wait the number, where there are many."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    few = len(rows) <= MANY
    caption = counts([row["state"] for row in rows])
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for heading in ("cell", "state", "", "where"):
        found.add_column(heading, overflow="fold")
    styles = {"failed": "red", "blocked": "red", "done": "green"}
    for row in rows:
        if few or row["state"] in ("running", "failed", "stopped"):
            where = " ".join(str(row[name]) for name in ("host", "engine", "job") if row[name])
            words = row["progress"] or row["why"]
            state = Text(row["state"], style=styles.get(row["state"], ""))
            found.add_row(Text(row["cell"]), state, Text(words), Text(where))
    return found
