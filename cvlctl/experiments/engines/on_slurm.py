"""`cvlctl run` where the engine is SLURM: what is not finished is submitted, and how far it is asked for later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvlctl.errors import CvlctlError
from cvlctl.experiments.engines import slurm
from cvlctl.experiments.engines.sbatch import Task
from cvlctl.experiments.engines.slurm_jobs import RECORD
from cvlctl.experiments.engines.start import write_recipe
from cvlctl.experiments.engines.waiting import cpus_of
from cvlctl.experiments.graph import CELLS, Cell

WORKERS = 4  # CPUs of a cell whose players of episodes take as many as there are


def has_gpus(cell: Cell) -> bool:
    """Whether SLURM is asked for GPUs for a cell."""
    return cell.job.engines["slurm"].gpus not in (None, "0")


def submit(out: Path, cells: Sequence[Cell], *, dry_run: bool) -> dict[str, Any]:
    """Give SLURM the cells that are not there yet.

    Returns:
        folder (of scripts), arrays (a dict each: job, None in a dry run; file; stage; cells, how many), and queued: the
        job of each cell that waits or runs there now.

    Raises:
        CvlctlError: what `slurm.submit` says.
    """
    tasks = [_task(out, cell) for cell in cells]
    found = slurm.submit(out / CELLS, tasks, dry_run=dry_run)
    stages = {task.name: task.stage for task in tasks}
    arrays = [{"job": one.job, "file": str(one.file), "stage": stages[one.cells[0]], "cells": len(one.cells)}
              for one in found]  # fmt: skip
    states = {} if dry_run else slurm.states(out / CELLS, stages)
    queued = {name: one.job for name, one in states.items() if one.state in ("waiting", "running")}
    return {"folder": str(out / CELLS / slurm.jobs.FOLDER), "arrays": arrays, "queued": queued}


def _task(out: Path, cell: Cell) -> Task:
    settings = cell.job.engines["slurm"]
    recipe = Path(os.path.abspath(write_recipe(out, cell)))
    cpus = settings.cpus or cpus_of(cell, WORKERS)
    return Task(
        cell.name, cell.job.stage, cell.job.command, recipe, cell.needs, cpus, settings, cell.force, cell.unfinished
    )


def states(out: Path) -> dict[str, slurm.State]:
    """What SLURM says of the experiment's cells; nothing where it was never given any, or is out of reach."""
    if not (out / CELLS / RECORD).exists():
        return {}
    try:
        return slurm.states(out / CELLS)
    except CvlctlError:
        return {}


def cancel(out: Path) -> int:
    """Take back whatever waits in SLURM or runs there; returns how many cells."""
    return len(slurm.cancel(out / CELLS)) if (out / CELLS / RECORD).exists() else 0


def seen(state: str, why: str, told: Mapping[str, Any], said: slurm.State, died: str) -> tuple[str, str]:
    """A cell's state and why, by what its files say and by what SLURM says.

    Args:
        state, why: by its files alone.
        told: what the cell said last of itself.
        died: the `why` of a cell that fell silent.
    """
    if state in ("done", "running"):  # it says so itself
        return state, why
    if said.state in ("waiting", "running"):
        return said.state, said.why
    if told.get("job") not in (None, said.job):  # another engine had it since
        return state, why
    if said.state == "blocked" and state != "failed":
        return "blocked", said.why
    if said.state == "cancelled":
        return "stopped", said.why
    if said.state == "failed" and (state != "failed" or why == died):
        return "failed", said.why
    return state, why


def lines(result: Mapping[str, Any], dry_run: bool) -> list[str]:
    """What was submitted, for people."""
    found = [
        f"{one['file'] if dry_run else one['job']}: {one['stage']}, {one['cells']} cells" for one in result["arrays"]
    ]
    if dry_run:
        return [f"sbatch: {line}" for line in found]
    left = len(result["queued"]) - sum(one["cells"] for one in result["arrays"])
    if left > 0:
        found.append(f"{left} cells were there before")
    return [f"slurm: {line}" for line in found]
