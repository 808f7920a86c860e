"""`cvlctl run --status`, `--logs` and `--cancel`: looking at an experiment that runs somewhere, and stopping it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from cvlctl import streams, terminal
from cvlctl.errors import CvlctlError
from cvlctl.experiments import drivers, status
from cvlctl.experiments.engines import on_slurm
from cvlctl.experiments.engines.start import LOG, tail
from cvlctl.experiments.graph import folder_of
from cvlctl.experiments.recipe import ExperimentRecipe
from cvlctl.experiments.run import chosen, planned
from cvlctl.progress import say
from cvlctl.recipes.explain import nearest

if TYPE_CHECKING:
    from rich.console import Console

FOLLOW_SECONDS = 2.0
_MOST_BYTES = 100_000  # of a log that are shown


def look(experiment: ExperimentRecipe, only: str = "") -> dict[str, Any]:
    """How far the cells are. Returns out, status ("done", "running", "failed" or "waiting"), and cells: a dict a cell,
    as `status.status` gives them."""
    cells = chosen(planned(experiment, keep=False), only)
    rows = status.status(experiment.out, cells)
    states = {row["state"] for row in rows}
    queued = any(row["state"] == "waiting" and row["job"] for row in rows)
    working = "running" if queued or "running" in states or drivers.at_work(experiment.out) else ""
    word = working or ("failed" if states & {"failed", "blocked"} else "done" if states == {"done"} else "waiting")
    return {"status": word, "out": str(experiment.out), "cells": rows}


def follow(experiment: ExperimentRecipe, only: str = "") -> dict[str, Any]:
    """`look`, again and again until nothing runs any more."""
    found = look(experiment, only)
    if streams.is_terminal(sys.stderr):
        from rich.live import Live

        with Live(console=terminal.console(stderr=True), transient=True, auto_refresh=False) as live:
            while found["status"] == "running":
                live.update(status.table(found["cells"]), refresh=True)
                time.sleep(FOLLOW_SECONDS)
                found = look(experiment, only)
    else:
        told = ""
        while found["status"] == "running":
            line = status.counts([row["state"] for row in found["cells"]])
            if line != told:
                say(told := line)
            time.sleep(FOLLOW_SECONDS)
            found = look(experiment, only)
    return found


def logs(experiment: ExperimentRecipe, name: str) -> dict[str, Any]:
    """What a cell has said: status ("log"), cell, path, and text, the end of it where it is long."""
    names = [cell.name for cell in planned(experiment, keep=False)]
    if name not in names:
        raise CvlctlError(f"no cell {name}", nearest(name, names, "cells"))
    path = folder_of(experiment.out, name) / LOG
    try:
        text = tail(path, _MOST_BYTES)
    except OSError as error:
        raise CvlctlError(f"{name} has said nothing: {path}: {error.strerror}", "it has not run yet") from error
    return {"status": "log", "cell": name, "path": str(path), "text": text}


def cancel(experiment: ExperimentRecipe) -> dict[str, Any]:
    """Stop whoever runs the experiment. Returns status ("cancelled"), out, stopped (how many processes) and cells (how
    many were taken back from SLURM)."""
    stopped = drivers.cancel(experiment.out)  # first: one may be about to submit more
    cells = on_slurm.cancel(experiment.out)
    return {"status": "cancelled", "out": str(experiment.out), "stopped": len(stopped), "cells": cells}


def render(result: dict[str, Any], console: Console) -> None:
    """Print what any of these gives."""
    if result["status"] == "log":
        console.print(result["text"], markup=False, highlight=False, soft_wrap=True, end="")
    elif result["status"] == "cancelled":
        none = "" if result["stopped"] or result["cells"] else ": nobody was running it"
        console.print(f"cancelled: {result['out']}{none}; cvlctl run goes on where each cell was saved", soft_wrap=True)
    else:
        status.render(result["cells"], console)
