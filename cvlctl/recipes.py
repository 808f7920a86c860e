"""Recipes: YAML files with a strict schema, and errors that name file, line, key and the nearest legal name.

`load(path, overrides, kind)` reads one; `resolved(recipe)` is what goes into stores, runs and checkpoints: every
default filled in, plain JSON values. A kind is the command that eats the recipe: build-dataset, pretrain, finetune,
evaluate, run. Relative paths are relative to the current directory. `key.sub=value` overrides win over the file. YAML
is read as version 1.2 reads numbers (`3e-4` is one); a key given twice is an error, and a number that is not finite.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
)

from cvlctl import envs, experiments, recipefile
from cvlctl.errors import CvlctlError
from cvlctl.experiments import text_of
from cvlctl.recipefile import Key, Source, shown
from cvlctl.schema import BuildManyRecipe, BuildRecipe, EvaluateRecipe, FinetuneRecipe, Out, PretrainRecipe, Strict


class Job(NamedTuple):
    """One command of an experiment."""

    stage: str
    command: str
    combination: dict[str, Any]  # the matrix keys that its stage mentions, and their values
    recipe: Any  # a BuildRecipe, PretrainRecipe, FinetuneRecipe or EvaluateRecipe

    @property
    def label(self) -> str:
        """The combination in words."""
        return " ".join(text_of(value) for value in self.combination.values())


class ExperimentRecipe(Strict):
    """`cvlctl run`: stages, multiplied by a matrix. The rules are in `experiments`."""

    out: Out
    matrix: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    stages: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    _jobs: tuple[Job, ...] = PrivateAttr(())

    @field_validator("matrix")
    @classmethod
    def _legal_keys(cls, matrix: dict[str, Any]) -> dict[str, Any]:
        for key in matrix:
            if key == "out" or not re.fullmatch(r"[\w-]+", key):
                raise ValueError(f"key {key!r} is not a legal name: letters, digits, _ and -, and not out")
        return matrix

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Every job in the order of execution."""
        return self._jobs


KINDS: dict[str, type[Strict]] = {
    "build-dataset": BuildRecipe,
    "pretrain": PretrainRecipe,
    "finetune": FinetuneRecipe,
    "evaluate": EvaluateRecipe,
    "run": ExperimentRecipe,
}
_TELLING = {
    "stages": "run",
    "source": "build-dataset",
    "algorithm": "finetune",
    "runs": "evaluate",
    "stores": "pretrain",
}


def load(path: str | Path, overrides: Sequence[str] = (), kind: str | None = None) -> Any:
    """The recipe in file `path`, with `key.sub=value` overrides.

    Args:
        kind: a name of `KINDS`; None: the one that the file's keys tell.

    Returns:
        The model of that kind: frozen, every default filled in.

    Raises:
        CvlctlError: naming file, line and key (or the command line), what was expected, and the nearest legal name.
    """
    source, data = recipefile.read(Path(path))
    for override in overrides:
        recipefile.override(source, data, override)
    told = kind_of(data)
    if kind is None and told is None:
        raise CvlctlError(f"{path}: not a recipe of any kind", f"one of these keys tells which: {', '.join(_TELLING)}")
    if kind in (None, "build-dataset") and told == "build-dataset" and _is_many(data.get("task")):
        return _build_many(data, source)
    recipe = _validate(kind or str(told), data, source)
    if isinstance(recipe, ExperimentRecipe):
        recipe._jobs = tuple(_jobs(recipe, source))
    return recipe


def _validate(kind: str, data: Any, source: Source, prefix: Key = ()) -> Any:
    try:
        return KINDS[kind].model_validate(data)
    except ValidationError as invalid:
        told = kind_of(data)
        if told and told != kind and not prefix:
            what = f"{source.file} is a recipe for {told}, not for {kind}"
            raise CvlctlError(what, f"run: cvlctl {told} {source.file}") from None
        raise recipefile.explain(invalid, KINDS[kind], data, source, prefix) from None


def _jobs(experiment: ExperimentRecipe, source: Source) -> Iterator[Job]:
    """Every job of the experiment, its recipe checked."""
    taken: dict[str, str] = {}
    commands = [kind for kind in KINDS if kind != "run"]
    stages = experiments.expand(str(experiment.out), experiment.matrix, experiment.stages, commands, source)
    for stage, command, combination, body in stages:
        at: Key = ("stages", stage)
        job = Job(stage, command, combination, _validate(command, body, source, at))
        place, title = os.path.normpath(job.recipe.out), f"{stage} {job.label}".strip()
        if place in taken:
            what = f"{title} and {taken[place]} have the same out, {job.recipe.out}"
            hint = "mention in it what tells them apart, such as ${algorithm.name}"
            raise CvlctlError(f"{source.where((*at, 'out'))}: {what}", hint)
        taken[place] = title
        yield job


def _is_many(task: Any) -> bool:
    return isinstance(task, list) or (isinstance(task, str) and task.endswith("/all"))


def _build_many(data: Mapping[str, Any], source: Source) -> BuildManyRecipe:
    """The recipe of every task, checked; `data` is one whose `task` is a list or a family."""
    listed = data["task"] if isinstance(data["task"], list) else [data["task"]]
    tasks = [task for name in listed for task in _family(name)]
    where = source.where(("task",))
    if not tasks:
        raise CvlctlError(f"{where}: task is an empty list", "name tasks, or a family such as metaworld/all")
    if twice := next((task for task in tasks if tasks.count(task) > 1), None):
        raise CvlctlError(f"{where}: task names {twice} twice")
    if "${task}" not in str(data.get("out", "${task}")):
        what = f"{source.where(('out',))}: out is {shown(data['out'])} for {len(tasks)} tasks"
        raise CvlctlError(what, "mention ${task} in it, such as data/${task}.zarr, so that each has a store of its own")
    body = {key: value for key, value in data.items() if key != "processes"} | {"task": "${task}"}
    stage = {"build": {"command": "build-dataset", **body}}
    filled = experiments.expand("", {"task": tasks}, stage, ["build-dataset"], source)
    built = [_validate("build-dataset", each.body, source) for each in filled]
    try:
        return BuildManyRecipe(processes=data.get("processes", "auto"), recipes=tuple(built))
    except ValidationError as invalid:
        raise recipefile.explain(invalid, BuildManyRecipe, data, source) from None


def _family(name: Any) -> list[Any]:
    """metaworld/all: every task of Metaworld; any other name stands for itself."""
    if not isinstance(name, str) or not name.endswith("/all"):
        return [name]
    return [task for task in envs.list_tasks() if task.startswith(name.removesuffix("all"))] or [name]


def command_of(recipe: BaseModel) -> str:
    """The command that eats a recipe."""
    if isinstance(recipe, BuildManyRecipe):
        return "build-dataset"
    return next(kind for kind, model in KINDS.items() if isinstance(recipe, model))


def built_as(recorded: Any, recipe: BuildRecipe) -> bool:
    """Whether a resolved recipe found in a store is this one: keys that came later have their defaults, out may differ.

    A store may have been moved, or be reached by another path.
    """
    before = with_defaults("build-dataset", recorded or {})
    return before | {"out": None} == resolved(recipe) | {"out": None}


def kind_of(data: Any) -> str | None:
    """The kind of recipe that a mapping's keys tell, or None."""
    return next((kind for key, kind in _TELLING.items() if isinstance(data, Mapping) and key in data), None)


def with_defaults(kind: str, plain: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe of an earlier version, with the defaults of keys that came since; as it is if not legal."""
    extra = {key: value for key, value in plain.items() if key not in KINDS[kind].model_fields}
    try:
        recipe = KINDS[kind].model_validate({key: value for key, value in plain.items() if key not in extra})
    except ValidationError:
        return plain
    return resolved(recipe) | extra


def resolved(recipe: BaseModel) -> dict[str, Any]:
    """The recipe as plain JSON values, all defaults filled in: what is written into stores, runs and checkpoints."""
    plain = recipe.model_dump(mode="json", by_alias=True)
    if isinstance(recipe, FinetuneRecipe) and recipe.init_from is not None:
        plain["algorithm"].pop("critic", None)  # the pretrained run's count
    return plain
