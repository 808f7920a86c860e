"""Implicit Q-learning (Kostrikov et al. 2021): values are expectiles of Q over logged actions, and of no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvlctl.data.samplers import Data, Draws
from cvlctl.data.statistics import return_range
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors, values
from cvlctl.learn.losses import policy, td
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics, adam_init, adam_update, value_and_grad
from cvlctl.types import Number, Spec, TransitionBatch, Whole, check_widths

LEARNS_FROM = "rewards"
SEES_BY = "critic"
PASSES = 5
CALLS = 322
RETURN_RANGE = 1000.0  # rewards are scaled so that returns span this much, as in the authors' code for locomotion


@dataclass(frozen=True)
class Config:
    """Symbols of the paper in brackets; the defaults are the paper's for locomotion."""

    __pydantic_config__ = {"extra": "forbid"}

    gamma: Number = 0.99
    expectile: Number = 0.7  # [tau]
    inverse_temperature: Number = 3.0  # [beta] of the advantage's weight, which is cut off at 100
    ema_rate: Number = 0.005  # [alpha]
    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        if not 0 <= self.gamma < 1 or not 0 < self.ema_rate <= 1 or not 0 < self.expectile < 1:
            raise ValueError("gamma must lie in [0, 1), ema_rate in (0, 1] and expectile in (0, 1)")
        if self.inverse_temperature < 0 or self.learning_rate <= 0:
            raise ValueError("inverse_temperature must be at or above 0, and learning_rate above it")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    return Draws(batch_size, config.gamma, transitions=True)


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    """Twin critic with its target, state value `value.*`, actor, and the scale of rewards (E, 1). V sees the critic's
    features.

    Where all returns are alike (one episode; a reward of -1 a step, and no success) they have no range: the authors'
    code divides by zero there, and here rewards stay as they are.
    """
    state = networks.normaliser_of(seeds, data.observation)
    state |= actors.init(config.hidden, spec, seeds) | values.init(config.hidden, spec, seeds)
    value = networks.mlp_init("value", seeds, [spec.observation_shape[0], *config.hidden, 1])
    spread = return_range(data)
    scale = torch.where(spread > 0, RETURN_RANGE / spread, 1.0)
    state["reward_scale"] = scale.cpu().expand(len(seeds), 1).clone()
    return state | value | adam_init(value, "value", value)


def step(config: Config, state: State, batch: TransitionBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """One update of V (Eq. 5), of the actor (Eq. 7), and of Q and its target (Eq. 6)."""
    observation = networks.normalise(state, batch.observation)
    next_observation = networks.normalise(state, batch.next_observation)
    features, following = (values.seen(state, x) for x in (observation, next_observation))
    shown = networks.shown(state, observation, features)
    q = values.q_values(values.target(state), features, batch.action).amin(dim=1)

    def value_loss(params: State) -> tuple[Tensor, Metrics]:
        difference = q - networks.mlp(params, "value", features).squeeze(-1)
        loss = td.expectile(difference, config.expectile).mean(dim=-1)
        return loss.sum(), {"critic/expectile": loss, "advantage": difference}

    grads, metrics = value_and_grad(value_loss, state, [name for name in state if name.startswith("value.")])
    weight = td.advantage_weight(metrics.pop("advantage"), config.inverse_temperature)
    adam_update(state, "value", grads, config.learning_rate)

    def actor_loss(params: State) -> tuple[Tensor, Metrics]:
        mean, log_std = networks.actor(params, shown)
        cloning = policy.behaviour_cloning(policy.log_prob_tanh(mean, log_std, batch.action))
        return (weight * cloning).mean(dim=-1).sum(), {"actor/bc": cloning.mean(dim=-1)}

    metrics |= actors.update(state, actor_loss, config.learning_rate)
    next_value = networks.mlp(state, "value", following).squeeze(-1)
    y = td.td_target(batch.reward * state["reward_scale"], batch.discount, next_value)

    metrics |= values.regress(state, observation, batch.action, y, config.learning_rate, config.ema_rate)
    return state, metrics
