"""Behaviour cloning by likelihood: the baseline that asks nothing but actions (CVL Eq. 14 alone)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cvlctl.data.samplers import Data, Draws
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors
from cvlctl.learn.losses import policy
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics
from cvlctl.types import Number, OccupancyBatch, Spec, Whole, check_widths

LEARNS_FROM = "actions"
SEES_BY = "actor"
CALLS = 118


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = {"extra": "forbid"}

    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        if self.learning_rate <= 0:
            raise ValueError("learning_rate must be above 0")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    return Draws(batch_size)


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    normaliser = networks.normaliser_of(seeds, data.observation)
    return normaliser | actors.init(config.hidden, spec, seeds)


def step(config: Config, state: State, batch: OccupancyBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """One update of the actor."""
    observation = networks.normalise(state, batch.observation)

    def loss(params: State) -> tuple[Tensor, Metrics]:
        mean, log_std = networks.actor(params, observation)
        cloning = policy.behaviour_cloning(policy.log_prob_tanh(mean, log_std, batch.action)).mean(dim=-1)
        return cloning.sum(), {"actor/bc": cloning}

    return state, actors.update(state, loss, config.learning_rate)
