"""Contrastive goal-conditioned RL (Eysenbach et al., NeurIPS 2022): pi(a | s, g) from trajectories alone.

The policy that collected the data has Q(s, a, g) = p(s+ = g | s, a) for the reward (1 - gamma) p(s' = g | s, a), and
the occupancy critic knows it: f(s, a, g) = phi(s, a) . psi(g) = log Q(s, a, g) - log p(g) at the optimum of binary NCE.
So argmax_a f = argmax_a Q, and the actor maximises f as it is. InfoNCE's optimum is log Q - log p(g) + c(s, a) with any
c: the same argmax only where the partition penalty (its log-mean form) holds c at 0; with `partition_coefficient: 0` f
does not rank actions. The Q is that of the data's policy, whatever goals it was after: one step of policy improvement.
With a critic of a td_ loss and `improvement: iterated` it is that of the policy in the making, told another goal at
each step: of the random-goal policy sum_g pi(a | s, g) p(g).

Goals are states of the store: the columns `critic.future_columns` of one (None: all). With `critic.command_columns` the
observation has a place in which the environment states its goal: the actor's goal stands there, in training a state
reached, and the policy is an ordinary one. Without, the actor sees the observation followed by the goal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from cvlctl.data.samplers import Data, Draws
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors, occupancy
from cvlctl.learn.losses import policy
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics
from cvlctl.types import Number, Observation, OccupancyBatch, Spec, Whole, check_widths

LEARNS_FROM = "actions"
SEES_BY = "phi"
CALLS = 360


@dataclass(frozen=True)
class Config:
    """Columns of goals and commands belong to the critic: a pretrained one brings its own."""

    __pydantic_config__ = {"extra": "forbid"}

    critic: occupancy.Config = field(default_factory=occupancy.binary_nce)  # from scratch; else the pretrained run's
    mode: Literal["auto", "scratch", "continue", "frozen"] = "auto"  # auto: continue with init_from, else scratch
    # iterated: Q is of the policy that is being made, told goals at random; needs a critic of a td_ loss
    improvement: Literal["one_step", "iterated"] = "one_step"
    random_goals: Number = 0.5  # share of the actor's goals that are other pairs' futures; the rest are the pair's own
    bc_coefficient: Number = 0.05  # of cloning the pair's action for its own future as goal; 1 for f over its mean |f|
    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        occupancy.check_improvement(self.improvement, self.mode)
        if not 0 <= self.random_goals < 1:
            raise ValueError("random_goals must lie in [0, 1): cloning needs pairs with their own future")
        if self.bc_coefficient < 0 or self.learning_rate <= 0:
            raise ValueError("bc_coefficient must be at or above 0, and learning_rate above it")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    train_critic = config.mode != "frozen"
    following = occupancy.following_noise(config.critic, spec, batch_size, config.improvement) if train_critic else ()
    return Draws(
        batch_size, **occupancy.law(config.critic), futures=True, own_futures=occupancy.by_next(config.critic),
        noise=(("action", (batch_size, spec.action_dim)), *following),
    )  # fmt: skip


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    """The critic's state and the actor's, which sees the observation followed by the goal unless there is a command."""
    (width,) = spec.observation_shape
    if not config.critic.command_columns:
        columns = config.critic.future_columns
        width += width if columns is None else len(columns)
    sees = replace(spec, observation_shape=(width,))
    return occupancy.init(config.critic, spec, seeds, data) | actors.init(config.hidden, sees, seeds)


def goals(future: Tensor, num_random: int) -> Tensor:
    """Of futures (E, B, ...) the first `num_random` are other pairs': drawn from the marginal p(s+)."""
    return torch.cat([future.roll(1, dims=1)[:, :num_random], future[:, num_random:]], dim=1)


def command(config: Config, observation: Tensor, goal: Tensor) -> Tensor:
    """What the actor sees: observations (..., O) with goals (..., G), both *normalised*."""
    columns = config.critic.command_columns
    if not columns:
        return torch.cat([observation, goal], dim=-1)
    commanded = observation.clone()
    for i, column in enumerate(columns):
        commanded[..., column] = goal[..., i]
    return commanded


def f(config: Config, state: State, observation: Tensor, action: Tensor, psi: Tensor) -> Tensor:
    """log Q(s, a, g) - log p(g), row by row: *normalised* (E, B, O), (E, B, A), psi (E, B, latent) -> (E, B).

    Of a twin critic, whose psi is (E, 2, B, latent), the smaller.
    """
    value = (occupancy.phi(config.critic, state, observation, action) * psi).sum(dim=-1)
    return value.amin(dim=1) if config.critic.twin else value


def _told(
    config: Config, state: State, observation: Observation, goal: Observation
) -> tuple[Observation, Observation, Tensor]:
    """What the actor is shown of observations and of goals, and what phi sees of the former. No gradient."""
    observation, goal = networks.normalise(state, observation), networks.normalise(state, goal)
    features = occupancy.seen(state, observation)
    told = networks.shown(state, goal, occupancy.goal_seen(config.critic, state, goal))
    return networks.shown(state, observation, features), told, features


def _policy(config: Config, params: State, shown: Observation, told: Observation) -> tuple[Tensor, Tensor]:
    """Mean and log std (E, B, A) before the tanh."""
    seen, goal = networks.see(params, "actor", shown), networks.see(params, "actor", told)
    return networks.actor(params, command(config, seen, occupancy.goal_of(config.critic, goal)))


def step(config: Config, state: State, batch: OccupancyBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """Update the critic (unless frozen), then the actor on E[-f(s, a ~ pi(s, g), g) / mean |f|] + BC."""
    metrics: Metrics = {}
    size = batch.action.shape[1]
    reached = batch.bank_observation if occupancy.by_next(config.critic) else batch.future_observation
    if config.improvement == "iterated":
        any_goal = tree_map(lambda x: goals(x, size), reached)
        with torch.no_grad():
            *told, _ = _told(config, state, batch.future_observation, any_goal)
            following, _ = policy.sample_tanh(*_policy(config, state, *told), noise["next_action"])
        batch, noise = occupancy.of_policy(batch, following), {"action": noise["action"]}
    if config.mode != "frozen":
        state, metrics = occupancy.step(config.critic, state, batch, noise)
    num_random = int(config.random_goals * size)
    future = tree_map(lambda x: goals(x, num_random), reached)
    psi = occupancy.bank_psi(config.critic, state, future)
    shown, goal, features = _told(config, state, batch.observation, future)

    def loss(params: State) -> tuple[Tensor, Metrics]:
        mean, log_std = _policy(config, params, shown, goal)
        action, log_prob = policy.sample_tanh(mean, log_std, noise["action"])
        value = f(config, state, features, action, psi)
        scale = value.detach().abs().mean(dim=-1) + 1e-8
        own = slice(num_random, None)
        likelihood = policy.log_prob_tanh(mean[:, own], log_std[:, own], batch.action[:, own])
        cloning = policy.behaviour_cloning(likelihood).mean(dim=-1)
        total = -value.mean(dim=-1) / scale + config.bc_coefficient * cloning
        metrics = {"actor/f": value.mean(dim=-1), "actor/bc": cloning, "actor/entropy": -log_prob.mean(dim=-1)}
        return total.sum(), metrics

    return state, metrics | actors.update(state, loss, config.learning_rate)
