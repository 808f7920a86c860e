"""`engine: slurm`: cells as job arrays of SLURM, submitted and left to it; what became of them; and taking them back.

Nothing waits here. Arrays are submitted on hold, and let go once all of them are in and each waits for what it must:
whatever happens in between, nothing runs too early, twice or never.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cvlctl import files
from cvlctl.errors import CvlctlError
from cvlctl.experiments.engines import slurm_jobs as jobs
from cvlctl.experiments.engines import squeue
from cvlctl.experiments.engines.sbatch import MOST, Array, Place, Task, Waits, arrays, options, script, waits
from cvlctl.experiments.engines.start import end_of
from cvlctl.interrupts import held
from cvlctl.progress import say


class Submitted(NamedTuple):
    """An array in SLURM; of a dry run its script alone."""

    job: str | None
    file: Path
    cells: tuple[str, ...]


class State(NamedTuple):
    """What SLURM says of a cell."""

    state: str  # "waiting", "running", "ended", "failed", "blocked", "cancelled"; "gone": SLURM knows it no longer
    why: str  # in words; "" where there is nothing to say
    job: str  # "12_3"
    host: str


def submit(cells: Path, tasks: Sequence[Task], *, dry_run: bool = False) -> list[Submitted]:
    """Put the tasks that are not in SLURM yet into it: one array a stage, each cell after those that it needs.

    Where the cluster takes no more jobs of this user, those that it took go on, and a line says how many are left.

    Args:
        cells: the experiment's folder of cells.
        tasks: each after those that it needs; what is needed and not among them is done.
        dry_run: write the scripts, and submit nothing; SLURM need not be here.

    Raises:
        CvlctlError: SLURM is not here, does not answer or refuses, and nothing of this was submitted; or a cell is in
            SLURM with another recipe.
    """
    mark = hashlib.sha256(os.fsencode(os.path.realpath(cells))).hexdigest()[:6]
    if dry_run:
        return _written(cells, arrays(tasks, MOST, jobs.read(cells)["next"], mark))
    if not shutil.which("sbatch"):
        raise CvlctlError("SLURM is not here: no sbatch on this machine", "say engine: local, or go where it is")
    with jobs.recorded(cells) as record, held():
        jobs.settle(cells, record)
        active = jobs.active(record)
        jobs.check_recipes(tasks, active, record)
        left = [task for task in tasks if task.name not in active]
        parts = arrays(left, squeue.largest_array(), record["next"], mark)
        return _Submission(cells, record, active).put(parts)


def states(cells: Path, names: Collection[str] | None = None) -> dict[str, State]:
    """What SLURM says of each cell that was ever given to it, of `names` alone if there are any.

    Raises:
        CvlctlError: SLURM is not here, or does not answer.
    """
    record = jobs.read(cells)
    known = {name: place for name, place in jobs.latest(record).items() if names is None or name in names}
    said = squeue.queue(jobs.ids(known))
    unclear = [place for place in known.values() if place not in said or said[place].state == "OUT_OF_MEMORY"]
    said |= {place: one for place, one in squeue.accounts(unclear).items() if one.state}
    outputs = {array["job"]: str(cells / jobs.FOLDER / array["name"]) for array in record["arrays"]}
    found = {}
    for name, (job, number) in known.items():
        one = said.get((job, number))
        if one is None:
            why = "SLURM knows it no longer: it ended a while ago, or was cancelled before it began"
            found[name] = State("gone", why, f"{job}_{number}", "")
            continue
        failed = one.state in squeue.ENDED and one.state != "COMPLETED"
        output = end_of(Path(f"{outputs[job]}-{number}.txt")) if failed else ""
        found[name] = State(*squeue.in_words(one, output), f"{job}_{number}", one.host)
    return found


def cancel(cells: Path, names: Collection[str] | None = None) -> list[str]:
    """Take cells back, all or those of `names`: what runs saves what it has. Returns their names.

    What waits for them in SLURM can then never run: SLURM cancels it.

    Raises:
        CvlctlError: SLURM is not here, or does not answer.
    """
    with jobs.recorded(cells) as record, held():
        jobs.settle(cells, record)
        active = {name: place for name, place in jobs.active(record).items() if names is None or name in names}
        squeue.cancel([f"{job}_{number}" for job, number in active.values()])
    return list(active)


class _Submission:
    """Arrays on their way into SLURM."""

    def __init__(self, cells: Path, record: dict[str, Any], active: Mapping[str, Place]) -> None:
        self.cells, self.record = cells, record
        self.places = dict(active)
        self.sizes = {array["job"]: len(array["cells"]) for array in record["arrays"]}
        self.done: list[Submitted] = []
        self.entries: list[dict[str, Any]] = []
        self.dependencies: list[str] = []
        self.own: list[tuple[Array, str]] = []  # arrays whose elements wait for something of their own, and their jobs

    def put(self, parts: Sequence[Array]) -> list[Submitted]:
        try:
            missing = {task.name for part in parts for task in part.tasks}
            for part in parts:
                if not self._put_one(part, missing):
                    say(f"SLURM takes no more jobs now: {len(missing)} cells are left; later, the same command goes on")
                    break
                missing -= {task.name for task in part.tasks}
            self._let_wait()
            squeue.scontrol(f"release {one.job}" for one in self.done)
        except BaseException:
            jobs.forget(self.cells, self.record, self.entries)
            raise
        for entry in self.entries:
            entry["released"] = True
        jobs.keep(self.cells, self.record)
        return self.done

    def _put_one(self, part: Array, missing: Collection[str]) -> bool:
        """Whether SLURM took it. `missing`: cells that it was not given yet."""
        found, file = _prepared(self.cells, part, self.places, self.sizes, missing)
        names, recipes = [task.name for task in part.tasks], [task.recipe.name for task in part.tasks]
        entry = {"name": part.name, "job": None, "released": False, "cells": names, "recipes": recipes}
        self.record["arrays"].append(entry)
        self.record["next"] += 1
        self.entries.append(entry)
        jobs.keep(self.cells, self.record)
        dependency = [f"--dependency={found.whole}"] if found and found.whole else []
        line = [*options(part, _folder(self.cells), Path.cwd()), *dependency, str(file)]
        squeue.check_nodes(part.tasks[0].stage, part.tasks[0].settings, line)
        try:
            job = squeue.call(["sbatch", "--hold", "--parsable", *line]).strip().splitlines()[-1].split(";")[0]
        except subprocess.CalledProcessError as error:
            if self.done and squeue.is_full(error):
                self.record["arrays"].remove(self.entries.pop())
                return False
            raise squeue.refused(part.tasks[0].stage, part.tasks[0].settings, error) from None
        entry["job"] = job
        jobs.keep(self.cells, self.record)
        self.sizes[job] = len(names)
        self.places |= {name: (job, number) for number, name in enumerate(names, start=1)}
        self.done.append(Submitted(job, file, tuple(names)))
        self.dependencies += dependency
        if found is None or found.elements:
            self.own.append((part, job))
        return True

    def _let_wait(self) -> None:
        """Tell the elements of arrays what each waits for; and make jobs of their own of those that others wait for one
        by one: SLURM forgets what is cancelled in an array that has not begun, and what waits for it would run."""
        own = [(f"{job}_{number}", dependency) for part, job in self.own
               for number, dependency in enumerate(waits(part, self.places, self.sizes, singly=True).elements, start=1)
               if dependency]  # fmt: skip
        texts = [*self.dependencies, *(dependency for _, dependency in own)]
        needed = dict.fromkeys(one for text in texts for one in re.findall(r"\d+_\d+", text))
        updates = dict.fromkeys(needed, "") | {one: f" Dependency={dependency}" for one, dependency in own}
        names = {f"{job}_{number}": name for name, (job, number) in self.places.items()}
        lines = {one: f"update JobId={one} Comment={re.sub(r'[^A-Za-z0-9_./-]', '_', names[one])}{text}"
                 for one, text in updates.items()}  # fmt: skip
        here = {one.job for one in self.done}
        squeue.scontrol((line for one, line in lines.items() if one.split("_")[0] not in here), strict=False)
        squeue.scontrol(line for one, line in lines.items() if one.split("_")[0] in here)


def _prepared(
    cells: Path, part: Array, places: Mapping[str, Place], sizes: Mapping[str, int], missing: Collection[str]
) -> tuple[Waits | None, Path]:  # fmt: skip
    """What an array waits for (None: for cells that are `missing` yet), and its script as a file."""
    later = any(need in missing for task in part.tasks for need in task.needs)
    found = None if later else waits(part, places, sizes)
    file = cells / jobs.FOLDER / f"{part.name}.sbatch"
    each = found is None or found.elements
    about = [
        f"stage {part.tasks[0].stage} of the experiment at {cells.parent}: {len(part.tasks)} cells",
        "each waits for cells of its own" if each else f"dependency: {(found and found.whole) or 'none'}",
    ]
    about = [" ".join(line.split()) for line in about]
    files.write_atomically(file, os.fsencode(script(part, _folder(cells), Path.cwd(), about=about)))
    return found, file


def _written(cells: Path, parts: Sequence[Array]) -> list[Submitted]:
    """The scripts alone. In place of job ids stand names of arrays."""
    places: dict[str, Place] = {}
    sizes = {part.name: len(part.tasks) for part in parts}
    missing, done = {task.name for part in parts for task in part.tasks}, []
    for part in parts:
        _, file = _prepared(cells, part, places, sizes, missing)
        names = tuple(task.name for task in part.tasks)
        done.append(Submitted(None, file, names))
        missing.difference_update(names)
        places |= {name: (part.name, number) for number, name in enumerate(names, start=1)}
    return done


def _folder(cells: Path) -> Path:
    """Where scripts and output are, as compute nodes find it."""
    return Path(os.path.abspath(cells / jobs.FOLDER))
