"""What a recipe of `cvlctl build-dataset` may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cvlctl.collect.source_recipes import (
    AnyContrastive,
    AnyCvl,
    MixSource,
    OnlineSource,
    PolicySource,
    RandomSource,
    Reaching,
    SacSource,
    ScriptedSource,
    StoresSource,
)
from cvlctl.errors import CvlctlError
from cvlctl.play import envs
from cvlctl.play.cameras import Camera, cameras_of
from cvlctl.play.filming import told_of
from cvlctl.play.recipe import Cameras, EnvRecipe, settings_of
from cvlctl.play.settings import Settings
from cvlctl.recipes.estimates import (
    EPISODE_STEPS,
    RENDERED,
    SIMULATED,
    Update,
    Work,
    count,
    training_seconds,
)
from cvlctl.recipes.matrix import expand
from cvlctl.recipes.values import NONE, Computed, Count, Others, Out, Seed, Strict, checked
from cvlctl.recipes.yamlfile import Source, shown
from cvlctl.recipes.yamltext import Key
from cvlctl.runs import difference, settled
from cvlctl.types import Flag, Observe


def _known_task(task: str) -> str:
    envs.check_task(task)
    return task


class BuildRecipe(Computed):
    """`cvlctl build-dataset`: a store of episodes of `task`."""

    command: ClassVar[str] = "build-dataset"
    few_threads: ClassVar[str | None] = (
        "auto: a step this small gains a third from a second, and loses far more to others"
    )

    task: Annotated[str, AfterValidator(checked(_known_task))]  # one, a list of them, or all of a family: metaworld/all
    source: Annotated[
        SacSource | AnyContrastive | AnyCvl | RandomSource | ScriptedSource | PolicySource | MixSource | StoresSource,
        Field(discriminator="name"),
    ]  # where episodes come from
    out: Out
    seed: Seed = 0
    horizon: Count | None = None  # episodes are cut off after so many steps; None: the task's own limit
    env: EnvRecipe | None = None  # of a task of one's own: how it is made, what of it is read
    cameras: Cameras = {}  # by name: their frames are recorded, and the simulator's states beside them
    sim_state: Flag = False  # these states also without cameras: `cvlctl data render` makes frames of them

    @property
    def settings(self) -> Settings | None:
        """Of the environment, for `envs.make`."""
        return settings_of(self.task, self.env)

    @property
    def is_filmed(self) -> bool:
        """Whether episodes are looked at as they are played."""
        return bool(self.cameras) or self.sim_state

    @property
    def sees(self) -> Observe | None:
        """What of its cameras an online learner learns from."""
        return self.source.sees if isinstance(self.source, OnlineSource) else None

    @property
    def filmed_by(self) -> tuple[Camera, ...]:
        """The cameras, by name."""
        return cameras_of({name: camera.model_dump() for name, camera in self.cameras.items()})

    def attributes(self, env: envs.Env) -> dict[str, Any]:
        """What the store says of its task: reference returns, how an environment of one's own is made again, and where
        its cameras stand."""
        seen = told_of(env, self.filmed_by) if self.is_filmed else {}
        if not env.own:
            return {"reference": envs.references(self.task, self.horizon), **seen}
        columns = {"observation_columns": list(env.columns)} if env.columns else {}
        return {"reference": None, "environment": envs.described(env, self.settings), **columns, **seen}

    @model_validator(mode="after")
    def _what_the_task_can(self) -> Self:
        built_in = self.env is None and self.task in envs.list_tasks()
        if getattr(self.source, "hindsight", 0) and (envs.goals(self.task) is None or not built_in):
            raise ValueError(f"source.hindsight relabels goals, and {self.task} is told none: gym/Fetch... tasks are")
        if getattr(self.source, "backend", "") == "envpool" and not built_in:
            raise ValueError(f"source.backend: EnvPool simulates built-in tasks, and {self.task} is none of them")
        if self.is_filmed and getattr(self.source, "backend", "") == "envpool":
            raise ValueError("cameras: EnvPool renders nothing, and keeps no states; leave source.backend out")
        if self.sees is not None and (lacking := [name for name in self.sees.cameras if name not in self.cameras]):
            raise ValueError(f"source.observe: {lacking[0]} is none of cameras: say there how it is filmed")
        if self.is_filmed and isinstance(self.source, StoresSource):
            raise ValueError("cameras: these episodes are over; render their states with cvlctl data render")
        if self.env is not None and self.task.startswith("metaworld/"):
            raise ValueError("env is for gym/... and py/... tasks: leave it out")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        found = handler.resolve_ref_schema(handler(core))
        task = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
        one = {key: value for key, value in found["properties"]["task"].items() if key != "type"}
        found["properties"]["task"] = {**one, **task}
        found["properties"]["processes"] = {
            "anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}],
            "default": "auto",
            "description": "of several tasks: how many are built at once; auto: one a CPU",
        }
        return found

    @classmethod
    def read(cls, data: Any, source: Source, prefix: Key = ()) -> Any:
        """One recipe; where `task` is a list or a family, a BuildManyRecipe."""
        if not prefix and "source" in data and _is_many(data.get("task")):
            return _several(data, source, super().read)
        return super().read(data, source, prefix)

    @property
    def about_threads(self) -> str | None:
        return super().about_threads if isinstance(self.source, OnlineSource) else None

    def work(self, others: Others = NONE) -> Work:
        """How much there is to do."""
        source, learning = self.source, 0.0
        if isinstance(source, StoresSource):
            return Work(f"episodes of {count(len(source.stores), 'store')}", 10.0)
        if isinstance(source, OnlineSource):
            what, steps = f"{source.steps:,} steps of {source.title}", source.steps
            learning = training_seconds(source.updates, source.update, self.num_threads, self.compile)
        elif source.episodes is None:
            steps = source.transitions or 0
            what = count(steps, "transition")
        else:
            checkpoints = getattr(source, "checkpoints", None)
            num = source.episodes * (len(checkpoints) if isinstance(checkpoints, tuple) else 1)
            what, steps = count(num, "episode"), num * EPISODE_STEPS
        return Work(what, learning + steps / SIMULATED + steps * len(self.cameras) / RENDERED)

    def learning(self, others: Others = NONE) -> tuple[int, Update] | None:
        source = self.source
        return (source.updates, source.update) if isinstance(source, OnlineSource) else None

    def reads(self) -> list[str]:
        source = self.source
        named = (*getattr(source, "stores", ()), getattr(source, "run", None), getattr(source, "checkpoints", None),
                 getattr(source, "until", None))  # fmt: skip
        listed = [path for one in named for path in (one if isinstance(one, tuple) else (one,))]
        return [str(getattr(one, "run", one)) for one in listed if isinstance(one, Path | Reaching)]

    def resolved(self) -> dict[str, Any]:
        """As of every recipe; without `env`, `cameras`, `sim_state` and `source.observe` where there are none, since an
        unfinished store of an earlier version goes on by the digest of its recipe alone."""
        later, plain = ("env", "cameras", "sim_state"), super().resolved()
        plain["source"] = {key: value for key, value in plain["source"].items() if key != "observe" or value}
        return {key: value for key, value in plain.items() if key not in later or value}

    def writes(self) -> list[str]:
        return [str(self.out), str(policies_dir(self.out))]

    def check_built(self, recorded: Any) -> None:
        """Refuse a store whose resolved recipe is not this one: keys that came later have their defaults.

        `out` may differ: a store may have been moved, or be reached by another path.

        Raises:
            CvlctlError: naming the first key that differs.
        """
        now = self.resolved() | {"out": None}
        then = settled(self.with_defaults(recorded), now) | {"out": None} if isinstance(recorded, dict) else {}
        if changed := difference(then, now):
            what = f"{self.out} holds a store of another recipe{f': {changed}' if then else ''}"
            raise CvlctlError(what, "choose another out, or --force to replace it")


class BuildManyRecipe(Strict):
    """`cvlctl build-dataset` of several tasks at once, in worker processes.

    In its file `task` is a list, or metaworld/all; `${task}` stands for each of them, in `out` at least.
    """

    command: ClassVar[str] = "build-dataset"

    processes: Literal["auto"] | Count = "auto"  # auto: one a CPU
    recipes: Annotated[tuple[BuildRecipe, ...], Field(min_length=1)]


def policies_dir(out: Path) -> Path:
    """Where the policies of an online collection into `out` are kept."""
    return out.with_name(out.name.removesuffix(".zarr") + ".policies")


def _is_many(task: Any) -> bool:
    return isinstance(task, list) or (isinstance(task, str) and task.endswith("/all"))


def _several(data: Mapping[str, Any], source: Source, read: Callable[..., Any]) -> BuildManyRecipe:
    """The recipe of every task, each checked by `read`; `data` is one whose `task` is a list or a family."""
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
    filled = expand("", {"task": tasks}, stage, ["build-dataset"], source)
    built = tuple(read(each.body, source) for each in filled)
    return BuildManyRecipe.read({"processes": data.get("processes", "auto"), "recipes": built}, source)


def _family(name: Any) -> list[Any]:
    """metaworld/all: every task of Metaworld; any other name stands for itself."""
    if not isinstance(name, str) or not name.endswith("/all"):
        return [name]
    return [task for task in envs.list_tasks() if task.startswith(name.removesuffix("all"))] or [name]
