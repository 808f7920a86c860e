"""Which job of SLURM is which cell of an experiment: kept in <out>/cells/slurm.json, the rest is asked of SLURM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cvlctl import files
from cvlctl.errors import CvlctlError
from cvlctl.experiments.engines.sbatch import Place, Task
from cvlctl.experiments.engines.squeue import ENDED, Said, cancel, queue, scontrol

RECORD, FOLDER = "slurm.json", "slurm"  # in the experiment's folder of cells: this; and scripts and output


def read(cells: Path) -> dict[str, Any]:
    """Every array that was submitted: its name, job id, whether it was let go, and its cells and their recipes.

    Raises:
        CvlctlError: the file is damaged.
    """
    path = cells / RECORD
    if not path.exists():
        return {"next": 1, "arrays": []}
    record = files.read_json(path) or {}
    try:
        for array in record["arrays"]:
            kinds = (type(array["job"] or ""), type(array["name"]), type(array["released"]), len(array["recipes"]))
            if kinds != (str, str, bool, len(array["cells"])):
                raise TypeError
        record["next"] += 0
    except (KeyError, TypeError):
        hint = "look with squeue --me which jobs still run, let them end or scancel them, and delete it"
        raise CvlctlError(f"{path} is damaged", hint) from None
    return record


@contextmanager
def recorded(cells: Path) -> Iterator[dict[str, Any]]:
    """The record, for this process alone."""
    with files.lock(cells / "slurm.lock"):
        yield read(cells)


def keep(cells: Path, record: Mapping[str, Any]) -> None:
    """Write it down."""
    files.write_json(cells / RECORD, record)


def latest(record: Mapping[str, Any]) -> dict[str, Place]:
    """Where each cell was put last."""
    return {
        name: (array["job"], number)
        for array in record["arrays"] if array["job"]
        for number, name in enumerate(array["cells"], start=1)
    }  # fmt: skip


def ids(places: Mapping[str, Place]) -> list[str]:
    """The job ids of arrays."""
    return list(dict.fromkeys(job for job, _ in places.values()))


def active(record: Mapping[str, Any]) -> dict[str, Place]:
    """The cells that wait in SLURM or run there."""
    known = latest(record)
    said = queue(ids(known))
    return {name: place for name, place in known.items() if said.get(place, Said("COMPLETED")).state not in ENDED}


def settle(cells: Path, record: dict[str, Any]) -> None:
    """Bring a submission to its end that was killed in the middle: all of it is let go, or was never there."""
    open_ones = [array for array in record["arrays"] if not array["released"]]
    if not open_ones:
        return
    said = queue([array["job"] for array in open_ones if array["job"]])
    if any(not one.is_held for one in said.values()):  # it had begun to let them go: all were in
        scontrol((f"release {array['job']}" for array in open_ones), strict=False)
        for array in open_ones:
            array["released"] = True
        keep(cells, record)
    else:
        forget(cells, record, open_ones)


def forget(cells: Path, record: dict[str, Any], open_ones: Sequence[dict[str, Any]]) -> None:
    """Cancel arrays that are on hold, by their names: a job id may not have been written down any more."""
    for array in open_ones:
        cancel([f"--jobname={array['name']}", "--state=PENDING"])
    record["arrays"] = [array for array in record["arrays"] if array not in open_ones]
    keep(cells, record)


def check_recipes(tasks: Sequence[Task], active: Mapping[str, Place], record: Mapping[str, Any]) -> None:
    """Refuse to take a job for a cell that has changed since.

    Raises:
        CvlctlError: one is in SLURM with another recipe.
    """
    given = {(array["job"], number): name
             for array in record["arrays"] for number, name in enumerate(array["recipes"], start=1)}  # fmt: skip
    for task in tasks:
        job, number = place = active.get(task.name, ("", 0))
        if job and given[place] != task.recipe.name:
            what = f"{task.name} is in SLURM as job {job}_{number} with another recipe: the experiment has changed"
            raise CvlctlError(what, f"let it end, or scancel {job}_{number}, and run the same command again")
