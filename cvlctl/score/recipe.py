"""What a recipe of `cvlctl evaluate` may say."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from cvlctl.data.recipe import SuccessExamples
from cvlctl.play.envs import check_task
from cvlctl.play.recipe import CameraRecipe, Cameras, EnvRecipe
from cvlctl.recipes.estimates import EPISODE_STEPS, SIMULATED_WITH_WORKERS, Work, count
from cvlctl.recipes.values import NONE, Count, Device, Name, Others, Out, Pattern, Rate, Seed, Strict, checked, not_bool

# --- evaluate


def _known_task(task: str) -> str:
    check_task(task)
    return task


Task = Annotated[str, AfterValidator(checked(_known_task))]
_ONE_OR_SEVERAL = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


class Confidence(Strict):
    """Stratified bootstrap over runs."""

    level: Annotated[float, BeforeValidator(not_bool), Field(gt=0, lt=1)] = 0.95  # of the intervals
    resamples: Annotated[Count, Field(le=1_000_000)] = 2000  # of the bootstrap
    seed: Seed = 0


class EvaluationGoals(SuccessExamples):
    """States that goal-conditioned policies are sent to, chosen as success examples are: episode i gets state i mod N.

    Success is to come `within` a distance of it in `columns` (None: the policy's own goal columns). Without `within` it
    is the environment's own, which knows nothing of these goals. Policies that see frames are shown the states' own.
    """

    rule: Literal["successes", "last"] = "last"  # states marked as successful, or the last k of each episode
    num: Count = 50  # how many goals
    columns: tuple[Annotated[int, BeforeValidator(not_bool), Field(ge=0)], ...] | None = None  # None: the policy's own
    within: Rate | None = None  # a distance; None: success is the environment's own


class VideoRecipe(Strict):
    """The first episodes of each policy, in <out>/videos."""

    episodes: Annotated[Count, Field(le=1000)] = 2  # of each policy
    cameras: Annotated[Cameras, Field(min_length=1)] = {"default": CameraRecipe(size=128)}  # side by side
    format: Literal["gif", "mp4"] = "gif"  # mp4: extra `video`

    @property
    def settings(self) -> dict[str, Any]:
        """The cameras, as plain values."""
        return {name: camera.model_dump() for name, camera in self.cameras.items()}


class EvaluateRecipe(Strict):
    """`cvlctl evaluate`: episodes of every seed of every run, and tables of their scores."""

    command: ClassVar[str] = "evaluate"

    runs: tuple[Pattern, ...]  # run directories
    beside: tuple[Pattern, ...] = ()  # finished evaluations whose rows stand in the tables too; runs may then be empty
    # whose code may be imported, of those that the runs say; a single one is also where runs of no such task are played
    task: Annotated[tuple[Task, ...], WithJsonSchema(_ONE_OR_SEVERAL)] = ()
    env: EnvRecipe | None = None  # of these tasks: how they are made, what of them is read; None: as the runs say
    checkpoints: Literal["last", "all"] = "last"  # all: learning curves, of runs with checkpoint_every_steps
    episodes: Annotated[Count, Field(le=1_000_000)] = 50  # of each policy; their numbers and rows are in memory
    seed: Seed = 0
    goals: EvaluationGoals | None = None  # None: the environment commands them, or there are none
    cameras: Cameras = {}  # that policies see, where their data do not say where these stand
    video: VideoRecipe | None = None  # of episodes of each policy; None: none
    horizon: Count | None = None  # episodes are cut off after so many steps; None: the task's own limit
    workers: Literal["auto"] | Annotated[int, BeforeValidator(not_bool), Field(ge=0)] = "auto"  # processes; 0: this one
    device: Device = "cpu"  # cuda: one process answers for all policies; auto: for large ones
    backend: Literal["gymnasium", "envpool"] = "gymnasium"  # envpool: `workers` are its threads; starts of its own
    aggregate: tuple[Literal["iqm", "mean", "median", "optimality_gap"], ...] = (
        "iqm",
        "mean",
        "optimality_gap",
    )  # over tasks
    confidence: Confidence = Confidence()  # of the intervals
    baseline: Name | None = None  # of the pairwise differences; None: bc where it is there
    tuning: tuple[Name, ...] = ()  # patterns of names: each one's settings, tried online n at a time
    out: Out

    def work(self, others: Others = NONE) -> Work:
        """How much there is to do; `others` are the recipes of an experiment that train its policies."""
        seeds = sum(len(other.seeds) for other in others.values() if other.command == "finetune")
        policies = count(seeds, "policy") if seeds else "policies of earlier runs"
        more = ", every checkpoint" if self.checkpoints == "all" else ""
        seconds = max(seeds, 1) * self.episodes * EPISODE_STEPS / SIMULATED_WITH_WORKERS
        return Work(f"{policies} x {count(self.episodes, 'episode')}{more}", seconds)

    def reads(self) -> list[str]:
        goals = [str(path) for path in (self.goals.from_, self.goals.file) if path] if self.goals else []
        return [*self.runs, *self.beside, *goals]

    @field_validator("task", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else () if value is None else value

    @model_validator(mode="after")
    def _something_to_show(self) -> Self:
        if not self.runs and not self.beside:
            raise ValueError("runs: name at least one run directory, such as runs/finetune/*")
        if self.beside and (self.goals is not None or self.backend != "gymnasium"):
            raise ValueError("beside: joins episodes of gymnasium's own starts and goals; leave out goals and backend")
        return self

    @model_validator(mode="after")
    def _env_of_a_task(self) -> Self:
        if self.env is not None and not self.task:
            raise ValueError("env is of a task: name it too, such as task: py/reach.py:Reach")
        return self

    @model_validator(mode="after")
    def _what_envpool_can(self) -> Self:
        if self.backend == "envpool" and self.goals is not None:
            raise ValueError("backend: EnvPool cannot command goals; use backend: gymnasium for them")
        if self.backend == "envpool" and self.video is not None:
            raise ValueError("backend: EnvPool renders nothing; use backend: gymnasium for videos")
        if self.backend == "envpool" and self.device.startswith("cuda"):
            raise ValueError("backend: EnvPool simulates, and policies answer it, on the CPU: leave device out")
        return self
