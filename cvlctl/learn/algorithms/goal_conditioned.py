"""Contrastive goal-conditioned RL (Eysenbach et al., NeurIPS 2022): pi(a | s, g) from trajectories alone.

The policy that collected the data has Q(s, a, g) = p(s+ = g | s, a) for the reward (1 - gamma) p(s' = g | s, a), and
the occupancy critic knows it: f(s, a, g) = phi(s, a) . psi(g) = log Q(s, a, g) - log p(g) at the optimum of binary NCE.
So argmax_a f = argmax_a Q, and the actor maximises f as it is. InfoNCE's optimum is log Q - log p(g) + c(s, a) with any
c: the same argmax only where the partition penalty (its log-mean form) holds c at 0; with `partition_coefficient: 0` f
does not rank actions. The Q is that of the data's policy, whatever goals it was after: one step of policy improvement.

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
from cvlctl.types import Number, OccupancyBatch, Spec, Whole, check_widths

LEARNS_FROM = "actions"
SEES_BY = "phi"
CALLS = 360


@dataclass(frozen=True)
class Config:
    """Columns of goals and commands belong to the critic: a pretrained one brings its own."""

    __pydantic_config__ = {"extra": "forbid"}

    critic: occupancy.Config = field(default_factory=occupancy.binary_nce)  # from scratch; else the pretrained run's
    mode: Literal["auto", "scratch", "continue", "frozen"] = "auto"  # auto: continue with init_from, else scratch
    random_goals: Number = 0.5  # share of the actor's goals that are other pairs' futures; the rest are the pair's own
    bc_coefficient: Number = 0.05  # of cloning the pair's action for its own future as goal; 1 for f over its mean |f|
    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        if not 0 <= self.random_goals < 1:
            raise ValueError("random_goals must lie in [0, 1): cloning needs pairs with their own future")
        if self.bc_coefficient < 0 or self.learning_rate <= 0:
            raise ValueError("bc_coefficient must be at or above 0, and learning_rate above it")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    noise = (("action", (batch_size, spec.action_dim)),)
    return Draws(batch_size, config.critic.gamma, futures=True, noise=noise)


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


def step(config: Config, state: State, batch: OccupancyBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """Update the critic (unless frozen), then the actor on E[-f(s, a ~ pi(s, g), g) / mean |f|] + BC."""
    metrics: Metrics = {}
    if config.mode != "frozen":
        state, metrics = occupancy.step(config.critic, state, batch, noise)
    num_random = int(config.random_goals * batch.action.shape[1])
    future = tree_map(lambda x: goals(x, num_random), batch.future_observation)
    psi = occupancy.bank_psi(config.critic, state, future)
    observation, goal = (networks.normalise(state, x) for x in (batch.observation, future))
    features = occupancy.seen(state, observation)
    shown = networks.shown(state, observation, features)
    shown_goal = networks.shown(state, goal, occupancy.goal_seen(config.critic, state, goal))

    def loss(params: State) -> tuple[Tensor, Metrics]:
        seen, told = (networks.see(params, "actor", x) for x in (shown, shown_goal))
        mean, log_std = networks.actor(params, command(config, seen, occupancy.goal_of(config.critic, told)))
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
