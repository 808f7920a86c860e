"""Conservative Q-learning (Kumar et al. 2020), CQL(H) with a fixed weight: SAC whose critic pays for high values of
actions that nobody took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cvlctl.data.samplers import Data, Draws
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors, values
from cvlctl.learn.losses import policy, td
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics
from cvlctl.types import Number, Observation, Spec, TransitionBatch, Whole, check_widths

LEARNS_FROM = "rewards"
SEES_BY = "critic"
PASSES = 8
PASSES_AN_ACTION = 6  # two critics, three kinds
CALLS = 540


@dataclass(frozen=True)
class Config:
    """Symbols of the paper in brackets; the defaults are those of its Gym experiments."""

    __pydantic_config__ = {"extra": "forbid"}

    gamma: Number = 0.99
    conservative_weight: Number = 5.0  # [alpha]
    num_actions: Whole = 10  # of each of three kinds: uniform, of pi(s), of pi(s')
    backup: Literal["mean", "sample"] = "mean"  # a' of the target: tanh of the mean, or drawn, as in the authors' code
    ema_rate: Number = 0.005
    target_entropy: Number | None = None  # None: minus the number of action dimensions
    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4  # of the critic
    actor_learning_rate: Number = 1e-4  # and of the temperature

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        if not 0 <= self.gamma < 1 or not 0 < self.ema_rate <= 1:
            raise ValueError("gamma must lie in [0, 1) and ema_rate in (0, 1]")
        if self.conservative_weight < 0 or self.num_actions < 1:
            raise ValueError("conservative_weight must be at or above 0 and num_actions at least 1")
        if min(self.learning_rate, self.actor_learning_rate) <= 0:
            raise ValueError("learning_rate and actor_learning_rate must be above 0")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    one, many = (batch_size, spec.action_dim), (batch_size, config.num_actions, spec.action_dim)
    kinds = {"action": one, "uniform": many, "now": many, "next": many}
    if config.backup == "sample":
        kinds["next_action"] = one
    return Draws(batch_size, config.gamma, transitions=True, noise=tuple(kinds.items()))


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    """As SAC's, with the observations' statistics."""
    state = networks.normaliser_of(seeds, data.observation)
    state |= actors.init(config.hidden, spec, seeds) | values.init(config.hidden, spec, seeds)
    return state | actors.temperature_init(seeds, 1.0)


def sampled_actions(
    state: State, observation: Observation, next_observation: Observation, noise: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Uniform actions, actions of pi(s) and of pi(s'), (E, B, 3K, A), and their log densities (E, B, 3K).

    All are evaluated at s, as in the authors' code: pi(s') is one more proposal.
    """
    # the normal distribution function makes uniform numbers of Gaussian ones, so that one kind of noise serves all
    uniform = torch.special.ndtr(noise["uniform"]) * 2 - 1
    density = torch.full(uniform.shape[:-1], -uniform.shape[-1] * math.log(2.0), device=uniform.device)
    actions, densities = [uniform], [density]
    for where, name in ((observation, "now"), (next_observation, "next")):
        mean, log_std = networks.actor(state, where)
        action, log_prob = policy.sample_tanh(mean.unsqueeze(2), log_std.unsqueeze(2), noise[name])
        actions.append(action)
        densities.append(log_prob)
    return torch.cat(actions, dim=2), torch.cat(densities, dim=2)


def step(config: Config, state: State, batch: TransitionBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """One update of critic (CQL Eq. 4) and target, actor and temperature."""
    observation = networks.normalise(state, batch.observation)
    next_observation = networks.normalise(state, batch.next_observation)
    features, following = (values.seen(state, x) for x in (observation, next_observation))
    shown, shown_next = networks.shown(state, observation, features), networks.shown(state, next_observation, following)
    mean, log_std = networks.actor(state, shown_next)
    next_action = torch.tanh(mean)
    if config.backup == "sample":
        next_action, _ = policy.sample_tanh(mean, log_std, noise["next_action"])
    next_q = values.q_values(values.target(state), following, next_action).amin(dim=1)
    y = td.td_target(batch.reward, batch.discount, next_q)  # without entropy, as in the authors' code
    actions, densities = sampled_actions(state, shown, shown_next, noise)

    def critic_loss(params: State) -> tuple[Tensor, Metrics]:
        seen = networks.see(params, "critic", observation)
        q = values.q_values(params, seen, batch.action)
        error = td.squared_td_error(q, y).mean(dim=-1).sum(dim=-1)
        many = values.q_values_of_many(params, seen, actions)
        penalty = td.conservative_penalty(many, densities, q).mean(dim=-1).sum(dim=-1)
        total = error + config.conservative_weight * penalty
        return total.sum(), {"critic/td": error, "critic/penalty": penalty, "critic/q": q.mean(dim=(1, 2))}

    metrics = values.update(state, critic_loss, config.learning_rate, config.ema_rate)

    def q(action: Tensor) -> Tensor:
        return values.q_values(state, features, action).amin(dim=1)

    rate = config.actor_learning_rate
    metrics |= actors.improve_soft(state, shown, noise["action"], q, config.target_entropy, rate)
    return state, metrics
