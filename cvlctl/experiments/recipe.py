"""What an experiment's recipe may say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationInfo, field_validator

from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import STEPS, model
from cvlctl.experiments.engines.sbatch import SlurmSettings
from cvlctl.recipes.matrix import expand, sized, text_of
from cvlctl.recipes.values import Count, Name, Out, PartOf, Rate, Strict, checked, not_bool
from cvlctl.recipes.yamlfile import Source
from cvlctl.recipes.yamltext import Key


class LocalSettings(Strict):
    """`engine: local`: processes of this machine."""

    processes: Literal["auto"] | Count = "auto"  # cells at once; auto: as many as its CPUs are enough for
    gpus: Literal["auto"] | Annotated[int, BeforeValidator(not_bool), Field(ge=0)] = "auto"  # that cells share
    cells_per_gpu: Count = 1  # at once


def _address(text: str) -> str:
    if "://" in text:
        raise CvlctlError(
            f"{text} is for clients outside of a cluster, and cells read and write files",
            "on a node of the cluster, say address: auto, or HOST:PORT",
        )
    if text != "auto" and not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}", text):
        raise CvlctlError(f"{text!r} is no address of a Ray cluster", "say auto, or HOST:PORT, as ray start printed it")
    return text


class RaySettings(Strict):
    """`engine: ray`: tasks of a Ray cluster, or of a Ray of this machine alone."""

    address: Annotated[Name, AfterValidator(checked(_address))] | None = None  # None: its own, started and ended
    num_cpus: Rate | None = None  # of a cell; None: as many as it has threads, players of episodes a whole node
    num_gpus: PartOf | Count = 0  # of a cell that computes on one; 0.5: two share it
    max_retries: Annotated[int, BeforeValidator(not_bool), Field(ge=0)] = 3  # where its worker or node dies


ENGINES = ("local", "ray", "slurm")  # what may run an experiment's cells


class Job(NamedTuple):
    """One command of an experiment."""

    stage: str
    command: str
    combination: dict[str, Any]  # the matrix keys that its stage mentions, and their values
    recipe: Any  # a BuildRecipe, PretrainRecipe, FinetuneRecipe or EvaluateRecipe
    engines: dict[str, Any]  # settings of each engine: the experiment's, and over them the stage's own

    @property
    def label(self) -> str:
        """The combination in words."""
        return " ".join(text_of(value) for value in self.combination.values())


class ExperimentRecipe(Strict):
    """`cvlctl run`: stages, multiplied by a matrix. The rules are in `cvlctl.recipes.matrix`."""

    command: ClassVar[str] = "run"

    size: Name | None = None  # which of `sizes`; both are first, since a fault in them is one wherever they are named
    sizes: dict[str, dict[str, Any]] = {}  # by name: overrides of other keys
    out: Out
    engine: Literal["local", "ray", "slurm"] = "local"  # what runs the cells
    local: LocalSettings = LocalSettings()  # of that engine; a stage may have its own
    ray: RaySettings = RaySettings()  # likewise
    slurm: SlurmSettings = SlurmSettings()  # likewise
    # lists of values: a stage runs once for each combination of those that it mentions as ${key}
    matrix: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    # by name, in order: {command: build-dataset | pretrain | finetune | evaluate, its keys}
    stages: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    _jobs: tuple[Job, ...] = PrivateAttr(())

    @field_validator("matrix")
    @classmethod
    def _legal_keys(cls, matrix: dict[str, Any], fields: ValidationInfo) -> dict[str, Any]:
        taken = ["out", "size"] if fields.data.get("sizes") else ["out"]
        for key in matrix:
            if key in taken or not re.fullmatch(r"[\w-]+", key):
                what = f"key {key!r} is not a legal name: letters, digits, _ and -, and not {' or '.join(taken)}"
                raise ValueError(what)
        return matrix

    @classmethod
    def read(cls, data: Any, source: Source, prefix: Key = ()) -> Any:
        experiment = super().read(sized(data, source), source, prefix)
        experiment._jobs = tuple(jobs_of(experiment, source))
        return experiment

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Every job in the order of execution."""
        return self._jobs


def jobs_of(experiment: ExperimentRecipe, source: Source) -> Iterator[Job]:
    """Every job of the experiment, its recipe checked."""
    taken: dict[str, Job] = {}
    stages = expand(str(experiment.out), experiment.matrix, experiment.stages, STEPS, source)
    for stage, command, combination, body in stages:
        at: Key = ("stages", stage)
        engines = {name: _settings(experiment, name, body.pop(name, None), source, at) for name in ENGINES}
        job = Job(stage, command, combination, model(command).read(body, source, at), engines)
        other = taken.setdefault(os.path.abspath(job.recipe.out), job)
        if other is not job:
            titles = " and ".join(f"{one.stage} {one.label}".strip() for one in (job, other))
            what = f"{titles} have the same out, {job.recipe.out}"
            raise CvlctlError(f"{source.where((*at, 'out'))}: {what}", _telling_apart(job, other))
        yield job


def _telling_apart(one: Job, other: Job) -> str:
    key = next((key for key, value in one.combination.items() if other.combination.get(key) != value), None)
    if one.stage != other.stage or key is None:
        return "give each a path of its own"
    part = ".name" if isinstance(one.combination[key], dict) else ""
    return f"mention in it what tells them apart, such as ${{{key}{part}}}"


def _settings(experiment: ExperimentRecipe, engine: str, own: Any, source: Source, at: Key) -> Strict:
    """Of an engine: the experiment's, and over them what a stage says."""
    whole: Strict = getattr(experiment, engine)
    if own is None:
        return whole
    given = whole.model_dump(exclude_unset=True) if isinstance(own, dict) else {}
    return type(whole).read({**given, **own} if isinstance(own, dict) else own, source, (*at, engine))
