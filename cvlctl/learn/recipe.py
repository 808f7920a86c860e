"""What recipes of `cvlctl pretrain` and `cvlctl finetune` may say."""

from __future__ import annotations

import dataclasses
import os
from abc import abstractmethod
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union

from pydantic import (
    BeforeValidator,
    Field,
    PydanticUserError,
    create_model,
    model_validator,
)

from cvlctl.data.recipe import StoreUse, SuccessExamples
from cvlctl.errors import CvlctlError
from cvlctl.learn import labellers, methods
from cvlctl.learn.algorithms import ALGORITHMS, occupancy
from cvlctl.learn.labellers import LABELLERS
from cvlctl.recipes.estimates import Update, Work, count, training_seconds, update_of, weights
from cvlctl.recipes.values import NONE, Computed, Count, Name, Others, Out, Place, Rate, Seeds, Steps, Strict, fields_of
from cvlctl.recipes.yamlfile import Source
from cvlctl.recipes.yamltext import Key
from cvlctl.types import Observe

CALLS = 200  # of PyTorch in an update of a method that does not say: for estimates of time
# a frame of 64x64 through an encoder, as weights of networks: a plan does not open stores, and convolutions are half as
# fast as products
ENCODING = {"small": 7e6, "drq": 42e6, "impala": 60e6}
HELD_OUT_BATCHES = 4  # batches that held-out losses are the mean of


def encoding(observe: Observe | None, frames: float) -> float:
    """What so many frames of each camera that is seen take to encode, as weights of networks."""
    return 0.0 if observe is None else frames * len(observe.cameras) * ENCODING[observe.encoder]


def _critic_weights(critic: occupancy.Config) -> int:
    """Of one of its two encoders."""
    return (1 + critic.twin) * weights(*critic.hidden, critic.latent_dim)


NEXT_CALLS = 92  # of PyTorch, for targets; about as many for a policy that is cloned


def _critic_update(critic: occupancy.Config, cloned: bool) -> tuple[int, int]:
    """Passes of a batch through an encoder, and calls of PyTorch beyond those that every critic makes. A td_ loss asks
    its targets too, and clones the data's policy where no other policy's actions are put at the next states."""
    if not occupancy.by_next(critic):
        return 2, 0
    return (4, 2 * NEXT_CALLS) if cloned else (3, NEXT_CALLS)


class _TrainRecipe(Computed):
    stores: Annotated[tuple[StoreUse, ...], Field(min_length=1)]
    # what of the stores' cameras is seen; none: what the run of init_from saw, or else the vector alone
    observe: Observe | None = None
    steps: Steps
    seeds: Seeds = (0,)
    checkpoint_every_steps: Count | None = None  # numbered checkpoints are kept: learning curves; None: the last alone
    log_every_steps: Count = 100
    validation: Annotated[float, Field(ge=0, le=0.5)] = 0  # share of the episodes held out; their losses are logged too
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # beside metrics.jsonl, which is always there
    memory_gb: Rate | Literal["auto"] = "auto"  # that data may take, or they are streamed; auto: half of what is free
    out: Out

    @model_validator(mode="after")
    def _out_is_apart(self) -> Self:
        out = os.path.realpath(self.out)
        for path in self.inputs():
            there = os.path.realpath(path)
            if os.path.commonpath((out, there)) in (out, there):
                raise ValueError(f"out: {self.out} is, holds or lies in {path}, which it reads: choose a place apart")
        return self

    def begun(self, critic: Any, start: Path | None, others: Others) -> tuple[Self, Any]:
        """It and its critic as they begin, where `others` hold the recipe of the run `start`."""
        other = None if start is None else others.get(start)
        observe = self.observe or getattr(other, "observe", None)
        return self.model_copy(update={"observe": observe}), getattr(other, "critic", critic)

    @abstractmethod
    def learning(self, others: Others = NONE) -> tuple[int, Update]:
        """How many updates, and what one of them is."""

    def inputs(self) -> list[Path]:
        """Stores, runs and files that it reads."""
        return [store.path for store in self.stores]

    def reads(self) -> list[str]:
        return [str(path) for path in self.inputs()]

    def work(self, others: Others = NONE) -> Work:
        """How much there is to do; `others` are the recipes of an experiment, which may
        pretrain the critic."""
        size = f"{count(self.steps, 'step')} x {count(len(self.seeds), 'seed')}"
        steps, update = self.learning(others)
        more = HELD_OUT_BATCHES * (steps // self.log_every_steps) if self.validation else 0
        return Work(size, training_seconds(steps + more, update, self.num_threads, self.compile))


class PretrainRecipe(_TrainRecipe):
    """`cvlctl pretrain`: a reward-free occupancy critic."""

    command: ClassVar[str] = "pretrain"

    critic: occupancy.Config = Field(default_factory=occupancy.Config)  # f(s, a, s+) = phi(s, a) . psi(s+)
    init_from: Place | None = None  # a run whose critic goes on here, seed k's from seed k's: on more data, say
    # whose occupancy a td_ loss learns: that of a finished run's policy (seed k's by seed k), or the data's own
    policy: Literal["data"] | Place = "data"
    batch_size: Annotated[Count, Field(ge=2)] = 1024

    def resolved(self) -> dict[str, Any]:
        plain = super().resolved()
        if self.init_from is not None:
            plain.pop("critic", None)  # the other run's counts
        return plain

    def inputs(self) -> list[Path]:
        return [*super().inputs(), *(run for run in (self.init_from, self.policy_run) if run is not None)]

    @property
    def policy_run(self) -> Path | None:
        """The run whose policy's occupancy is learned; None: the data's."""
        return None if self.policy == "data" else Path(self.policy)

    def learning(self, others: Others = NONE) -> tuple[int, Update]:
        begun, critic = self.begun(self.critic, self.init_from, others)
        return self.steps, begun.update(critic)

    def update(self, critic: Any) -> Update:
        """What an update of this critic is."""
        passes, calls = _critic_update(critic, cloned=self.policy == "data")
        work = self.batch_size * passes * _critic_weights(critic) + encoding(self.observe, 2 * self.batch_size)
        return update_of(len(self.seeds) * work, occupancy.CALLS + calls)

    @model_validator(mode="after")
    def _opens_no_label(self) -> Self:
        if any(store.top < 1 for store in self.stores):
            raise ValueError("stores: top ranks episodes by their rewards, and pretraining never sees a reward")
        if self.init_from is not None and "critic" in self.model_fields_set:
            raise ValueError("critic contradicts init_from: a pretrained critic brings its own settings")
        if self.policy != "data" and self.init_from is not None:
            raise ValueError("policy contradicts init_from: a critic of another policy's occupancy begins anew")
        if self.policy != "data" and not occupancy.by_next(self.critic):
            raise ValueError(
                f"policy: {self.policy} needs a critic of a td_ loss; {self.critic.loss} knows the data's policy alone"
            )
        return self


class AlgorithmUse(Strict):
    """`algorithm: {name: ..., ...}`: the other keys are those of the algorithm's Config. A plain name will do."""

    name: str

    @cached_property
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
        own, given = _critic_of(ALGORITHMS[value["name"]].Config), value.get("critic")
        return {**value, "critic": {**own, **given}} if own and isinstance(given, Mapping) else value

    @model_validator(mode="after")
    def _check_config(self) -> AlgorithmUse:
        _ = self.config  # raises ValueError
        return self


@cache
def _critic_of(config: type) -> dict[str, Any]:
    """The critic that a method has where nothing is said; nothing where it has none."""
    own = getattr(config(), "critic", None)
    return {} if own is None else dataclasses.asdict(own)


def _algorithm_model(name: str) -> type[AlgorithmUse]:
    fields = {"name": (Literal[name], ...), **fields_of(ALGORITHMS[name].Config)}
    model = create_model(f"{name}_algorithm", __base__=AlgorithmUse, **fields)
    model.described_by = (ALGORITHMS[name].Config,)
    return model


def check_critic(critic: occupancy.Config, name: str, config: Any) -> None:
    """Raise a ValueError where a method cannot work with a critic of this loss."""
    iterated = getattr(config, "improvement", "") == "iterated"
    if iterated and not occupancy.by_next(critic):
        raise ValueError(f"improvement: iterated needs a critic of a td_ loss, and this one's is {critic.loss}")
    if occupancy.by_next(critic) and not hasattr(config, "improvement"):
        raise ValueError(f"algorithm {name} draws whole futures, which loss: {critic.loss} knows none of")


def _plain_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


if TYPE_CHECKING:
    Algorithm = AlgorithmUse
else:
    _BY_NAME = Annotated[Union[tuple(map(_algorithm_model, ALGORITHMS))], Field(discriminator="name")]  # noqa: UP007
    Algorithm = Annotated[
        _BY_NAME,
        BeforeValidator(_plain_name, json_schema_input_type=Union[str, _BY_NAME]),  # noqa: UP007
    ]


class FinetuneRecipe(_TrainRecipe):
    """`cvlctl finetune`: policies. Success examples are left alone by an algorithm that has no use for them."""

    command: ClassVar[str] = "finetune"

    algorithm: Algorithm  # a name, or {name: ..., its own keys}
    label: Name | None = None  # what the tables call it; None: the algorithm's name
    init_from: Place | None = None  # a pretrained run (of fqe: a policy's): seed k starts from its seed k
    success_examples: SuccessExamples | None = None  # of LAEO, and of rewards that are learned (oril, purl)
    labeller: labellers.Config = Field(default_factory=labellers.Config)  # of rewards: oril or purl
    batch_size: Annotated[Count, Field(ge=2)] = 256

    @classmethod
    def read(cls, data: Any, source: Source, prefix: Key = ()) -> Any:
        """As of every recipe; a method from outside that it names is imported."""
        named = data.get("algorithm") if isinstance(data, Mapping) else None
        name = named.get("name") if isinstance(named, Mapping) else named
        if cls is not FinetuneRecipe or not methods.is_outside(name):
            return super().read(data, source, prefix)
        try:
            model = _with(str(name))
            with methods.blamed(str(name)):
                return model.read(data, source, prefix)
        except CvlctlError as error:
            at = source.where((*prefix, "algorithm"))
            raise CvlctlError(
                f"{at}: {error.what}" if error.what.startswith("algorithm ") else error.what, error.hint
            ) from error

    def resolved(self) -> dict[str, Any]:
        plain = super().resolved()
        if self.init_from is not None:
            plain["algorithm"].pop("critic", None)  # the pretrained run's counts
        return plain

    @property
    def sees(self) -> Observe | None:
        """What is seen of cameras, and by what; a method without a critic learns the actor's own encoder."""
        if self.observe is None:
            return None
        by = getattr(ALGORITHMS[self.algorithm.name], "SEES_BY", None)
        if by is None:  # of `init_from`: what the recipe itself says was checked as it was read
            what = f"init_from: {self.init_from} saw frames, and algorithm {self.algorithm.name} learns from vectors"
            raise CvlctlError(what, "name a run that sees the vector alone")
        if by != "actor":
            return self.observe
        return dataclasses.replace(self.observe, actor_encoder="own")

    def learning(self, others: Others = NONE) -> tuple[int, Update]:
        begun, critic = self.begun(getattr(self.algorithm.config, "critic", None), self.init_from, others)
        return self.steps, begun.update(critic)

    def update(self, critic: Any) -> Update:
        """What an update is with this critic, or None."""
        config, method = self.algorithm.config, ALGORITHMS[self.algorithm.name]
        actions = getattr(config, "num_actions", 1)
        passes = getattr(method, "PASSES", 1) + actions * getattr(method, "PASSES_AN_ACTION", 0)
        work: float = self.batch_size * passes * weights(*getattr(config, "hidden", (256, 256)))
        calls = getattr(method, "CALLS", CALLS)
        frozen, bank = critic is not None and getattr(config, "mode", "auto") == "frozen", 0
        if critic is not None:
            bank = getattr(config, "bank_size", 0) + getattr(config, "num_examples", 0)  # through psi
            learned = 0
            if not frozen:
                learned, more = _critic_update(critic, cloned=getattr(config, "improvement", "one_step") == "one_step")
                calls += more
            work += (bank / 3 + (learned + actions) * self.batch_size) * _critic_weights(critic)
        if not frozen:  # whose features are computed once
            pairs = 1 if method.LEARNS_FROM == "actions" and critic is None else 2  # a state, and one that follows it
            work += encoding(self.observe, pairs * self.batch_size + bank / 3)
        return update_of(len(self.seeds) * work, calls)

    def inputs(self) -> list[Path]:
        examples = self.success_examples
        more = [self.init_from, *([examples.from_, examples.file] if examples else [])]
        return [*super().inputs(), *(path for path in more if path is not None)]

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneRecipe:
        config, name = self.algorithm.config, self.algorithm.name
        if self.observe is not None and not hasattr(ALGORITHMS[name], "SEES_BY"):
            raise ValueError(f"observe: algorithm {name} learns from vectors alone; leave observe out")
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
        own = getattr(config, "critic", None)
        if self.init_from is None and own is not None:
            check_critic(own, name, config)
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


@cache
def _with(name: str) -> type[FinetuneRecipe]:
    """Recipes whose algorithm is a method from outside."""
    methods.load(name)
    try:
        own: Any = Annotated[_algorithm_model(name), BeforeValidator(_plain_name)]
        return create_model("FinetuneRecipe", __base__=FinetuneRecipe, algorithm=(own, ...))
    except (TypeError, NameError, PydanticUserError) as error:
        raise CvlctlError(
            f"algorithm {name}: its Config cannot be read from a recipe: {error}",
            "give its fields plain types: numbers, text, tuples of them, Literal",
        ) from error
