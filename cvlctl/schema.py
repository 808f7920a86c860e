"""What a recipe may say: the models that its keys are checked against. `recipes` reads files into them.

What they find wrong `recipefile.explain` tells with file, line and key, and the nearest legal name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union, get_type_hints

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cvlctl import envs, labellers
from cvlctl.algorithms import ALGORITHMS, ONLINE, occupancy
from cvlctl.errors import CvlctlError
from cvlctl.labellers import LABELLERS

# --- single values


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "")  # pydantic would read true as 1
    return value


def _own_place(path: Path) -> Path:
    if Path.cwd().is_relative_to(path.resolve()):
        raise ValueError("is the current directory, or holds it: choose a place of its own")
    return path


def _bool_as_text(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _known_task(task: str) -> str:
    try:
        envs.check_task(task)
    except CvlctlError as error:
        raise PydanticCustomError("cvlctl", "{what}", {"what": error.what, "hint": error.hint}) from error
    return task


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) != len(seeds):
        raise ValueError("holds a seed twice")
    return seeds


Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_not_bool), Field(ge=0, lt=2**31)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_distinct)]
Rate = Annotated[float, BeforeValidator(_not_bool), Field(gt=0)]
Share = Annotated[float, BeforeValidator(_not_bool), Field(gt=0, le=1)]
PartOf = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, le=1)]
Noise = Annotated[float, BeforeValidator(_not_bool), Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
Out = Annotated[Path, AfterValidator(_own_place)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Steps = Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=10**12)]
Threads = Literal["auto"] | Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=1024)]
Precision = Literal["auto", "float32", "medium", "bf16"]
Compile = Annotated[Literal["auto", "true", "false"], BeforeValidator(_bool_as_text)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# --- build-dataset


class OnlineSource(Strict):
    """An online learner; its replay buffer is the dataset. `steps` are environment steps."""

    title: ClassVar[str]  # in messages

    name: str
    steps: Steps
    hidden: Annotated[tuple[Count, ...], Field(min_length=1)] = (256, 256)
    batch_size: Annotated[Count, Field(ge=2)] = 256
    learning_starts: Annotated[int, BeforeValidator(_not_bool), Field(ge=0)] = 1000  # random actions until here
    random_repeat: Annotated[Count, Field(le=64)] = 1  # frames that each of them is held: pushes instead of trembling
    random_share: PartOf = 0.0  # of the frames after that whose action is random, too
    update_every: Count = 1  # frames
    learning_rate: Rate = 3e-4
    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.99
    policy_every_steps: Count | None = None  # policy checkpoints kept along the way; None: ten of them

    @property
    def config(self) -> Any:
        """The learner's own Config: the source's keys, and its defaults where the source has none."""
        config = ONLINE[self.name].Config
        return config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(config) if hasattr(self, f.name)})

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


def _fields_of(config: Any, besides: Container[str] = ()) -> dict[str, Any]:
    """The fields of a Config as those of a model."""
    hints = get_type_hints(config)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        factory: Any = field.default_factory
        default = field.default if factory is dataclasses.MISSING else Field(default_factory=factory)
        if field.name not in besides:
            fields[field.name] = (hints[field.name], default)
    return fields


if TYPE_CHECKING:
    _Contrastive = ContrastiveSource
else:
    _Contrastive = create_model(
        "contrastive_source",
        __base__=ContrastiveSource,
        **_fields_of(ONLINE["contrastive_ac"].Config, besides=ContrastiveSource.model_fields),
    )


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

    run: Path  # the policies beside a store of `source: {name: sac}` or contrastive_ac
    reaches: Share
    episodes: Count = 10


class PolicySource(_Rollouts):
    """Rolls out checkpoints: `episodes` of each, or by turns until there are `transitions`.

    `seed` names the member of a run of several seeds.
    """

    name: Literal["policy"]
    checkpoints: Annotated[tuple[Path, ...], Field(min_length=1)] | Reaching
    noise: Noise = 0.0
    greedy: bool = False
    seed: Seed = 0


class MixSource(Strict):
    """Rolls out checkpoints of an online collection so that a share `success_rate` of the episodes succeeds.

    Every checkpoint's rate is measured first; the checkpoint of each episode is then chosen by what the episodes so far
    lack, and every episode is kept. It is an error where the share ends further than `tolerance` from the request.
    """

    name: Literal["mix"]
    run: Path  # the policies beside a store of `source: {name: sac}` or contrastive_ac
    success_rate: Annotated[float, BeforeValidator(_not_bool), Field(gt=0, lt=1)]
    episodes: Count
    tolerance: Rate = 0.025
    measured_episodes: Count = 10  # of each checkpoint, not kept


class StoresSource(Strict):
    """Episodes of other stores of the task, one store after the other; `until`: those that were over by that frame."""

    name: Literal["stores"]
    stores: Annotated[tuple[Path, ...], Field(min_length=1)]
    until: Count | Reaching | None = None  # Reaching: the frame at which its checkpoint was taken


class _Computed(Strict):
    """How a job computes: what "auto" becomes is decided when it first starts, and kept with it."""

    device: Device = "auto"
    threads: Threads = "auto"
    precision: Precision = "auto"
    compile: Compile = "auto"
    checkpoint_seconds: Rate = 30.0


class BuildRecipe(_Computed):
    """`cvlctl build-dataset`: a store of episodes of `task`."""

    task: Annotated[str, AfterValidator(_known_task)]
    source: Annotated[
        SacSource | _Contrastive | RandomSource | ScriptedSource | PolicySource | MixSource | StoresSource,
        Field(discriminator="name"),
    ]
    out: Out
    seed: Seed = 0
    horizon: Count | None = None  # episodes are cut off after so many steps; None: the task's own limit

    @model_validator(mode="after")
    def _has_goals(self) -> Self:
        if getattr(self.source, "hindsight", 0) and envs.goals(self.task) is None:
            raise ValueError(f"source.hindsight relabels goals, and {self.task} is told none: gym/Fetch... tasks are")
        return self


class BuildManyRecipe(Strict):
    """`cvlctl build-dataset` of several tasks at once, in worker processes.

    In its file `task` is a list, or metaworld/all; `${task}` stands for each of them, in `out` at least.
    """

    processes: Literal["auto"] | Count = "auto"  # auto: one a CPU
    recipes: Annotated[tuple[BuildRecipe, ...], Field(min_length=1)]


# --- pretrain and finetune


class StoreUse(Strict):
    """A store and what is used of it; a plain path stands for {path: ...}.

    `rewards`: the label to learn from ("given" is the environment's own); "zeros" (UDS); "oril" or "purl", learned from
    success examples; or "none". Pretraining looks at none of them.
    """

    path: Path
    rewards: Name = "given"
    fraction: Share = 1.0  # of the episodes, which keep their label
    rest: Literal["none", "zeros"] = "none"  # what stands for the label of the others
    top: Share = 1.0  # of the episodes, by return under the label: the others are left out altogether

    @property
    def from_store(self) -> bool:
        """Whether the label is one that the store holds."""
        return self.rewards not in ("none", "zeros") and not self.learned

    @property
    def learned(self) -> bool:
        """Whether the label is learned from success examples."""
        return self.rewards in LABELLERS

    def kept(self, episodes: int) -> np.ndarray:
        """(episodes,) bool: which keep their label; the first of a fixed permutation, whatever the seed."""
        flags = np.zeros(episodes, dtype=bool)
        flags[np.random.default_rng(0).permutation(episodes)[: max(1, round(self.fraction * episodes))]] = True
        return flags

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.top < 1 and not self.from_store:
            raise ValueError(f"top: {self.top} ranks episodes by their return, and rewards: {self.rewards} has none")
        return self

    @model_validator(mode="before")
    @classmethod
    def _plain_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class SuccessExamples(Strict):
    """States (X, O) that show success: taken `from` a store by rule, or read from a `file` (.npy, .npz of one array).

    `rule`: "successes" takes the states that the store marks as successful, "last" the last `k` states of each episode.
    """

    from_: Path | None = Field(None, alias="from")
    file: Path | None = None
    rule: Literal["successes", "last"] = "successes"
    num: Count = 200  # how many are drawn, the same for every seed; all of them where there are fewer
    k: Count = 1
    label: Name = "given"

    @model_validator(mode="after")
    def _one_origin(self) -> SuccessExamples:
        if (self.from_ is None) == (self.file is None):
            raise ValueError("needs exactly one of from (a store) and file (.npy or .npz)")
        return self


class _TrainRecipe(_Computed):
    stores: Annotated[tuple[StoreUse, ...], Field(min_length=1)]
    steps: Steps
    seeds: Seeds = (0,)
    checkpoint_every_steps: Count | None = None  # numbered checkpoints are kept: learning curves; None: the last alone
    log_every_steps: Count = 100
    memory_gb: Rate | Literal["auto"] = "auto"  # that data may take, or they are streamed; auto: half of what is free
    out: Out

    @model_validator(mode="after")
    def _out_is_apart(self) -> Self:
        out = self.out.resolve()
        for path in self._inputs():
            there = path.resolve()
            if out.is_relative_to(there) or there.is_relative_to(out):
                raise ValueError(f"out: {self.out} is, holds or lies in {path}, which it reads: choose a place apart")
        return self

    def _inputs(self) -> list[Path]:
        return [store.path for store in self.stores]


class PretrainRecipe(_TrainRecipe):
    """`cvlctl pretrain`: a reward-free occupancy critic."""

    critic: occupancy.Config = Field(default_factory=occupancy.Config)
    batch_size: Annotated[Count, Field(ge=2)] = 1024

    @model_validator(mode="after")
    def _opens_no_label(self) -> Self:
        if any(store.top < 1 for store in self.stores):
            raise ValueError("stores: top ranks episodes by their rewards, and pretraining never sees a reward")
        return self


class AlgorithmUse(Strict):
    """`algorithm: {name: ..., ...}`: the other keys are those of the algorithm's Config. A plain name will do."""

    name: str

    @property
    def config(self) -> Any:
        """The algorithm's own Config; with `init_from` its critic is the default, and the pretrained one counts."""
        config = ALGORITHMS[self.name].Config
        return config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(config)})

    @model_validator(mode="before")
    @classmethod
    def _default_critic(cls, value: Any) -> Any:
        # a critic given in part keeps the algorithm's own defaults (LAEO's loss), not the occupancy module's
        if not isinstance(value, Mapping) or value.get("name") not in ALGORITHMS:
            return value
        own = getattr(ALGORITHMS[value["name"]].Config(), "critic", None)
        given = value.get("critic")
        if own is None or not isinstance(given, Mapping):
            return value
        return {**value, "critic": {**dataclasses.asdict(own), **given}}

    @model_validator(mode="after")
    def _check_config(self) -> AlgorithmUse:
        _ = self.config  # raises ValueError
        return self


def _algorithm_model(name: str) -> type[AlgorithmUse]:
    fields = {"name": (Literal[name], ...), **_fields_of(ALGORITHMS[name].Config)}
    return create_model(f"{name}_algorithm", __base__=AlgorithmUse, **fields)


if TYPE_CHECKING:
    Algorithm = AlgorithmUse
else:
    Algorithm = Annotated[
        Annotated[Union[tuple(map(_algorithm_model, ALGORITHMS))], Field(discriminator="name")],  # noqa: UP007
        BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value),
    ]


class FinetuneRecipe(_TrainRecipe):
    """`cvlctl finetune`: policies. Success examples are left alone by an algorithm that has no use for them."""

    algorithm: Algorithm
    label: Name | None = None  # what the tables call it; None: the algorithm's name
    init_from: Path | None = None  # a pretrained run (of fqe: a policy's): seed k starts from its seed k
    success_examples: SuccessExamples | None = None
    labeller: labellers.Config = Field(default_factory=labellers.Config)  # of rewards: oril or purl
    batch_size: Annotated[Count, Field(ge=2)] = 256

    def _inputs(self) -> list[Path]:
        examples = self.success_examples
        more = [self.init_from, *([examples.from_, examples.file] if examples else [])]
        return [*super()._inputs(), *(path for path in more if path is not None)]

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneRecipe:
        config, name = self.algorithm.config, self.algorithm.name
        learns_from, kinds = ALGORITHMS[name].LEARNS_FROM, {store.rewards for store in self.stores}
        learned = sorted(kinds & set(LABELLERS))
        if learns_from == "examples" and self.success_examples is None:
            raise ValueError(f"algorithm {name} learns from success examples: add success_examples: {{from: STORE}}")
        if learns_from == "rewards" and kinds == {"none"}:
            raise ValueError(f"algorithm {name} needs a store with rewards; all of stores have rewards: none")
        if learned and len(kinds) > 1:
            raise ValueError(f"rewards: {learned[0]} is learned for all stores alike: give it to each of them")
        if learned and self.success_examples is None:
            raise ValueError(f"rewards: {learned[0]} is learned from success examples: add success_examples")
        mode = getattr(config, "mode", "auto")
        if mode in ("continue", "frozen") and self.init_from is None:
            raise ValueError(f"algorithm.mode: {mode} needs init_from, a pretrained run")
        if mode == "scratch" and self.init_from is not None:
            raise ValueError("algorithm.mode: scratch contradicts init_from; leave one of them out")
        if self.init_from is not None and not (hasattr(config, "mode") or hasattr(ALGORITHMS[name], "STARTS_FROM")):
            raise ValueError(f"init_from: algorithm {name} has no critic to start from a pretrained one")
        if self.init_from is not None and "critic" in self.algorithm.model_fields_set:
            raise ValueError("algorithm.critic contradicts init_from: a pretrained critic brings its own settings")
        return self


# --- evaluate


class Confidence(Strict):
    """Stratified bootstrap over runs."""

    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    resamples: Count = 2000
    seed: Seed = 0


class EvaluationGoals(SuccessExamples):
    """States that goal-conditioned policies are sent to, chosen as success examples are: episode i gets state i mod N.

    Success is to come `within` a distance of it in `columns` (None: the policy's own goal columns). Without `within` it
    is the environment's own, which knows nothing of these goals.
    """

    rule: Literal["successes", "last"] = "last"
    num: Count = 50
    columns: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    within: Rate | None = None


class EvaluateRecipe(Strict):
    """`cvlctl evaluate`: episodes of every seed of every run, and tables of their scores."""

    runs: Annotated[tuple[Name, ...], Field(min_length=1)]  # run directories; * ? [] and ** match several
    checkpoints: Literal["last", "all"] = "last"
    episodes: Count = 50
    seed: Seed = 0
    goals: EvaluationGoals | None = None  # None: the environment commands them, or there are none
    horizon: Count | None = None  # episodes are cut off after so many steps; None: the task's own limit
    workers: Literal["auto"] | Annotated[int, BeforeValidator(_not_bool), Field(ge=0)] = "auto"
    device: Device = "cpu"  # cpu: whole episodes in worker processes; cuda: environments in lock-step
    backend: Literal["gymnasium", "envpool"] = "gymnasium"  # envpool: `workers` are its threads; starts of its own
    aggregate: tuple[Literal["iqm", "mean", "median", "optimality_gap"], ...] = ("iqm", "mean", "optimality_gap")
    confidence: Confidence = Confidence()
    baseline: Name | None = None  # of the pairwise differences; None: bc where it is there
    out: Out

    @model_validator(mode="after")
    def _what_envpool_can(self) -> Self:
        if self.backend == "envpool" and self.goals is not None:
            raise ValueError("backend: EnvPool cannot command goals; use backend: gymnasium for them")
        if self.backend == "envpool" and self.device.startswith("cuda"):
            raise ValueError("backend: EnvPool simulates, and policies answer it, on the CPU: leave device out")
        return self
