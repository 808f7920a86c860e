"""What one command would do: `--dry-run` of build-dataset, pretrain, finetune and evaluate."""

from __future__ import annotations

import glob
import os
from contextlib import suppress
from typing import Any

from rich.console import Console

from cvlctl import rates
from cvlctl.errors import CvlctlError
from cvlctl.experiments.plan import rough, state_of
from cvlctl.experiments.recipe import Job


def plan(recipe: Any, force: bool = False) -> Any:
    """status ("planned"), command, out, state (as of an experiment's cells), size, estimate_seconds, threads, reads (a
    list of {path, found}), sees (what it takes over from the run that it starts from, a sentence or None), recipe
    (resolved, that filled in). Of a build of several tasks a list of these. Nothing is written.

    Raises:
        CvlctlError: stores that are there do not fit together, or have no such camera.
    """
    if hasattr(recipe, "recipes"):
        return [plan(one, force) for one in recipe.recipes]
    given, told = recipe, list[str]()
    if _is_there(str(getattr(recipe, "init_from", None) or "")):
        from cvlctl.learn.starting import begin

        with suppress(CvlctlError):  # what is amiss with the run is said as it begins: it may yet be trained
            recipe, _ = begin(recipe, unfinished=True, tell=told.append)
    if hasattr(recipe, "observe") and all(_is_there(str(use.path)) for use in recipe.stores):
        from cvlctl.data.load import open_stores

        open_stores(recipe.stores, recipe.observe)  # what does not fit together is told beforehand
    if recipe.learning() is not None and rates.kept() is None:
        from cvlctl.learn.settings import measured_rate

        measured_rate()  # so that the estimate is one of this machine
    size, seconds = recipe.work()
    state = "to do" if force else state_of(Job(recipe.command, recipe.command, {}, given, {}))
    return {
        "status": "planned", "command": recipe.command, "out": str(recipe.out), "state": state, "size": size,
        "estimate_seconds": round(seconds), "threads": getattr(recipe, "about_threads", None),
        "reads": [{"path": path, "found": _is_there(path)} for path in recipe.reads()],
        "sees": told[0] if told else None, "recipe": recipe.resolved(),
    }  # fmt: skip


def render(result: Any, console: Console) -> None:
    """Print the plan, of several commands one after the other."""
    for one in result if isinstance(result, list) else [result]:
        about = "" if one["state"] == "finished" else f": about {rough(one['estimate_seconds'])} on an idle machine"
        lines = [f"{one['command']}: {one['size']}{about}", f"out: {one['out']} ({_STATES[one['state']]})"]
        lines += [f"reads: {read['path']}{'' if read['found'] else ', which is not there'}" for read in one["reads"]]
        lines += [one["sees"]] if one["sees"] else []
        lines += [f"threads: {one['threads']}"] if one["threads"] else []
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


_STATES = {
    "to do": "to do",
    "partial": "begun: it goes on",
    "finished": "finished already",
    "another recipe": "holds the result of another recipe: choose another out, or --force",
}


def _is_there(place: str) -> bool:
    return bool(glob.glob(place, recursive=True)) if glob.has_magic(place) else os.path.exists(place)
