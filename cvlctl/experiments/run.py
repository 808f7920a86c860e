"""`cvlctl run`: the cells of an experiment, wherever its engine runs them. Finished ones are skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from cvlctl import interrupts
from cvlctl.errors import CvlctlError
from cvlctl.experiments import drivers, status
from cvlctl.experiments.commands import function
from cvlctl.experiments.engines import local, on_ray, on_slurm
from cvlctl.experiments.engines.start import state_in
from cvlctl.experiments.fixed import fitted, fixed, machine_of
from cvlctl.experiments.graph import Cell, below, cells_of, folder_of, in_order
from cvlctl.experiments.plan import is_older, lines, plan, state_of, title
from cvlctl.experiments.recipe import ExperimentRecipe
from cvlctl.experiments.show import MANY
from cvlctl.machine import num_cpus
from cvlctl.progress import Screen, clock, say
from cvlctl.recipes.explain import nearest
from cvlctl.recipes.matrix import text_of

_RUNS: dict[str, Callable[..., None]] = {"local": local.run, "ray": on_ray.run}  # engines that wait for their cells
_GPUS = {"ray": on_ray.has_gpus, "slurm": on_slurm.has_gpus}  # asked for them cell by cell; local takes what is here


@interrupts.watched()
def run_experiment(
    experiment: ExperimentRecipe,
    *,
    force: bool = False,
    dry_run: bool = False,
    only: str = "",
    fail_fast: bool = False,
    unfinished: bool = False,
) -> dict[str, Any]:
    """Run the cells of the experiment that are not finished, each when those that it needs are.

    Args:
        force: what is there of the cells that `only` names is replaced; what they need goes on.
        dry_run: only tell what there is to do.
        only: "stage=train task=*window*": cells that match, and what they need; "": all.
        fail_fast: stop at the first failure; else it blocks those alone that wait for it.
        unfinished: runs elsewhere that cells begin from (`init_from`) need not have come to their end.

    Returns:
        out, status ("planned", "done", "finished already" or "failed"), seconds, at_once (cells), cells (a dict a cell:
        what `plan.plan` says of it; after a run its state is "finished", "failed", "blocked" or "stopped", and there
        are seconds of what ran, error and hint of what failed, results of stores and evaluations), and scores:
        evaluate's results.

    Raises:
        CvlctlError: what is wrong with the plan.
        KeyboardInterrupt: Ctrl-C or SIGTERM, once every cell has saved what it has.
    """
    cells = cells_of(experiment.out, experiment.jobs)
    if unfinished:
        begun = [getattr(cell.job.recipe, "init_from", None) is not None for cell in cells]
        cells = [cell._replace(unfinished=told) for cell, told in zip(cells, begun, strict=True)]
    with nullcontext() if dry_run else drivers.noted(experiment.out, experiment.engine):
        return _run_cells(experiment, cells, only, force=force, dry_run=dry_run, fail_fast=fail_fast)


def _run_cells(
    experiment: ExperimentRecipe, cells: Sequence[Cell], only: str, *, force: bool, dry_run: bool, fail_fast: bool
) -> dict[str, Any]:
    cells = chosen(decided(experiment, cells, keep=not dry_run), only, force=force)
    rows = plan(cells)
    at_once = _at_once(experiment)
    about: dict[str, Any] = {"out": str(experiment.out), "at_once": at_once, "cells": rows}
    todo = _to_do(cells, rows)
    refused = _refused(todo, rows)
    begin = [cell for cell in todo if cell.name not in refused]
    if dry_run:
        return {"status": "planned", **about, **(_submit(experiment, begin, rows, dry_run=True)), "scores": []}
    for cell, row in zip(cells, rows, strict=True):
        if cell.name in refused:
            row["state"], row["error"], row["hint"] = refused[cell.name]
            say(f"{title(cell.job)}: {row['state']}: {row['error']}")
    for line in lines(cells, rows, at_once):
        say(line)
    if experiment.engine == "slurm" and begin:
        if fail_fast:
            raise CvlctlError(
                "--fail-fast: SLURM goes on when this command has ended", "leave it out, or --cancel later"
            )
        return {"status": "submitted", **about, **_submit(experiment, begin, rows, dry_run=False), "scores": []}
    began = time.monotonic()
    _run(experiment, cells, rows, [] if fail_fast and refused else begin, fail_fast=fail_fast)
    about["seconds"] = round(time.monotonic() - began, 1)
    _read_results(cells, rows)
    failed = any(row["state"] != "finished" for row in rows)
    word = "failed" if failed else "done" if any("seconds" in row for row in rows) else "finished already"
    scores = [row["result"] for row in rows if row["command"] == "evaluate" and "result" in row]
    return {"status": word, **about, "scores": scores}


def planned(experiment: ExperimentRecipe, *, keep: bool) -> list[Cell]:
    """The experiment's cells in order, as `decided` leaves them."""
    return decided(experiment, cells_of(experiment.out, experiment.jobs), keep=keep)


def decided(experiment: ExperimentRecipe, cells: Sequence[Cell], *, keep: bool) -> list[Cell]:
    """The cells with nothing left to be decided; `keep`: what decides is kept from now on."""
    has_gpus, gives = _GPUS.get(experiment.engine), None  # None: where this machine has some
    if has_gpus is not None:
        gives, cells = any(map(has_gpus, cells)), fitted(cells, has_gpus)
    elif experiment.local.gpus != "auto":
        gives = experiment.local.gpus > 0
    return fixed(cells, machine_of(experiment.out, gives, keep=keep))


def chosen(cells: Sequence[Cell], only: str, *, force: bool = False) -> list[Cell]:
    """The cells that `only` names, of which `force` is said, and those that they need which are not finished.

    Raises:
        CvlctlError: no cell is like that.
    """
    conditions = _conditions(cells, only)
    wanted = {cell.name for cell in cells if _matches(cell, conditions)}
    if not wanted:
        raise CvlctlError(f"--only: no cell is of {only!r}", "cvlctl run EXPERIMENT --dry-run shows what there is")
    named, jobs = frozenset(wanted), {cell.name: cell.job for cell in cells}
    missing = cache(lambda name: state_of(jobs[name]) != "finished")
    for cell in reversed(in_order(cells)) if only else ():
        if cell.name in wanted:
            wanted |= {need for need in cell.needs if need not in wanted and missing(need)}
    return [cell._replace(force=force and cell.name in named) for cell in cells if cell.name in wanted]


def _conditions(cells: Sequence[Cell], only: str) -> list[tuple[str, str]]:
    legal = dict.fromkeys(["stage", "command", "cell", *(key for cell in cells for key in cell.job.combination)])
    found = []
    for part in only.split():
        key, equals, pattern = part.partition("=")
        if not equals or key not in legal:
            raise CvlctlError(f"--only: {part!r} is no condition key=pattern", nearest(key, list(legal), "keys"))
        found.append((key, pattern))
    return found


def _matches(cell: Cell, conditions: Sequence[tuple[str, str]]) -> bool:
    job = cell.job
    facts = {"stage": job.stage, "command": job.command, "cell": cell.name}
    facts |= {key: text_of(value) for key, value in job.combination.items()}
    return all(key in facts and fnmatchcase(facts[key], pattern) for key, pattern in conditions)


def _to_do(cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """In order: what is not finished, what waits for that, and what something newer has been read by."""
    ordered = in_order(cells)
    states = {row["cell"]: row["state"] for row in rows}
    left = {cell.name for cell in cells if states[cell.name] != "finished" or is_older(cell.job)}
    again = below(ordered, left)
    return [cell for cell in ordered if cell.name in again]


def _refused(todo: Sequence[Cell], rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """State, error and hint of cells that would not begin where another recipe's result is, and of what waits for them:
    told from the plan, and not by the start of a command each."""
    errors = {row["cell"]: row["refused"] for row in rows if row["refused"]}
    found, behind = dict[str, tuple[str, str, str]](), dict[str, str]()
    for cell in todo:
        why = next((behind[need] for need in cell.needs if need in behind), None)
        if cell.name in errors:
            found[cell.name] = ("failed", *errors[cell.name])
        elif why is not None:
            found[cell.name] = ("blocked", f"it needs {why}, which failed", "")
        if cell.name in found:
            behind[cell.name] = why or cell.name
    return found


def _run(
    experiment: ExperimentRecipe, cells: Sequence[Cell], rows: list[dict[str, Any]], todo: Sequence[Cell],
    *, fail_fast: bool,
) -> None:  # fmt: skip
    """Run what is to be done, and write what came of it into `rows`."""
    by_name = {row["cell"]: row for row in rows}
    places = {row["cell"]: f"{number}/{len(rows)} {title(cell.job)}"
              for number, (cell, row) in enumerate(zip(cells, rows, strict=True), start=1)}  # fmt: skip
    again = {cell.name for cell in todo}
    finished = [name for name, row in by_name.items() if row["state"] == "finished" and name not in again]
    for name in finished if len(finished) <= MANY else ():
        say(f"{places[name]}: finished already")
    if len(finished) > MANY:
        say(f"{len(finished)} of {len(rows)} cells are finished already")
    screen = Screen("cell", lambda: list(_under_way(experiment.out, todo, by_name)), lambda: _counts(rows))

    def settled(cell: Cell, told: dict[str, Any]) -> None:
        row, state = by_name[cell.name], told["state"]
        row["state"] = {"done": "finished"}.get(state, state)
        if state == "running":
            screen.say(places[cell.name])
            return
        if "began" in told:
            row["seconds"] = round(told.get("ended", time.time()) - told["began"], 1)
        if state == "done":
            screen.say(f"{places[cell.name]}: done in {clock(row.get('seconds', 0))}")
            return
        row["error"], row["hint"] = told["error"]
        screen.say(f"{places[cell.name]}: {state}: {row['error']}")

    with screen:
        if todo:
            _RUNS[experiment.engine](
                experiment.out,
                todo,
                getattr(experiment, experiment.engine),
                fail_fast=fail_fast,
                settled=settled,
                look=screen.update,
            )
    for row in rows:
        if row["state"] not in ("finished", "failed", "blocked"):
            row["state"] = "stopped"  # by --fail-fast


def _submit(
    experiment: ExperimentRecipe, todo: Sequence[Cell], rows: Sequence[dict[str, Any]], *, dry_run: bool
) -> dict[str, Any]:
    """Give SLURM what is to be done, and write into `rows` what is there; nothing where another engine runs it."""
    if experiment.engine != "slurm" or not todo:
        return {}
    result = on_slurm.submit(experiment.out, todo, dry_run=dry_run)
    for row in rows:
        if row["cell"] in result["queued"]:
            row.update(state="submitted", job=result["queued"][row["cell"]])
    return result


def _at_once(experiment: ExperimentRecipe) -> int:
    """How many cells run at once, as far as that is known before."""
    if experiment.engine == "slurm":
        return experiment.slurm.parallel or MANY
    processes = experiment.local.processes
    return num_cpus() if processes == "auto" or experiment.engine != "local" else processes


def _under_way(
    out: Path, todo: Sequence[Cell], rows: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str, bool]]:
    for cell in todo:
        row = rows[cell.name]
        if row["state"] == "failed":
            yield cell.name, f"failed: {row['error']}", True
        elif row["state"] == "running":
            yield cell.name, status.in_words(state_in(folder_of(out, cell.name))), False


def _counts(rows: Sequence[Mapping[str, Any]]) -> str:
    words = {"finished": "done", "failed": "failed", "blocked": "blocked", "running": "running"}
    return status.counts([words.get(row["state"], "waiting") for row in rows])


def _read_results(cells: Sequence[Cell], rows: Sequence[dict[str, Any]]) -> None:
    """What the commands of finished evaluations and builds give, of these only a few: they say so without any work."""
    finished = [(cell, row) for cell, row in zip(cells, rows, strict=True) if row["state"] == "finished"]
    builds = [pair for pair in finished if pair[0].job.command == "build-dataset"]
    scores = [pair for pair in finished if pair[0].job.command == "evaluate"]
    for cell, row in [*builds[:MANY], *scores]:
        if state_of(cell.job) != "finished":
            continue  # somebody has removed it since
        try:
            row["result"] = function(cell.job.command)(cell.job.recipe, force=False)
        except CvlctlError as error:
            say(f"{cell.name}: {error.what}")
