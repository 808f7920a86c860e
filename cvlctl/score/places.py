"""In which environment a run's policies are played.

A run says its task, and what its store said of the environment. That is followed where it names no code and hands none
anything: success, keys and bounds alone. Whatever else, the recipe or the command line names again: a run may be a
stranger's, and what is imported, and what it is handed, is not a stranger's to say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from cvlctl.errors import CvlctlError
from cvlctl.play import envs, named_code
from cvlctl.play.recipe import settings_of
from cvlctl.play.settings import Settings
from cvlctl.recipes.yamltext import cut
from cvlctl.score.recipe import EvaluateRecipe
from cvlctl.types import check_text


class Place(NamedTuple):
    """A task, and how its environment is made; None: as a built-in one is."""

    task: str
    settings: Settings | None


class Origin(NamedTuple):
    """The environment that a run's store came from, as it says."""

    task: str
    settings: Settings


def place_of(recipe: EvaluateRecipe, run: Path, metadata: Mapping[str, Any]) -> Place:
    """Where the policies of a checkpoint with this metadata are played.

    Raises:
        CvlctlError: the recipe has to name it, in whole or in part; a task that is none.
    """
    said, origin = metadata["task"], _origin(run, metadata)
    chosen = [task for task in (said, origin.task) if task in recipe.task] or (
        list(recipe.task) if len(recipe.task) == 1 else []
    )
    if chosen:
        task = chosen[0]
        settings = settings_of(task, recipe.env)
        if recipe.env is None and _is_same(task, origin.task):
            if origin.settings.kwargs != "{}":
                _ask_again(run, task, origin)
            settings = _read_so(settings, origin.settings)
    else:
        task = said if _is_task(said) else origin.task
        settings = origin.settings if origin.task == task else None
        if not (_names_code(task) or _is_task(task)):
            _unknown(run, said, origin)
        if _names_code(task) or (settings and settings.kwargs != "{}"):
            _ask_again(run, task, origin)
    if envs.is_built_in(task, settings):
        return Place(task, None)
    horizon = (metadata.get("spec") or {}).get("horizon")
    return Place(task, replace(settings or Settings(), limit=horizon if isinstance(horizon, int) else None))


def described(settings: Settings) -> dict[str, Any]:
    """What an evaluation's record says of an environment of one's own: rows of another one are not of that."""
    return settings.about() | ({} if settings.code is None else {"sha256": named_code.digest(settings.code)})


def _origin(run: Path, metadata: Mapping[str, Any]) -> Origin:
    found = metadata.get("environment")
    found = found if isinstance(found, dict) else {}
    task = found.get("task", metadata["task"])
    check_text(f"{run}: the environment's task", task)
    said = {name: found.get(name) for name in ("kwargs", "success", "keys", "action_bounds")}
    handed, registered = said["kwargs"], envs.registered_kwargs(task)
    if isinstance(handed, dict):  # what gymnasium hands it anyway is nobody's wish
        said["kwargs"] = {name: value for name, value in handed.items() if registered.get(name, handed) != value}
    return Origin(task, Settings.of(said))


def reading_settings(task: str, settings: Settings | None, said: Any, given: bool) -> Settings | None:
    """`settings` of a task that was named, with what a store's attribute `environment` says of how it is read, unless
    settings were given."""
    origin = _origin(Path(task), {"task": task, "environment": said})
    return settings if given or not _is_same(task, origin.task) else _read_so(settings, origin.settings)


def _read_so(settings: Settings | None, said: Settings) -> Settings | None:
    made = replace(said, kwargs="{}", code=None if settings is None else settings.code)
    return made if settings is not None or made.about() else None


def _is_same(task: str, said: str) -> bool:
    """Whether two names are of one environment: a file's path depends on where one stands."""
    return task == said or (task.startswith("py/") and said.startswith("py/") and _tail(task) == _tail(said))


def _tail(task: str) -> str:
    return task.rpartition("/")[2]


def _names_code(task: str) -> bool:
    try:
        return named_code.names(task) is not None
    except CvlctlError:
        return False


def _is_task(task: str) -> bool:
    """Whether it can be made without code that a task names."""
    try:
        if _names_code(task):
            return False
        envs.check_task(task)
        return True
    except CvlctlError:
        return False


def _ask_again(run: Path, task: str, origin: Origin) -> NoReturn:
    kwargs = origin.settings.kwargs if _is_same(task, origin.task) else "{}"
    made = f" with {cut(kwargs)}" if kwargs != "{}" else ""
    what = f"{run} is of {task}{made}: what a run says is neither imported nor handed on unless you name it too"
    again = f"task={task}" + (f" 'env.kwargs={kwargs}'" if made else "")
    raise CvlctlError(what, f"if you trust it, add to the command (or the recipe): {again}")


def _unknown(run: Path, said: str, origin: Origin) -> NoReturn:
    about = origin.settings.about()
    details = f"; its data came from {origin.task}, made with {cut(json.dumps(about))}" if about else ""
    what = f"{run} is of {said!r}, which is no environment here{details}"
    near = envs.nearest(said)
    hint = f"did you mean task={near[0]}? " if near else ""
    raise CvlctlError(what, f"{hint}name one to play it in, such as task=py/my_env.py:make")
