"""The plan of an experiment as a graph: cells, and which of them read what others write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from cvlctl.errors import CvlctlError
from cvlctl.experiments.recipe import Job
from cvlctl.recipes.values import Others

CELLS = "cells"  # in the experiment's `out`: what its engines and its cells say
_OURS = ("machine.json", "slurm.json", "slurm.lock", "driver-*.json")  # files there
_OF_A_CELL = ("log.txt", "state.json", ".lock", "recipe-*.yaml")  # files in each cell's folder
_TRAINED = ("pretrain", "finetune")  # what patterns are of


class Cell(NamedTuple):
    """One job of an experiment, and what it waits for."""

    name: str  # its `out`, below the experiment's where it lies there: "finetune/cvl"
    job: Job
    needs: tuple[str, ...]  # names of the cells whose results it reads, in the order of the file
    force: bool = False  # what there is of its result is replaced
    unfinished: bool = False  # a run that its `init_from` names need not have come to its end


def folder_of(out: Path, name: str) -> Path:
    """Where a cell's resolved recipe, its log and its state lie."""
    return out / CELLS / name


def cells_of(out: Path, jobs: Sequence[Job]) -> list[Cell]:
    """The jobs as cells, in the order of the file.

    Raises:
        CvlctlError: they wait for each other in a circle, or what two of them say of themselves would lie in one place.
    """
    names = _names(out, jobs)
    _check_names(names, jobs)
    outs = {
        os.path.abspath(place): name for name, job in zip(names, jobs, strict=True) for place in job.recipe.writes()
    }
    trained = [(os.path.abspath(job.recipe.out), name) for name, job in zip(names, jobs, strict=True)
               if job.command in _TRAINED]  # fmt: skip
    tails = _by_pattern({pattern for job in jobs for pattern in job.recipe.reads()}, trained)
    judged = [(os.path.abspath(job.recipe.out), name) for name, job in zip(names, jobs, strict=True)
              if job.command == "evaluate"]  # fmt: skip
    joined = _by_pattern({pattern for job in jobs for pattern in _beside(job)}, judged)
    place = {name: number for number, name in enumerate(names)}
    cells = []
    for name, job in zip(names, jobs, strict=True):
        found = {other for path in job.recipe.reads() for other in (*_above(path, outs), *tails[path])}
        found |= {other for pattern in _beside(job) for other in joined[pattern]}
        found -= {name}
        cells.append(Cell(name, job, tuple(sorted(found, key=place.__getitem__))))
    in_order(cells)
    return cells


def _beside(job: Job) -> Sequence[str]:
    """Patterns of evaluations that a job joins."""
    return getattr(job.recipe, "beside", ())


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Each after those that it waits for, else as they were.

    Raises:
        CvlctlError: they wait for each other in a circle.
    """
    left, settled, ordered = list(cells), set[str](), list[Cell]()
    names = {cell.name for cell in cells}
    while left:
        ready, later = list[Cell](), list[Cell]()
        for cell in left:
            (later if any(need in names and need not in settled for need in cell.needs) else ready).append(cell)
            if ready and ready[-1] is cell:
                settled.add(cell.name)
        if not ready:
            raise CvlctlError(*_circle(left))
        ordered, left = [*ordered, *ready], later
    return ordered


def needed_by(cells: Sequence[Cell]) -> dict[str, Others]:
    """For each cell the recipes of those that it needs, by their `out`."""
    recipes = {cell.name: cell.job.recipe for cell in cells}
    found = {cell.name: [recipes[need] for need in cell.needs if need in recipes] for cell in cells}
    return {name: {recipe.out: recipe for recipe in needed} for name, needed in found.items()}


def below(cells: Iterable[Cell], names: set[str]) -> set[str]:
    """Those cells and all that wait for them, by whatever way; `cells` in order."""
    found = set(names)
    for cell in cells:
        if found.intersection(cell.needs):
            found.add(cell.name)
    return found


def _names(out: Path, jobs: Sequence[Job]) -> list[str]:
    """Of each job its `out` below the experiment's; one elsewhere by its whole path, as one word."""
    root, found = os.path.normpath(out), []
    for job in jobs:
        place = os.path.normpath(job.recipe.out)
        inside = place.startswith(root + os.sep)
        found.append(place[len(root) + 1 :] if inside else place.replace("..", "_").strip("/").replace("/", "~"))
    return found


def _check_names(names: Sequence[str], jobs: Sequence[Job]) -> None:
    """Refuse cells whose folders would be one, or be in the place of a file of ours."""
    outs: dict[str, Any] = {}
    for name, job in zip(names, jobs, strict=True):
        if (other := outs.setdefault(name, job.recipe.out)) is not job.recipe.out:
            raise CvlctlError(f"{other} and {job.recipe.out} would both be the cell {name}", "rename one of them")
    for name, out in outs.items():
        parts = name.split("/")
        inside = [part for number, part in enumerate(parts) if "/".join(parts[:number]) in outs]
        if parts[0] == CELLS or _is_like(parts[0], _OURS) or any(_is_like(part, _OF_A_CELL) for part in inside):
            raise CvlctlError(f"out: {out} is where this experiment keeps a file of its own", "choose another out")


def _is_like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _above(path: str, outs: dict[str, str]) -> list[str]:
    """The cell that writes `path`, or what holds it."""
    place, above = "", os.path.abspath(path)
    while place != above:
        place, above = above, os.path.dirname(above)
        if place in outs:
            return [outs[place]]
    return []


def _by_pattern(patterns: set[str], trained: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """For each pattern the cells whose runs it matches."""
    parts = [(Path(place).parts, name) for place, name in trained]
    found: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    for pattern in patterns:
        wanted = Path(os.path.abspath(pattern)).parts
        plain = next((n for n, part in enumerate(wanted) if any(sign in part for sign in "*?[")), len(wanted))
        if plain < len(wanted):
            near = [(at[plain:], name) for at, name in parts if at[:plain] == wanted[:plain]]
            found[pattern] = [name for at, name in near if _matches(at, wanted[plain:])]
    return found


def _matches(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether a path is one that glob finds for a pattern: `**` is any number of folders."""
    if not wanted or not parts:
        return not parts and all(one == "**" for one in wanted)
    if wanted[0] == "**":
        return _matches(parts, wanted[1:]) or _matches(parts[1:], wanted)
    same = parts[0] == wanted[0] or fnmatchcase(parts[0], wanted[0])
    return same and _matches(parts[1:], wanted[1:])


def _circle(left: Sequence[Cell]) -> tuple[str, str]:
    """What to say of cells that wait for each other."""
    by_name, way = {cell.name: cell for cell in left}, [left[0].name]
    while way[-1] not in way[:-1]:
        way.append(next(need for need in by_name[way[-1]].needs if need in by_name))
    names = [f"{by_name[name].job.stage} ({name})" for name in way[way.index(way[-1]) :]]
    return (
        f"stages wait for each other in a circle: {', which reads '.join(names)}",
        "let one of them read another path",
    )
