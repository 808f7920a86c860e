"""What `source` of a recipe of `cvlctl build-dataset` may say: where episodes come from."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, create_model, model_validator

from cvlctl.learn.algorithms import ONLINE
from cvlctl.learn.recipe import encoding
from cvlctl.recipes.estimates import Update, update_of, weights
from cvlctl.recipes.values import Count, Noise, PartOf, Place, Rate, Seed, Share, Steps, Strict, fields_of, not_bool
from cvlctl.types import Flag, Observe


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
    def sees(self) -> Observe | None:
        """What of the cameras it learns from; None: it learns from the vector."""
        return None

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
        seen = encoding(self.sees, 2 * self.batch_size)
        return update_of(self.batch_size * passes * weights(*self.hidden) + seen, calls)

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
    observe: Observe | None = None  # what of the recipe's cameras it learns from; None: from the vector alone

    @property
    def sees(self) -> Observe | None:
        return self.observe

    @property
    def target_max(self) -> float | None:
        """A goal's reward is never positive: without the clip Q of states that are at their goals drifts above 0."""
        return 0.0 if self.hindsight else None

    @model_validator(mode="after")
    def _goals_are_in_vectors(self) -> Self:
        if self.observe is not None and self.hindsight:
            raise ValueError("hindsight relabels goals in vectors, and frames show the goal that was told")
        return self


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
    AnyContrastive = ContrastiveSource
    AnyCvl = CvlSource
else:

    def _with_config(name: str, base: type[OnlineSource]) -> type[OnlineSource]:
        config = ONLINE[name].Config
        model = create_model(f"{name}_source", __base__=base, **fields_of(config, besides=base.model_fields))
        model.described_by = (config,)
        return model

    AnyContrastive, AnyCvl = _with_config("contrastive_ac", ContrastiveSource), _with_config("cvl", CvlSource)


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
