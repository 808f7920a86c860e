"""What one command would do: `--dry-run` of build-dataset, pretrain, finetune and evaluate."""

from __future__ import annotations

import glob
import os
from typing import Any

from rich.console import Console

from cvlctl import rates
from cvlctl.experiments.plan import rough, state_of
from cvlctl.experiments.recipe import Job


def plan(recipe: Any, force: bool = False) -> Any:
    """status ("planned"), command, out, state (as of an experiment's cells), size, estimate_seconds, threads, reads (a
    list of {path, found}), recipe (resolved). Of a build of several tasks a list of these. Nothing is written.

    Raises:
        CvlctlError: stores that are there do not fit together, or have no such camera.
    """
    if hasattr(recipe, "recipes"):
        return [plan(one, force) for one in recipe.recipes]
    if hasattr(recipe, "observe") and all(_is_there(str(use.path)) for use in recipe.stores):
        from cvlctl.data.load import open_stores

        open_stores(recipe.stores, recipe.observe)  # what does not fit together is told beforehand
    if recipe.learning() is not None and rates.kept() is None:
        from cvlctl.learn.settings import measured_rate

        measured_rate()  # so that the estimate is one of this machine
    size, seconds = recipe.work()
    state = "to do" if force else state_of(Job(recipe.command, recipe.command, {}, recipe, {}))
    return {
        "status": "planned", "command": recipe.command, "out": str(recipe.out), "state": state, "size": size,
        "estimate_seconds": round(seconds), "threads": getattr(recipe, "about_threads", None),
        "reads": [{"path": path, "found": _is_there(path)} for path in recipe.reads()], "recipe": recipe.resolved(),
    }  # fmt: skip


def render(result: Any, console: Console) -> None:
    """Print the plan, of several commands one after the other."""
    for one in result if isinstance(result, list) else [result]:
        about = "" if one["state"] == "finished" else f": about {rough(one['estimate_seconds'])} on an idle machine"
        lines = [f"{one['command']}: {one['size']}{about}", f"out: {one['out']} ({_STATES[one['state']]})"]
        lines += [f"reads: {read['path']}{'' if read['found'] else ', which is not there'}" for read in one["reads"]]
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
