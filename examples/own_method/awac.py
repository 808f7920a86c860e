"""AWAC (Nair et al. 2020): a twin critic of the policy's own actions, and cloning weighted by the advantage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlctl.data.samplers import Data, Draws
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors, values
from cvlctl.learn.losses import policy, td
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics
from cvlctl.types import Number, Spec, TransitionBatch, Whole, check_widths

LEARNS_FROM = "rewards"


@dataclass(frozen=True)
class Config:
    gamma: Number = 0.99
    temperature: Number = 1.0  # [lambda] of the advantage in the cloning weight
    ema_rate: Number = 0.005
    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        if self.temperature <= 0:
            raise ValueError("temperature must be above 0")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    noise = tuple((name, (batch_size, spec.action_dim)) for name in ("action", "next_action"))
    return Draws(batch_size, config.gamma, transitions=True, noise=noise)


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    state = networks.normaliser_of(seeds, data.observation)
    return state | actors.init(config.hidden, spec, seeds) | values.init(config.hidden, spec, seeds)


def step(config: Config, state: State, batch: TransitionBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    observation = networks.normalise(state, batch.observation)
    next_observation = networks.normalise(state, batch.next_observation)
    with torch.no_grad():
        following, _ = policy.sample_tanh(*networks.actor(state, next_observation), noise["next_action"])
        next_q = values.q_values(values.target(state), next_observation, following).amin(dim=1)
        y = td.td_target(batch.reward, batch.discount, next_q)
    metrics = values.regress(state, observation, batch.action, y, config.learning_rate, config.ema_rate)
    with torch.no_grad():
        drawn, _ = policy.sample_tanh(*networks.actor(state, observation), noise["action"])
        q = values.q_values(state, observation, batch.action).amin(dim=1)
        advantage = q - values.q_values(state, observation, drawn).amin(dim=1)
        weight = torch.softmax(advantage / config.temperature, dim=-1) * advantage.shape[-1]

    def loss(params: State) -> tuple[Tensor, Metrics]:
        cloning = -policy.log_prob_tanh(*networks.actor(params, observation), batch.action)
        return (weight * cloning).mean(dim=-1).sum(), {"actor/bc": cloning.mean(dim=-1)}

    return state, metrics | actors.update(state, loss, config.learning_rate)
