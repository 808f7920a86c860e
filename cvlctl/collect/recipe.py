"""What a recipe of `cvlctl build-dataset` may say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, create_model, model_validator

from cvlctl.errors import CvlctlError
from cvlctl.learn.algorithms import ONLINE
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
    update_of,
    weights,
)
from cvlctl.recipes.matrix import expand
from cvlctl.recipes.values import (
    NONE,
    Computed,
    Count,
    Noise,
    Others,
    Out,
    PartOf,
    Place,
    Rate,
    Seed,
    Share,
    Steps,
    Strict,
    checked,
    fields_of,
    not_bool,
)
from cvlctl.recipes.yamlfile import Source, shown
from cvlctl.recipes.yamltext import Key
from cvlctl.runs import difference, settled
from cvlctl.types import Flag


def _known_task(task: str) -> str:
    envs.check_task(task)
    return task


class OnlineSource(Strict):
    """An online learner; its replay buffer is the dataset. `steps` are environment steps."""

    title: ClassVar[str]  # in messages

    name: str
    steps: Steps  # of the environment
    hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (256, 256)
    batch_size: Annotated[Count, Field(ge=2)] = 256
    learning_starts: Annotated[int, BeforeValidator(not_bool), Field(ge=0)] = 1000  # random actions until here
    random_repeat: Annotated[Count, Field(le=64)] = 1  # frames that each of them is held: pushes instead of trembling
    random_share: PartOf = 0.0  # of the frames after that whose action is random, too
    update_every: Count = 1  # frames
    learning_rate: Rate = 3e-4
    gamma: Annotated[float, BeforeValidator(not_bool), Field(ge=0, lt=1)] = 0.99
    policy_every_steps: Count | None = None  # policy checkpoints kept along the way; None: ten of them

    @property
    def config(self) -> Any:
        """The learner's own Config: the source's keys, and its defaults where the source has none."""
        config = ONLINE[self.name].Config
        return config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(config) if hasattr(self, f.name)})

    @property
    def updates(self) -> int:
        """How many there will be."""
        return max(0, self.steps - self.learning_starts) // self.update_every

    @property
    def update(self) -> Update:
        """What one of them is."""
        module = ONLINE[self.name]
        # without the gate there are the critics, their targets and the actor alone
        passes, calls = (
            (5, module.CALLS // 2) if getattr(self, "gate", None) == "none" else (module.PASSES, module.CALLS)
        )
        return update_of(self.batch_size * passes * weights(*self.hidden), calls)

    @model_validator(mode="after")
    def _check_config(self) -> Self:
        _ = self.config  # raises ValueError
        return self


class SacSource(OnlineSource):
    """Soft actor-critic."""

    title: ClassVar[str] = "SAC"

    name: Literal["sac"]
    ema_rate: Share = 0.005  # of the target critic
    hindsight: PartOf = 0.0  # of a batch's goals are relabelled (HER)

    @property
    def target_max(self) -> float | None:
        """A goal's reward is never positive: without the clip Q of states that are at their goals drifts above 0."""
        return 0.0 if self.hindsight else None


class ContrastiveSource(OnlineSource):
    """Contrastive actor-critic, or with `gate: none` TD3: a deterministic policy, collected with Gaussian noise on it.

    The other keys are those of the algorithm's Config.
    """

    title: ClassVar[str] = "contrastive actor-critic"

    name: Literal["contrastive_ac"]
    exploration_noise: Noise = 0.1  # standard deviation


class CvlSource(OnlineSource):
    """CVL online: SAC's actor, on a Q that is read from a critic of its own occupancy.

    The other keys are those of the algorithm's Config.
    """

    title: ClassVar[str] = "CVL"

    name: Literal["cvl"]


if TYPE_CHECKING:
    _Contrastive = ContrastiveSource
    _Cvl = CvlSource
else:

    def _with_config(name: str, base: type[OnlineSource]) -> type[OnlineSource]:
        config = ONLINE[name].Config
        model = create_model(f"{name}_source", __base__=base, **fields_of(config, besides=base.model_fields))
        model.described_by = (config,)
        return model

    _Contrastive, _Cvl = _with_config("contrastive_ac", ContrastiveSource), _with_config("cvl", CvlSource)


class _Rollouts(Strict):
    """How much a source rolls out: so many episodes, or whole episodes until there are so many transitions."""

    episodes: Count | None = None
    transitions: Count | None = None
    backend: Literal["gymnasium", "envpool"] = "gymnasium"  # what simulates: see docs/datasets.md on their differences

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if (self.episodes is None) == (self.transitions is None):
            raise ValueError("needs exactly one of episodes and transitions")
        return self


class RandomSource(_Rollouts):
    """Uniformly random actions."""

    name: Literal["random"]


class ScriptedSource(_Rollouts):
    """Metaworld's own experts, with Gaussian noise of standard deviation `noise` on their actions."""

    name: Literal["scripted"]
    noise: Noise = 0.0


class Reaching(Strict):
    """A checkpoint of an online collection: the first with a mean return of at least `reaches` times that of the last.

    Each is measured over `episodes` episodes of sampled actions, whose starts are apart from those of any collection.
    """

    run: Place  # the policies beside a store of `source: {name: sac}`, contrastive_ac or cvl
    reaches: Share  # of the last return
    episodes: Count = 10


class PolicySource(_Rollouts):
    """Rolls out checkpoints: `episodes` of each, or by turns until there are `transitions`.

    `seed` names the member of a run of several seeds.
    """

    name: Literal["policy"]
    checkpoints: Annotated[tuple[Place, ...], Field(min_length=1)] | Reaching  # files, or one of an online collection
    noise: Noise = 0.0
    greedy: Flag = False  # the most likely action, not a drawn one
    seed: Seed = 0  # of the run whose policy it is


class MixSource(Strict):
    """Rolls out checkpoints of an online collection so that a share `success_rate` of the episodes succeeds.

    Every checkpoint's rate is measured first; the checkpoint of each episode is then chosen by what the episodes so far
    lack, and every episode is kept. It is an error where the share ends further than `tolerance` from the request.
    """

    name: Literal["mix"]
    run: Place  # the policies beside a store of `source: {name: sac}`, contrastive_ac or cvl
    success_rate: Annotated[float, BeforeValidator(not_bool), Field(gt=0, lt=1)]  # share of episodes that succeed
    episodes: Count
    tolerance: Rate = 0.025  # how far from it the share may end
    measured_episodes: Count = 10  # of each checkpoint, not kept


class StoresSource(Strict):
    """Episodes of other stores of the task, one store after the other; `until`: those that were over by that frame."""

    name: Literal["stores"]
    stores: Annotated[tuple[Place, ...], Field(min_length=1)]
    until: Count | Reaching | None = None  # Reaching: the frame at which its checkpoint was taken


class BuildRecipe(Computed):
    """`cvlctl build-dataset`: a store of episodes of `task`."""

    command: ClassVar[str] = "build-dataset"
    few_threads: ClassVar[str | None] = (
        "auto: a step this small gains a third from a second, and loses far more to others"
    )

    task: Annotated[str, AfterValidator(checked(_known_task))]  # one, a list of them, or all of a family: metaworld/all
    source: Annotated[
        SacSource | _Contrastive | _Cvl | RandomSource | ScriptedSource | PolicySource | MixSource | StoresSource,
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
        """As of every recipe; without `env`, `cameras` and `sim_state` where there are none, since an unfinished store
        of an earlier version goes on by the digest of its recipe alone."""
        later = ("env", "cameras", "sim_state")
        return {key: value for key, value in super().resolved().items() if key not in later or value}

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
